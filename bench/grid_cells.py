"""Cells of bench/grid.py that need torch: each runs in a process of its own and prints its numbers as one line of JSON.

    python grid_cells.py KIND --model M --work W --models FOLDER --device cpu|cuda

A cell that cannot be measured here prints `{"absent": why}`. Nothing but torch is imported before a kind is known to need it.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import pathlib
import shutil
import time

from grid_works import ALPHA, END, LINEARS, MODELS, RANK, RATE, STEPS, WARMUP
from grid_works import adapter_config, adapter_sites, config_of, documents_of, lengths_of, tensors_of, token_ids


class Absent(Exception):
    """A cell that cannot be measured here, and why."""


def needs(*modules):
    """Ends the cell where a module is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise Absent(f"{', '.join(missing)} not installed")


# ---------------------------------------------------------------------------------------------------------------------
# What all kinds start from


def cell_model(arguments):
    """Writes a model of random bf16 numbers, and the adapter that every kind starts from: A as PEFT draws it, B zero."""
    import torch

    torch.manual_seed(0)
    folder = arguments.models / arguments.model
    adapter = folder / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(arguments.model)))
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config(arguments.model)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.tokenizer / file, folder / file)

    low_rank = {}
    for module, outputs, inputs in adapter_sites(arguments.model):
        low_rank[f"base_model.model.{module}.lora_A.weight"] = (RANK, inputs)
        low_rank[f"base_model.model.{module}.lora_B.weight"] = (outputs, RANK)

    def start(name, shape):
        return torch.zeros(shape) if "lora_B" in name else torch.empty(shape).uniform_(-1, 1) / shape[1] ** 0.5

    write_safetensors(adapter / "adapter_model.safetensors", low_rank, "F32", start)
    write_safetensors(
        folder / "model.safetensors",
        dict(tensors_of(arguments.model)),
        "BF16",
        lambda name, shape: torch.ones(shape) if "norm" in name else torch.randn(shape, device=arguments.device) * 0.02,
    )
    return {}


def write_safetensors(path, shapes, stored, made):
    """Writes tensors one by one, so that none but the one at hand is in memory. The file has its name when it is whole."""
    import torch

    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[stored]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = dtype.itemsize * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = made(name, shape).to(dtype).cpu().contiguous()
            file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    os.replace(part, path)


