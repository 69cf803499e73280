"""Live parity with bitsandbytes on the CPU, part of `make parity`. `--seeds` makes other tensors, models and adapters.

Checked, bit for bit unless said otherwise:

 1. random tensors of several shapes, sizes and types: codes, scales and the numbers they stand for in bf16, fp16 and fp32, of
    every form and block size, with quantised scales and without;
 2. an adapter on a base that bitsandbytes quantised, merged by engraft onto the numbers it was trained on: the logits of PEFT, in
    transformers (to 1e-4 of the largest);
 3. the same merged and quantised again: the weights that transformers and bitsandbytes load are those that bitsandbytes makes of
    the merged ones, the logits are engraft's (to 1e-4), and the loss that the manifest tells is what torch finds (to 1e-3 of it);
 4. a base that engraft wrote in fp8: transformers and compressed-tensors load its weights, and their logits are engraft's (to 1e-4).

With `--device cuda` (`make device-check`) only part 1 is run, both programs on the GPU, and without quantised scales: bitsandbytes has
their nearest codes there, and those of a table on the CPU, as engraft has on either.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS = 1e-4
FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "int8": {"load_in_8bit": True},
}

NESTED = {"cpu": (False, True), "cuda": (False,)}

failures = []


def check(what, good, said=""):
    """Prints and remembers one comparison."""
    print(f"{'ok  ' if good else 'FAIL'}  {what}{': ' + said if said else ''}", flush=True)
    if not good:
        failures.append(what)


def engraft(binary, *arguments):
    """Runs a verb; its output is shown only when it fails."""
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"engraft {' '.join(map(str, arguments))}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def same(ours, theirs):
    """Equal to the last bit: -0 is not 0."""
    ours, theirs = ours.contiguous().flatten(), theirs.cpu().contiguous().flatten()
    return ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def random_tensors(block, generator):
    """Tensors that try a block size: whole blocks, a cut one, few large numbers among small ones, zeros, and every type.

    No row is a multiple of 16 but not of the block: there bitsandbytes' kernel for AVX-512 takes the wrong scales.
    """
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    wide = normal(3, block) * 10 ** (4 * torch.rand(3, block, generator=generator) - 2)
    sparse = normal(2, 2 * block)
    sparse[:, block:] *= torch.rand(2, block, generator=generator) < 0.01
    zeros = normal(4, block)
    zeros[1:3] = 0
    many = normal(300, block) * torch.rand(300, 1, generator=generator)  # more blocks than share a scale of scales
    tensors = {"wide": wide, "sparse": sparse, "zeros": zeros, "many": many, "cut": normal(7, block + 5), "odd": normal(9, 11)}
    return {f"{name}_{short}": t.to(dtype) for name, t in tensors.items() for short, dtype in DTYPES.items()}


def four_bit(ours, name, tensor, kind, block, nested):
    """The names of parts that differ."""
    codes, state = bnb.quantize_4bit(tensor, blocksize=block, quant_type=kind, compress_statistics=nested)
    theirs = {"codes": codes, "absmax": state.absmax}
    if nested:
        theirs |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.reshape(1)}
    for short, dtype in DTYPES.items():
        state.dtype = dtype
        theirs[short] = bnb.dequantize_4bit(codes, state)
    return [part for part, value in theirs.items() if not same(ours[f"{name}.{part}"], value)]


def int8(ours, name, tensor):
    """The names of parts that differ."""
    codes, absmax, _ = bnb.int8_vectorwise_quant(tensor.half())
    theirs = {"codes": codes, "absmax": absmax, "fp32": bnb.int8_vectorwise_dequant(codes, absmax)}
    return [part for part, value in theirs.items() if not same(ours[f"{name}.{part}"], value)]


def tensors(arguments, work, seed):
    """Part 1."""
    cases = [(kind, block, nested) for kind in ("nf4", "fp4") for block in BLOCKS for nested in NESTED[arguments.device]]
    compared = 0
    for kind, block, nested in [*cases, ("int8", 64, False)]:
        generator = torch.Generator().manual_seed(seed * 10_000 + block)
        given, found = work / "tensors.safetensors", work / "found.safetensors"
        made = random_tensors(block, generator)
        save_file(made, given)
        how = [] if nested else ["--no-double-quant"]
        how += ["--device", arguments.device, "--out", found]
        engraft(arguments.engraft, "codes", "--tensors", given, "--type", kind, "--block-size", block, *how)
        ours = load_file(found)
        wrong = {}
        for name, tensor in made.items():
            tensor = tensor.to(arguments.device)
            parts = int8(ours, name, tensor) if kind == "int8" else four_bit(ours, name, tensor, kind, block, nested)
            if parts:
                wrong[name] = parts
        compared += len(made)
        what = f"seed {seed}: {kind}" + ("" if kind == "int8" else f" in blocks of {block}{', quantised scales' if nested else ''}")
        if wrong:
            check(what, False, json.dumps(wrong))
    check(f"seed {seed}: {compared} tensors, every form and block size, are those of bitsandbytes bit for bit", not failures)


def quantised(folder, how=None):
    """The model of a folder as transformers loads it, quantised while it is loaded where it is not stored so."""
    config = {} if how is None else {"quantization_config": BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.float32)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu", **config)
    # Out of training, bitsandbytes multiplies in bf16 on processors with AVX512-BF16, whatever type is asked for.
    return model.train()


def logits_of(model, ids):
    """Logits (T, V) of one document."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def relative(ours, theirs):
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def numbers(module):
    """What the weight of a quantised linear stands for."""
    if type(module).__name__ == "Linear4bit":
        return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return bnb.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)


