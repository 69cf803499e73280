"""Speed and memory of merging and exporting: part of `make bench`.

    python bench/exports.py --engraft target/release/engraft [--gigabytes 2] [--folder FOLDER_ON_THE_DISK]

A random Llama in bf16, in shards, and an adapter of r=16 on all its linears, in PEFT's layout. What is written is written twice, each
time into a fresh folder, and the faster time counts; so is a copy of the very same files, read and written and synced as `cp` and
`sync` do it, between the two. Both read what the page cache still holds. Beside quantised files stands llama.cpp's own quantiser, on one
thread, from the bf16 file: without llama-cpp-python it is n/a.

Peak memory is the resident set's (of the kernel's accounts, the executable and libtorch included), less that of `engraft --version`'s
and of a model of one block: what grows with the model is what is left. It should be a tensor and its buffers, whatever the model.
"""

import argparse
import ctypes
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import torch
from run import ROOT, describe_machine
from safetensors.torch import save_file

HIDDEN, WIDE, HEADS, KEY_HEADS = 2048, 5632, 32, 8
VOCABULARY, RANK = 32000, 16
TYPES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k"]
# llama.h: enum llama_ftype.
NUMBERS = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


def shapes(layers):
    """Linears of the model, by name."""
    of = {"q_proj": (HIDDEN, HIDDEN), "o_proj": (HIDDEN, HIDDEN)} | dict.fromkeys(("k_proj", "v_proj"), (HIDDEN * KEY_HEADS // HEADS, HIDDEN))
    of = {f"self_attn.{name}": shape for name, shape in of.items()}
    of |= {"mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE)}
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in of.items()}


def make(folder, layers):
    """The model, a shard to every eight blocks, and its adapter."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    torch.manual_seed(0)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    for file in (ROOT / "tests/fixtures/tokenizer/bytes").iterdir():
        shutil.copy(file, base)
    random = lambda shape: (0.02 * torch.randn(shape)).bfloat16()  # noqa: E731
    index = {}

    def shard(tensors):
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(tensors, base / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    shard({"model.embed_tokens.weight": random((VOCABULARY, HIDDEN)), "lm_head.weight": random((VOCABULARY, HIDDEN)), "model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    linears = shapes(layers)
    for first in range(0, layers, 8):
        some = range(first, min(first + 8, layers))
        tensors = {f"{name}.weight": random(shape) for name, shape in linears.items() if int(name.split(".")[2]) in some}
        for layer in some:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        shard(tensors)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    updates = {}
    for name, (rows, columns) in linears.items():
        updates[f"base_model.model.{name}.lora_A.weight"] = 0.02 * torch.randn(RANK, columns)
        updates[f"base_model.model.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, RANK)
    save_file(updates, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.rsplit(".", 1)[1] for name in linears})
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules, "base_model_name_or_path": "base"}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    return base, adapter


# A process has held at least what the one had that began it: this one is small.
TIMED = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
run = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
seconds = time.perf_counter() - began
peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": run.returncode, "said": run.stderr, "seconds": seconds, "peak": peak}))
"""


def timed(command):
    """Seconds, and the most memory that it held, in bytes."""
    done = json.loads(subprocess.run([sys.executable, "-S", "-c", TIMED, *map(str, command)], check=True, capture_output=True).stdout)
    if done["code"]:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done['said']}")
    return done["seconds"], done["peak"]


def size(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def copied(folder, into):
    """Seconds that a copy of the folder's files takes, synced as what is exported is."""
    into.mkdir()
    began = time.perf_counter()
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, into / file.name)
        with open(into / file.name, "rb+") as copy:
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(into)
    return seconds


def measured(command, out, folder):
    """A row: the better of two runs, beside the better of three copies of what they wrote."""
    runs, copies, bytes_written = [], [], 0
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        runs.append(timed([*command, "--out", out]))
        bytes_written = size(out)
        copies.append(copied(out, folder / "copy"))
    copies.append(copied(out, folder / "copy"))
    return {"seconds": min(s for s, _ in runs), "copy_seconds": min(copies), "bytes": bytes_written, "peak": min(p for _, p in runs)}


def quantised_by_llama_cpp(source, kind, folder):
    """Seconds of llama.cpp's quantiser on one thread; None where it is not there."""
    try:
        import llama_cpp
    except ImportError:
        return None
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = NUMBERS[kind], 1
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    target = folder / "theirs.gguf"
    began = time.perf_counter()
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    seconds = time.perf_counter() - began
    target.unlink(missing_ok=True)
    return None if code else seconds


def main():
    """Measures all of it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: str(pathlib.Path(p).resolve()))
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the model in bf16")
    parser.add_argument("--folder", type=pathlib.Path, help="on the disk to measure; four times the model's size is needed")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    engraft = arguments.engraft
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = pathlib.Path(place)
        block = 2 * sum(rows * columns for rows, columns in shapes(1).values())
        fixed = 2 * 2 * VOCABULARY * HIDDEN
        layers = max(round((1e9 * arguments.gigabytes - fixed) / block), 2)
        (folder / "small").mkdir()
        (folder / "large").mkdir()
        small = make(folder / "small", 1)
        base, adapter = make(folder / "large", layers)
        model = size(base)

        def commands(base, adapter):
            export = [engraft, "export", adapter, "--model", base, "--no-probe", "--target"]
            merge = [engraft, "merge", "--model", base, "--adapter", adapter, "--no-probe"]
            rows = {"merge": merge, "export to transformers": [*export, "transformers", "--merge"], "the adapter for vLLM": [*export, "vllm"]}
            return rows | {f"GGUF {kind}": [*export, "llama.cpp", "--merge", "--type", kind] for kind in ["bf16", *arguments.types.split(",")]}

        rows = {}
        for name, command in commands(base, adapter).items():
            print(name, file=sys.stderr, flush=True)
            shutil.rmtree(folder / "out", ignore_errors=True)
            _, least = timed([*commands(*small)[name], "--out", folder / "out"])
            row = measured(command, folder / "out", folder)
            row["grown"] = row["peak"] - least
            if name == "GGUF bf16":
                (written,) = (folder / "out").glob("*.gguf")
                written.rename(folder / "bf16.gguf")
            kind = name.removeprefix("GGUF ")
            if kind in NUMBERS:
                row["llama_cpp_seconds"] = quantised_by_llama_cpp(folder / "bf16.gguf", kind, folder)
            rows[name] = row
    print(table(rows, model, layers))
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": describe_machine(len(os.sched_getaffinity(0))), "model_bytes": model, "rows": rows}, indent=1) + "\n")


def table(rows, model, layers):
    lines = [
        f"A Llama of {model / 1e9:.1f} GB in bf16 ({layers} blocks), r={RANK} on all linears, {len(os.sched_getaffinity(0))} threads.",
        "",
        "| What is written | bytes | seconds | a copy of the same | speed of a copy | llama.cpp, one thread | against it | peak memory | more than of one block |",
        "|---" * 9 + "|",
    ]
    for name, row in rows.items():
        theirs = row.get("llama_cpp_seconds")
        beside = (f"{theirs:.1f} s", f"{theirs / row['seconds']:.1f}x") if theirs else ("n/a", "")
        lines.append(
            f"| {name} | {row['bytes'] / 1e9:.2f} GB | {row['seconds']:.2f} | {row['copy_seconds']:.2f} |"
            f" {100 * row['copy_seconds'] / row['seconds']:.0f}% | {beside[0]} | {beside[1]} | {row['peak'] / 2**20:.0f} MiB |"
            f" {row['grown'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
