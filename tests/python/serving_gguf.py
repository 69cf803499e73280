"""What llama.cpp makes of the GGUF files that engraft writes, live.

    python tests/python/serving_gguf.py --engraft target/release/engraft        (gguf; transformers, peft; llama-cpp-python)
    python tests/python/serving_gguf.py --files FOLDER

Checked on a small random Llama with an adapter, made here, and with `--families` on those of `tests/python/families.py` that llama.cpp
computes as transformers does (of the others it has no windows, other patterns of layers, or not every tensor):

 1. the `gguf` package reads every file, and finds in it what llama.cpp asks for;
 2. llama.cpp tokenizes text as transformers does;
 3. its logits of each number format are near those that engraft makes of the same file, those of f32 near those of transformers and
    PEFT, too, and of f32 and f16 its greedy answers are theirs;
 4. its logits of the base's file with the adapter's are those of the merged model.

Without llama-cpp-python, the first alone. `--files` takes files that are there already (`files_for_llama_cpp` of
`tests/gguf_families.rs` writes them), `--model` another model's folder.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import gguf
import numpy as np

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "fixtures" / "tokenizer" / "bytes"
# Largest difference of a logit, over the largest logit, from what engraft makes of the same file in fp32: llama.cpp rounds what goes
# into products to the type of plain weights, and to 8 bits where weights are quantised. Random weights make the most of it.
TOLERANCES = {"f32": 2e-5, "f16": 1e-2, "bf16": 6e-2} | dict.fromkeys(
    ("q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"), 1.5e-1
)
# Whose answers must be the same, token by token.
EXACT = ("f32", "f16")
ASKED = [
    ("general.architecture", str),
    ("general.name", str),
    ("general.file_type", int),
    ("general.quantization_version", int),
    ("general.size_label", str),
    ("tokenizer.ggml.model", str),
    ("tokenizer.ggml.pre", str),
    ("tokenizer.ggml.tokens", list),
    ("tokenizer.ggml.token_type", list),
]
SETTINGS = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
TEXTS = [
    "Hello, world! It's 12345.",
    "  two  spaces   three\n\n\nnewlines\t\ttabs \r\n",
    "I'm, you're, we'LL, 'tis; don't",
    "def f(x):\n    return x ** 2  # comment",
    "Zażółć gęślą jaźń. Привет, мир. こんにちは 你好",
    "<|im_start|>user\nhi<|im_end|>\n",
    " leading", "trailing ", "\n",
]

failures = []


def check(what, good, told=""):
    """Prints and remembers one comparison."""
    print(f"{'ok  ' if good else 'FAIL'}  {what}{': ' if told else ''}{told}", flush=True)
    if not good:
        failures.append(what)


def near(what, difference, bound):
    check(what, difference <= bound, f"{difference:.2e} (bound {bound:.0e})")


def relative(ours, theirs):
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def random_llama(folder):
    """A model with rows long enough for every block, and a rank-stabilised adapter for it; the reference's logits and answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=704, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.08,
    )
    model = LlamaForCausalLM(config).float().eval()
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, base)
    lora = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    grafted = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in grafted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    grafted.save_pretrained(adapter)
    ids = tokenizer(" ".join(TEXTS[:4]), add_special_tokens=False).input_ids[:64]
    with torch.no_grad():
        logits = grafted(torch.tensor([ids])).logits[0].numpy()
        with grafted.disable_adapter():
            bare = grafted(torch.tensor([ids])).logits[0].numpy()
        answer = grafted.generate(
            input_ids=torch.tensor([ids[:16]]), max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0
        )[0, 16:].tolist()
    np.savez(folder / "reference.npz", ids=ids, logits=logits, bare=bare, answer=answer)
    return base, adapter


def written(engraft, base, adapter, folder):
    """Every file, by the executable."""
    for kind in TOLERANCES:
        export(engraft, [str(adapter), "--merge", "--type", kind], base, folder, f"model-{kind}.gguf")
    export(engraft, [str(base), "--type", "f32"], base, folder, "base-f32.gguf")
    export(engraft, [str(adapter)], base, folder, "adapter.gguf")