def models(arguments, work, seed):
    """Parts 2 and 3."""
    torch.manual_seed(seed)
    base = work / "base"
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=512, tie_word_embeddings=False, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        )
    ).save_pretrained(base)  # fmt: skip
    ids = torch.randint(0, 512, (40,)).tolist()
    for form, how in FORMS.items():
        model = quantised(base, how)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, weight in peft.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        adapter = work / f"adapter-{form}"
        peft.save_pretrained(adapter)
        said = {"type": form, "skip": ["lm_head"], "dtype": "fp32"}
        if form != "int8":
            said |= {"block_size": 64, "double_quant": how["bnb_4bit_use_double_quant"]}
        (adapter / "base_quantization.json").write_text(json.dumps(said))

        merge = ["merge", "--model", base, "--adapter", adapter, "--dtype", "fp32", "--json"]
        whole = work / f"merged-{form}"
        engraft(arguments.engraft, *merge, "--out", whole)
        plain = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, attn_implementation="eager")
        if form != "int8":  # what goes into bitsandbytes' eight-bit linears is quantised, too
            off = relative(logits_of(plain, ids), logits_of(peft, ids))
            check(f"seed {seed}: {form}: merged onto what PEFT trained on", off < LOGITS, f"{off:.1e}")

        again = work / f"merged-{form}-again"
        blocks = [] if said.get("double_quant", True) else ["--no-double-quant"]
        manifest = json.loads(engraft(arguments.engraft, *merge, "--out", again, "--quantize", form, *blocks))
        loaded, expected = quantised(again), quantised(whole, how)
        linears = {n: m for n, m in loaded.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
        theirs = dict(expected.named_modules())
        wrong = [name for name, module in linears.items() if not same(numbers(module), numbers(theirs[name]))]
        check(f"seed {seed}: {form}: {len(linears)} weights merged and quantised are bitsandbytes'", len(linears) == 14 and not wrong, ", ".join(wrong))
        out = work / f"{form}.safetensors"
        engraft(arguments.engraft, "logits", "--model", again, "--dtype", "fp32", "--ids", ",".join(map(str, ids)), "--out", out)
        if form != "int8":
            off = relative(load_file(out)["logits"], logits_of(loaded, ids))
            check(f"seed {seed}: {form}: its logits in transformers and bitsandbytes", off < LOGITS, f"{off:.1e}")
        exact, told = dict(plain.named_modules()), manifest["quantization_loss"]["tensors"]
        off = 0.0
        for name, module in linears.items():
            weight = exact[name].weight.detach()
            loss = ((numbers(module) - weight).norm() / weight.norm()).item()
            off = max(off, abs(told[f"{name}.weight"] - loss) / loss)
        check(f"seed {seed}: {form}: the loss of {len(told)} weights in the manifest", len(told) == 14 and off < 1e-3, f"off by {off:.1e}")


def eight_bit_floats(arguments, work, seed):
    """Part 4."""
    folder, out = work / "fp8", work / "fp8.safetensors"
    engraft(arguments.engraft, "quantize", "--model", work / "base", "--out", folder, "--type", "fp8", "--dtype", "fp32")
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    linears = {n: m for n, m in model.named_modules() if f"{n}.weight_scale" in stored}
    ids = torch.randint(0, 512, (40,)).tolist()
    theirs = logits_of(model, ids)  # whose weights are made whole on the way
    wrong = [n for n, m in linears.items() if not same(m.weight.data.float(), stored[f"{n}.weight"].float() * stored[f"{n}.weight_scale"])]
    check(f"seed {seed}: fp8: {len(linears)} weights are compressed-tensors'", len(linears) == 14 and not wrong, ", ".join(wrong))
    engraft(arguments.engraft, "logits", "--model", folder, "--dtype", "fp32", "--ids", ",".join(map(str, ids)), "--out", out)
    off = relative(load_file(out)["logits"], theirs)
    check(f"seed {seed}: fp8: its logits in transformers and compressed-tensors", off < LOGITS, f"{off:.1e}")


def main():
    """Runs every check and says which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--seeds", default="1", help="comma-separated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where part 1 is made, by both")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for seed in map(int, arguments.seeds.split(",")):
        with tempfile.TemporaryDirectory(prefix="engraft-quantised-") as work:
            tensors(arguments, pathlib.Path(work), seed)
            if arguments.device == "cpu":
                models(arguments, pathlib.Path(work), seed)
                eight_bit_floats(arguments, pathlib.Path(work), seed)
    if failures:
        sys.exit(f"{len(failures)} comparisons failed: {'; '.join(failures)}")
    print("parity with bitsandbytes holds")


if __name__ == "__main__":
    main()