def same_start(arguments, named, key=lambda name: name.replace(".default", "")):
    """Gives A of a peer's adapter the numbers that all begin with; B is zero already. `key` turns its names into the file's."""
    import torch
    from safetensors.torch import load_file

    stored = {name: a for name, a in load_file(arguments.models / arguments.model / "adapter/adapter_model.safetensors").items() if "lora_A" in name}
    own = {key(name): parameter for name, parameter in named if "lora_a" in name.lower()}
    if own.keys() != stored.keys():
        odd = sorted(own.keys() ^ stored.keys())
        raise SystemExit(f"its adapter is on other modules than all others', such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def batch_of(arguments):
    """The micro-batch of every step, padded at its ends: ids, labels, and a mask where there is padding; each (B, T)."""
    import torch

    ids_of = token_ids()
    rows = [[ids_of[letter] for letter in text] + [ids_of[END]] for text in documents_of(arguments.work)]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    batch = {"input_ids": ids, "labels": labels}
    if longest * len(rows) != sum(map(len, rows)):
        batch["attention_mask"] = (labels >= 0).long()
    return {name: tensor.to(arguments.device) for name, tensor in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The machine's rates


def cell_machine(arguments):
    """GEMM, attention and copy at a model's shapes, in units a second."""
    import torch

    _, _, d, f, heads, kv_heads, head, _, _, _ = MODELS[arguments.model]
    lengths = lengths_of(arguments.work)
    device, cuda = arguments.device, arguments.device == "cuda"
    tokens, length = sum(lengths), max(lengths)

    def best(work, run, seconds=0.6):
        """Work units a second, of the fastest of many runs."""
        run()
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            if cuda:
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record()
                run()
                ended.record()
                ended.synchronize()
                fastest = min(fastest, begun.elapsed_time(ended) / 1e3)
            else:
                begun = time.perf_counter()
                run()
                fastest = min(fastest, time.perf_counter() - begun)
        return work / fastest

    normal = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    shapes = {(d, heads * head): 2, (d, kv_heads * head): 2, (d, f): 2, (f, d): 1}
    flops = spent = 0.0
    for (rows, columns), often in shapes.items():
        x, w = normal(tokens, rows), normal(columns, rows)
        work = 2 * tokens * rows * columns
        spent += often * work / best(work, lambda: torch.nn.functional.linear(x, w))  # noqa: B023
        flops += often * work
    batch = max(1, tokens // length)
    q, k, v = (normal(batch, heads, length, head).requires_grad_() for _ in range(3))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    pairs = batch * length * (length + 1) / 2 * heads * head
    with torch.no_grad():
        forward = best(4 * pairs, attend)
    out = attend()
    upstream = torch.randn_like(out)
    backward = best(10 * pairs, lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True))
    block = torch.empty((1 << 30) if cuda else (64 << 20), dtype=torch.uint8, device=device)
    into = torch.empty_like(block)
    copy = best(2 * block.numel(), lambda: into.copy_(block))
    return {
        "gemm": flops / spent, "attention_forward": forward, "attention_backward": backward, "copy": copy,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def stepped(arguments, model, parameters):
    """Times the steps of a model that gives a loss for ids and labels, as transformers' do.

    On a GPU each step ends with an event and its loss and norm stay there: nothing waits for them but the first step, which warms up.
    """
    import torch

    cuda = arguments.device == "cuda"
    batch = batch_of(arguments)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def mark():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks, losses, norms, first = [mark()], [], [], None
    for _ in range(WARMUP + STEPS):
        loss = model(**batch).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        marks.append(mark())
        losses.append(loss.detach())
        if first is None:
            if cuda:
                torch.cuda.synchronize()
            first = time.time() - arguments.launched
    if cuda:
        torch.cuda.synchronize()
    between = (lambda a, b: a.elapsed_time(b) / 1e3) if cuda else (lambda a, b: b - a)
    return {
        "seconds": [between(a, b) for a, b in zip(marks, marks[1:])], "losses": [x.item() for x in losses], "norms": [x.item() for x in norms],
        "first_step": first, "allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "parameters": sum(p.numel() for p in parameters),
    }  # fmt: skip


def four_bits(compute):
    """bitsandbytes' NF4 for transformers."""
    needs("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)


def peft_model(arguments, dtype, liger=False, recompute=False):
    """PEFT on transformers, ready to train, and what is trained."""
    needs("transformers", "peft", "accelerate", *(["liger_kernel"] if liger else []))
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM
    if liger:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as load  # noqa: N813
    how = {"quantization_config": four_bits(dtype)} if arguments.four_bit else {}
    model = load.from_pretrained(arguments.models / arguments.model, dtype=dtype, device_map=arguments.device, attn_implementation="sdpa", **how)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    same_start(arguments, model.named_parameters())
    return model, [p for p in model.parameters() if p.requires_grad]


def cell_reference(arguments):
    """Loss and gradient norm of the first step in fp32, by plain transformers and PEFT."""
    import torch

    model, parameters = peft_model(arguments, torch.float32, recompute=True)
    loss = model(**batch_of(arguments)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return {"losses": [loss.item()], "norms": [norm.item()], "parameters": sum(p.numel() for p in parameters)}


def cell_peft(arguments, liger=False, recompute=False):
    """PEFT + transformers in bf16."""
    import torch

    if liger and arguments.device != "cuda":
        raise Absent("Liger's kernels need a GPU")
    return stepped(arguments, *peft_model(arguments, torch.bfloat16, liger, recompute))


def cell_unsloth(arguments, recompute="unsloth"):
    """Unsloth, as its notebooks set it up."""
    if arguments.device != "cuda":
        raise Absent("Unsloth needs a GPU")
    needs("unsloth")
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(arguments.models / arguments.model), max_seq_length=max(lengths_of(arguments.work)), dtype=torch.bfloat16, load_in_4bit=arguments.four_bit
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=LINEARS, use_gradient_checkpointing=recompute
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=bool(recompute))
    same_start(arguments, model.named_parameters())
    return stepped(arguments, model, [p for p in model.parameters() if p.requires_grad])


# torchtune's names of what it trains, and transformers'.
TUNE = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
        "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"}  # fmt: skip


def cell_torchtune(arguments):
    """torchtune's own modules, set up as its single-device LoRA recipe does: no recompute, chunked cross-entropy."""
    if MODELS[arguments.model][0] != "llama" or arguments.four_bit:
        raise Absent("measured for Llama in bf16 only")
    _, layers, d, f, heads, kv_heads, head, vocabulary, tied, more = MODELS[arguments.model]
    if tied or heads * head != d:
        raise Absent("its Llama 3.1 builder has a head of its own and heads that divide the width")
    needs("torchtune", "torchao")
    import torch
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    # As its recipes do: all numbers begin as bf16 where they stay, but for the table of positions, which is fp32.
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(arguments.device):
        model = lora_llama3_1(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, apply_lora_to_output=False,
            vocab_size=vocabulary, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, embed_dim=d, max_seq_len=32768,
            intermediate_dim=f, norm_eps=more["rms_norm_eps"], rope_base=int(more["rope_theta"]), lora_rank=RANK, lora_alpha=ALPHA,
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    stored = load_file(arguments.models / arguments.model / "model.safetensors")
    stored = hf_to_tune(stored, num_heads=heads, num_kv_heads=kv_heads, dim=d, head_dim=head)
    missing, unknown = model.load_state_dict(stored, strict=False)
    if odd := [*unknown, *(name for name in missing if "lora" not in name)]:
        raise SystemExit(f"its model has other tensors than the checkpoint, such as {odd[0]}")
    del stored
    trained = get_adapter_params(model)
    set_trainable_params(model, trained)

    def key(name):
        layer, _, rest = name.removeprefix("layers.").partition(".")
        return f"base_model.model.model.layers.{layer}.{TUNE[rest.removesuffix('.lora_a.weight')]}.lora_A.weight"

    same_start(arguments, trained.items(), key)
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)

    def as_transformers(input_ids, labels, attention_mask=None):
        del attention_mask  # rows are padded at their ends, where causal attention and labels leave them out
        labels = torch.hstack([labels[:, 1:], torch.full_like(labels[:, :1], -100)])
        return argparse.Namespace(loss=loss(model(input_ids), labels))

    return stepped(arguments, as_transformers, list(trained.values()))


CELLS = {
    "model": cell_model,
    "machine": cell_machine,
    "reference": cell_reference,
    "peft": cell_peft,
    "peft-recompute": lambda arguments: cell_peft(arguments, recompute=True),
    "peft-liger": lambda arguments: cell_peft(arguments, liger=True),
    "unsloth": cell_unsloth,
    "unsloth-keep": lambda arguments: cell_unsloth(arguments, recompute=False),
    "torchtune": cell_torchtune,
}


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CELLS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work")
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", type=pathlib.Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--launched", type=float, default=0.0)
    parser.add_argument("--four-bit", action="store_true")
    arguments = parser.parse_args()
    # Everything is here already.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if arguments.threads:
        # Before torch is imported: some of its thread pools are as large as it finds the machine then.
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    try:
        print(json.dumps(CELLS[arguments.kind](arguments)))
    except Absent as why:
        print(json.dumps({"absent": str(why)}))


if __name__ == "__main__":
    main()