# Fixtures of `tests/python/families.py`.
FAMILIES = [
    "llama", "gemma", "granite", "cohere", "ministral3", "olmo2", "olmo3", "phi3-longrope", "glm4", "gpt_neox", "stablelm-sequential",
]


def family(engraft, name, folder):
    """A random model of a family: the base's file, the merged model's and the adapter's, against transformers and PEFT."""
    from safetensors.numpy import load_file

    source = folder / name
    if engraft:
        command = [sys.executable, str(ROOT / "tests/python/families.py"), "--family", name, "--hidden", "64"]
        subprocess.run([*command, "--weights", "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
        stand_in(source)
        export(engraft, [str(source), "--type", "f32"], source, source, "base-f32.gguf")
        export(engraft, [str(source / "adapter"), "--merge", "--type", "f32"], source, source, "model-f32.gguf")
        export(engraft, [str(source / "adapter")], source, source, "adapter.gguf")
    for path in sorted(source.glob("*.gguf")):
        read(path)
    if llama_cpp is None:
        return
    reference = load_file(source / "reference.safetensors")
    offsets = reference["offsets"].tolist()
    for what, model, adapter, logits in [
        ("base", "base-f32.gguf", None, "base_logits"),
        ("merged", "model-f32.gguf", None, "logits"),
        ("base + adapter", "base-f32.gguf", source / "adapter.gguf", "logits"),
    ]:
        served = Served(source / model, adapter)
        documents = [served.logits(reference["ids"][a:b]) for a, b in zip(offsets, offsets[1:])]
        # llama.cpp looks its GELU up in a table of f16.
        near(f"{name}: {what}", relative(np.concatenate(documents), reference[logits]), 1e-3)


def stand_in(folder):
    """A tokenizer of as many tokens as a random model has; it has none."""
    config = json.loads((folder / "config.json").read_text())
    size = config.get("text_config", config)["vocab_size"]
    tokens = {chr(0x21 + i): i for i in range(size - 1)} | {"!#": size - 1}
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": tokens, "merges": [["!", "#"]]}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": steps, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"decoder": steps, "model": model}))


def export(engraft, arguments, base, folder, name):
    with tempfile.TemporaryDirectory() as place:
        command = [engraft, "export", *arguments, "--out", f"{place}/out", "--target", "llama.cpp", "--no-probe"]
        named = [] if arguments[0] == str(base) else ["--model", str(base)]
        subprocess.run([*command, *named], check=True, stderr=subprocess.PIPE)
        (made,) = pathlib.Path(place, "out").glob("*.gguf")
        shutil.move(made, folder / name)


def read(path):
    """The file, through the `gguf` package; says what it lacks."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values["general.type"] == "adapter":
        good = values.get("adapter.type") == "lora" and values.get("adapter.lora.alpha", 0) > 0
        pairs = {tensor.name.rsplit(".", 1)[0] for tensor in reader.tensors}
        ends = sorted(tensor.name.rsplit(".", 1)[1] for tensor in reader.tensors)
        good &= ends == ["lora_a"] * len(pairs) + ["lora_b"] * len(pairs)
        check(f"gguf reads {path.name}", good, f"{len(pairs)} updates")
        return
    architecture = values.get("general.architecture")
    missing = [key for key, kind in ASKED if not isinstance(values.get(key), kind)]
    missing += [key for key in SETTINGS if f"{architecture}.{key}" not in values]
    finite = all(np.isfinite(gguf.dequantize(t.data, t.tensor_type)).all() for t in reader.tensors)
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    check(f"gguf reads {path.name}", not missing and finite, f"{len(reader.tensors)} tensors of {', '.join(kinds)}{missing or ''}")


class Served:
    """A file in llama.cpp."""

    def __init__(self, path, adapter=None):
        f32 = llama_cpp.GGML_TYPE_F32
        self.llama = llama_cpp.Llama(
            str(path), lora_path=adapter and str(adapter), n_ctx=256, logits_all=True, verbose=False, n_threads=2,
            type_k=f32, type_v=f32, use_mmap=False,
        )

    def logits(self, ids):
        self.llama.reset()
        self.llama.eval(list(ids))
        return np.array(self.llama.scores[: len(ids)])

    def answer(self, ids, count):
        said = []
        for _ in range(count):
            said.append(int(self.logits([*ids, *said])[-1].argmax()))
        return said

    def tokens(self, text):
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)


def ours(engraft, path, ids):
    """engraft's logits of a file, in fp32."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as place:
        out = pathlib.Path(place, "logits.safetensors")
        command = [engraft, "logits", "--model", str(path), "--ids", ",".join(map(str, ids)), "--dtype", "fp32", "--out", str(out)]
        subprocess.run(command, check=True, stderr=subprocess.PIPE)
        return load_file(out)["logits"]


def compare(engraft, folder, base):
    """Every file of a folder with the reference's numbers, and with ours."""
    for path in sorted(folder.glob("*.gguf")):
        read(path)
    if llama_cpp is None:
        print("llama-cpp-python is not there: its logits are not compared")
        return
    reference = np.load(folder / "reference.npz")
    ids, answer = reference["ids"].tolist(), reference["answer"].tolist()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    served = Served(folder / "model-f32.gguf")
    differing = [text for text in TEXTS if served.tokens(text) != tokenizer(text, add_special_tokens=False).input_ids]
    check("llama.cpp's tokens are transformers'", not differing, str(differing or len(TEXTS)))
    for kind, bound in TOLERANCES.items():
        path = folder / f"model-{kind}.gguf"
        served = Served(path)
        found = served.logits(ids)
        if engraft:
            near(f"merged, {kind}: engraft's own reading of it", relative(found, ours(engraft, path, ids)), bound)
        if kind == "f32":
            near(f"merged, {kind}: transformers and PEFT", relative(found, reference["logits"]), bound)
        if kind in EXACT:
            found = served.answer(ids[:16], len(answer))
            same = next((i for i, (a, b) in enumerate(zip(found, answer)) if a != b), len(answer))
            # Rounded weights may choose otherwise where two tokens are near; not at once.
            check(f"merged, {kind}: its answer", same >= (len(answer) if kind == "f32" else 4), f"{same} of {len(answer)} tokens")
    bare = Served(folder / "base-f32.gguf")
    near("base, f32", relative(bare.logits(ids), reference["bare"]), TOLERANCES["f32"])
    both = Served(folder / "base-f32.gguf", folder / "adapter.gguf")
    near("base + adapter, f32", relative(both.logits(ids), reference["logits"]), TOLERANCES["f32"])
    check("the adapter does something", relative(bare.logits(ids), reference["logits"]) > 0.05)


def main():
    """Compares what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--engraft", help="the executable, which writes the files")
    parser.add_argument("--prepare", type=pathlib.Path, help="only make the random model, its adapter and its numbers, in this folder")
    parser.add_argument("--files", type=pathlib.Path, help="a folder made by --prepare, with the files written already")
    parser.add_argument("--families", action="store_true", help="also a random model of each family")
    arguments = parser.parse_args()
    if arguments.prepare:
        arguments.prepare.mkdir(parents=True, exist_ok=True)
        random_llama(arguments.prepare)
        return
    if arguments.files:
        compare(arguments.engraft, arguments.files, arguments.files / "base")
    else:
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            base, adapter = random_llama(folder)
            written(arguments.engraft, base, adapter, folder)
            compare(arguments.engraft, folder, base)
    if arguments.families:
        with tempfile.TemporaryDirectory() as place:
            for name in FAMILIES:
                folder = arguments.files or pathlib.Path(place)
                if arguments.engraft or (folder / name).exists():
                    family(arguments.engraft, name, folder)
    if failures:
        sys.exit(f"{len(failures)} comparisons failed: {', '.join(failures)}")
    print(json.dumps({"gguf": "as in the reference", "llama.cpp": llama_cpp is not None}))


if __name__ == "__main__":
    main()
