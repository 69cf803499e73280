"""Speed and memory of engraft beside PEFT, Unsloth and torchtune on one GPU: from a folder that can be copied to where the GPU is.

    python bench/grid.py prepare FOLDER                         anywhere, with pyarrow: rows of fixed tokens, a tokenizer, this program
    python FOLDER/grid.py run --engraft BINARY                  on the machine with the GPU: torch 2.11 is all that must be there
    python FOLDER/grid.py run --engraft BINARY --grid cpu       without a GPU: the same at small sizes

Models are random, made of the sizes in MODELS where they are used. Every cell is a fresh process; the kinds of one piece of work take
turns (A B C C B A), so that a machine that warms up or slows down hurts all alike. Ten steps warm up, thirty are timed; the table
has the median step, and the fastest and slowest tenth. Every kind trains the same documents with the same rank on all linears; losses of
the first step agree or the row says so, and gradient norms are above zero. A peer that is not installed, or lacks the memory, is said
to be so and never given a number.

The floor is the time that the arithmetic of a step takes at this machine's own rates, measured in the same run (N tokens, all of them
supervised, A = sum over documents of l(l+1)/2, rank r):

    P_L = L(2dHh + 2dHk h + 3df)    P_h = V d    P_A = L r[(d+Hh) + 2(d+Hk h) + (Hh+d) + 2(d+f) + (f+d)]
    F_model = N(4P_L + 4P_h + 6P_A) + 12 L H h A
    T_floor = N(4P_L + 4P_h + 6P_A) / R_mm + 4LHhA / R_af + 10LHhA / R_ab + bytes / BW + k T_dq

with k = 2 and T_dq the time of making all weights whole at the speed of a copy, where the base is in four bits. A model's share is
F_model a second over R_mm: what others call MFU, of what this machine's products really reach.
"""

import argparse
import datetime
import importlib.util
import json
import os
import pathlib
import random
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time

from run import quantile, watched

HERE = pathlib.Path(__file__).resolve().parent
RANK, ALPHA, RATE = 16, 32, 1e-4
WARMUP, STEPS = 10, 30

# L, d, f, H, Hk, h, V, whether embedding and head are one, and what else config.json says.
LLAMA3 = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
QWEN3 = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
MODELS = {
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, LLAMA3),
    "qwen3-8b": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False, QWEN3),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True, QWEN3),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, True, {"rope_theta": 100000.0, "rms_norm_eps": 1e-5}),
    "llama-70b-slice": ("llama", 2, 8192, 28672, 64, 8, 128, 128256, False, LLAMA3),
    "tiny-llama": ("llama", 4, 256, 768, 4, 2, 64, 4096, True, {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}),
    "tiny-qwen3": ("qwen3", 3, 256, 512, 4, 2, 64, 4096, False, QWEN3),
}


def mixed(documents, middle, longest, seed=0):
    """Lengths as answers to school problems have them: most near the middle, a few far longer."""
    drawn = random.Random(seed)
    return [max(16, min(longest, round(drawn.lognormvariate(0, 0.45) * middle))) for _ in range(documents)]


# A model, documents of a micro-batch, whether they are packed (peers pad them), and whether the base is in four bits.
GRIDS = {
    "gpu": [
        ("llama-3.1-8b", "8x2048", False, False),
        ("llama-3.1-8b", "4x4096", False, False),
        ("llama-3.1-8b", "8x2048", False, True),
        ("llama-3.1-8b", "4x4096", False, True),
        ("llama-3.1-8b", "mixed-64x200", True, False),
        ("qwen3-8b", "8x2048", False, False),
        ("qwen3-8b", "8x2048", False, True),
        ("qwen3-0.6b", "2x2048", False, False),
        ("smollm2-135m", "16x1024", False, False),
        ("llama-70b-slice", "4x4096", False, False),
    ],
    "cpu": [
        ("tiny-llama", "4x128", False, False),
        ("tiny-llama", "4x128", False, True),
        ("tiny-llama", "mixed-12x60", True, False),
        ("tiny-qwen3", "2x256", False, False),
    ],
}
KINDS = ["engraft", "peft", "peft-recompute", "peft-liger", "unsloth", "torchtune"]


def lengths_of(work):
    """Tokens of a micro-batch's documents."""
    documents, length = work.removeprefix("mixed-").split("x")
    return mixed(int(documents), int(length), 4 * int(length)) if work.startswith("mixed-") else [int(length)] * int(documents)


# ---------------------------------------------------------------------------------------------------------------------
# Before: what needs more than torch


LETTERS = string.ascii_letters
END = "<|end|>"


def token_ids():
    """Ids of letters and of the end of a document, those of the tokenizer that is written."""
    return {END: 0, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}


def documents_of(work):
    """The micro-batch of every step, the same each time: texts, a token to a letter, and one more token behind each."""
    drawn = random.Random(work)
    return ["".join(drawn.choices(LETTERS, k=n - 1)) for n in lengths_of(work)]


def prepare(folder):
    """Writes what the machine with the GPU has no library for, and this program beside it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    added = {"id": 0, "content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": token_ids(), "merges": [],
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe,
    }  # fmt: skip
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}))
    for work in sorted({work for grid in GRIDS.values() for _, work, _, _ in grid}):
        texts = documents_of(work) * (WARMUP + STEPS)
        pq.write_table(pa.table({"text": texts}), folder / f"{work}.parquet")
    if folder.resolve() != HERE:
        for file in ("grid.py", "run.py"):
            shutil.copy(HERE / file, folder / file)
    print(f"{folder} is ready: copy it to the machine with the GPU, then `python grid.py run --engraft BINARY`")


# ---------------------------------------------------------------------------------------------------------------------
# Models


def config_of(name):
    """config.json."""
    model_type, layers, d, f, heads, kv_heads, head, vocabulary, tied, more = MODELS[name]
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]], "model_type": model_type,
        "num_hidden_layers": layers, "hidden_size": d, "intermediate_size": f, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": 32768, "hidden_act": "silu", "attention_bias": False, "eos_token_id": 0, "torch_dtype": "bfloat16",
        **more,
    }  # fmt: skip


def tensors_of(name):
    """(name, shape) of a checkpoint's tensors."""
    model_type, layers, d, f, heads, kv_heads, head, vocabulary, tied, _ = MODELS[name]
    yield "model.embed_tokens.weight", (vocabulary, d)
    for i in range(layers):
        at = f"model.layers.{i}"
        for what, rows, columns in [("q", heads * head, d), ("k", kv_heads * head, d), ("v", kv_heads * head, d), ("o", d, heads * head)]:
            yield f"{at}.self_attn.{what}_proj.weight", (rows, columns)
        if model_type == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
        for what, rows, columns in [("gate", f, d), ("up", f, d), ("down", d, f)]:
            yield f"{at}.mlp.{what}_proj.weight", (rows, columns)
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    if not tied:
        yield "lm_head.weight", (vocabulary, d)


def cell_model(arguments):
    """Writes a model of random bf16 numbers as safetensors, one file, tensor by tensor."""
    import torch

    torch.manual_seed(0)
    folder = arguments.models / arguments.model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(arguments.model)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE / "tokenizer" / file, folder / file)
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors_of(arguments.model):
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open(folder / "model.safetensors.part", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors_of(arguments.model):
            made = torch.ones(shape) if "norm" in name else torch.randn(shape, device=device) * 0.02
            file.write(made.bfloat16().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# The machine's rates


def cell_machine(arguments):
    """GEMM, attention and copy at a model's shapes, in units a second."""
    import torch

    _, layers, d, f, heads, kv_heads, head, vocabulary, _, _ = MODELS[arguments.model]
    lengths = lengths_of(arguments.work)
    device, cuda = arguments.device, arguments.device == "cuda"
    tokens, length = sum(lengths), max(lengths)

    def best(work, run, seconds=1.0):
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
        "gemm": flops / spent, "attention_forward": forward, "attention_backward": backward, "copy": copy, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else processor(), "layers": layers, "vocabulary": vocabulary,
    }  # fmt: skip


def processor():
    """The CPU in words."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else 'CPU'}, {len(os.sched_getaffinity(0))} threads"


def arithmetic(model, lengths):
    """F_model, and its parts, of a step."""
    _, L, d, f, H, Hk, h, V, _, _ = MODELS[model]
    tokens, attended = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    p_l = L * (2 * d * H * h + 2 * d * Hk * h + 3 * d * f)
    p_a = L * RANK * ((d + H * h) + 2 * (d + Hk * h) + (H * h + d) + 2 * (d + f) + (f + d))
    matrices = tokens * (4 * p_l + 4 * V * d + 6 * p_a)
    return {
        "model": matrices + 12 * L * H * h * attended, "matrices": matrices, "attention": L * H * h * attended, "weights": p_l,
        "moved": 2 * tokens * L * (2 * (2 * d + (H + 2 * Hk) * h + H * h + 2 * f) + 4 * H),
    }  # fmt: skip


def floor_seconds(machine, model, lengths, four_bit):
    """The time that a step takes at the machine's rates, nothing recomputed."""
    of = arithmetic(model, lengths)
    made_whole = of["weights"] * (0.5 + 1 / 64 + 4 / 16384 + 2) / machine["copy"]
    return (
        of["matrices"] / machine["gemm"]
        + 4 * of["attention"] / machine["attention_forward"]
        + 10 * of["attention"] / machine["attention_backward"]
        + of["moved"] / machine["copy"]
        + (2 * made_whole if four_bit else 0.0)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Cells


class Absent(Exception):
    """A peer that cannot be measured here, and why."""


def needs(*modules):
    """Ends the cell where a module is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise Absent(f"{', '.join(missing)} not installed")


def stepped(arguments, model, parameters, attention_mask=True):
    """Times the steps of a model that gives a loss for ids and labels, as transformers' do."""
    import torch

    device, cuda = arguments.device, arguments.device == "cuda"
    ids_of = token_ids()
    rows = [[ids_of[letter] for letter in text] + [ids_of[END]] for text in documents_of(arguments.work)]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
    mask = (labels >= 0).long()
    ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
    given = {"input_ids": ids, "labels": labels}
    if attention_mask and longest * len(rows) != sum(map(len, rows)):
        given["attention_mask"] = mask
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, norms, first = [], [], [], None
    for _ in range(WARMUP + STEPS):
        if cuda:
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
        clock = time.perf_counter()
        loss = model(**given).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            ended.record()
            ended.synchronize()
        seconds.append(begun.elapsed_time(ended) / 1e3 if cuda else time.perf_counter() - clock)
        losses.append(loss.item())
        norms.append(norm.item())
        first = first or time.time() - arguments.launched
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {
        "seconds": seconds, "losses": losses, "smallest_norm": min(norms), "first_step": first, "allocated": peak,
        "parameters": sum(p.numel() for p in parameters),
    }  # fmt: skip


def four_bits():
    """bitsandbytes' NF4 for transformers."""
    import torch
    from transformers import BitsAndBytesConfig

    needs("bitsandbytes", "accelerate")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


def cell_peft(arguments, recompute=False, liger=False):
    """PEFT + transformers."""
    needs("transformers", "peft", *(["liger_kernel"] if liger else []))
    if liger and arguments.device != "cuda":
        raise Absent("Liger's kernels need a GPU")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    load = AutoModelForCausalLM
    if liger:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as load  # noqa: N813
    how = {"quantization_config": four_bits()} if arguments.four_bit else {}
    model = load.from_pretrained(arguments.models / arguments.model, dtype=torch.bfloat16, device_map=arguments.device, attn_implementation="sdpa", **how)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return stepped(arguments, model, [p for p in model.parameters() if p.requires_grad])


def cell_unsloth(arguments):
    """Unsloth, as its notebooks set it up."""
    if arguments.device != "cuda":
        raise Absent("Unsloth needs a GPU")
    needs("unsloth")
    from unsloth import FastLanguageModel

    import torch

    model, _ = FastLanguageModel.from_pretrained(
        str(arguments.models / arguments.model), max_seq_length=max(lengths_of(arguments.work)), dtype=torch.bfloat16, load_in_4bit=arguments.four_bit
    )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=linears, use_gradient_checkpointing="unsloth"
    )
    FastLanguageModel.for_training(model)
    return stepped(arguments, model, [p for p in model.parameters() if p.requires_grad])


def cell_torchtune(arguments):
    """torchtune's own modules, set up as its single-device LoRA recipe does: no recompute, chunked cross-entropy."""
    needs("torchtune", "torchao")
    import torch
    from torchtune import models, modules
    from torchtune.models import convert_weights  # noqa: F401 (so that an older torchtune says what it lacks)

    if MODELS[arguments.model][0] != "llama" or arguments.four_bit:
        raise Absent("measured for Llama in bf16 only")
    _, layers, d, f, heads, kv_heads, head, vocabulary, tied, more = MODELS[arguments.model]
    if tied or heads * head != d:
        raise Absent("its Llama 3.1 builder has a head of its own and heads that divide the width")
    build = models.llama3_1.lora_llama3_1
    model = build(
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, apply_lora_to_output=False,
        vocab_size=vocabulary, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, embed_dim=d, max_seq_len=32768,
        intermediate_dim=f, norm_eps=more["rms_norm_eps"], rope_base=int(more["rope_theta"]), lora_rank=RANK, lora_alpha=ALPHA,
    ).to(device=arguments.device, dtype=torch.bfloat16)  # fmt: skip
    trained = modules.peft.get_adapter_params(model)
    modules.peft.set_trainable_params(model, trained)
    loss = modules.loss.CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)

    def as_transformers(input_ids, labels, attention_mask=None):
        del attention_mask  # rows are padded at their ends, where causal attention and labels leave them out
        labels = torch.hstack([labels[:, 1:], torch.full_like(labels[:, :1], -100)])
        return argparse.Namespace(loss=loss(model(input_ids), labels))

    return stepped(arguments, as_transformers, list(trained.values()))


PEERS = {
    "peft": cell_peft,
    "peft-recompute": lambda arguments: cell_peft(arguments, recompute=True),
    "peft-liger": lambda arguments: cell_peft(arguments, liger=True),
    "unsloth": cell_unsloth,
    "torchtune": cell_torchtune,
}


def engraft(arguments, model, work, packed, four_bit):
    """`engraft train` on the same documents, read from its metrics."""
    lengths = lengths_of(work)
    with tempfile.TemporaryDirectory(prefix="engraft-grid-") as folder:
        folder = pathlib.Path(folder)
        run = folder / "run"
        # Packed, a micro-batch is one row that all documents fit into.
        rows = f"max_length: {sum(lengths)}, packing: true" if packed else f"max_length: {max(lengths)}"
        recipe = [
            f"base_model: {arguments.models / model}",
            "dtype: bf16",
            f"device: {arguments.device}",
            f"adapter: {{r: {RANK}, lora_alpha: {ALPHA}, target_modules: all-linear{', method: qlora' if four_bit else ''}}}",
            *(["quantization: {type: nf4, double_quant: true}"] if four_bit else []),
            f"dataset: {{train: {HERE / work}.parquet, format: text, shuffle: false, {rows}}}",
            "training:",
            f"  max_steps: {WARMUP + STEPS}",
            f"  micro_batch_size: {1 if packed else len(lengths)}",
            f"  learning_rate: {RATE}",
            "  lr_scheduler: constant",
            "  warmup_steps: 0",
            "  logging_steps: 1",
            "  recompute: auto",
            *([f"  threads: {arguments.threads}"] if arguments.threads else []),
            f"output: {{dir: {run}, tensorboard: false}}",
        ]
        (folder / "recipe.yaml").write_text("\n".join(recipe) + "\n")
        metrics = run / "metrics.jsonl"
        code, said, first, resident = watched([arguments.engraft, "train", folder / "recipe.yaml"], metrics)
        if code == 8:
            raise Absent("out of memory")
        if code:
            sys.exit(f"engraft ended with {code}\n{said}")
        logged = [m for m in map(json.loads, metrics.read_text().splitlines()) if "loss" in m]
    elapsed = [m["elapsed_seconds"] for m in logged]
    return {
        "seconds": [elapsed[0]] + [b - a for a, b in zip(elapsed, elapsed[1:])], "losses": [m["loss"] for m in logged],
        "smallest_norm": min(m["grad_norm"] for m in logged), "first_step": first,
        "allocated": max((m.get("peak_memory_bytes") or 0 for m in logged)) if arguments.device == "cuda" else None,
        "resident": resident,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The parent: the standard library only, so that a child's peak is its own


def device_memory():
    """Bytes in use on the first GPU as the driver counts them; nothing where it does not say."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"], capture_output=True, text=True, timeout=10
        ).stdout
        return int(told.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def cell(arguments, kind, model, work="", four_bit=False):
    """A cell of this program in a process of its own. Where it cannot be, [`Absent`] says why."""
    command = [sys.executable, "-B", __file__, "cell", kind, "--model", model, "--work", work, "--models", arguments.models]
    command += ["--device", arguments.device, "--threads", arguments.threads, "--launched", time.time(), *(["--four-bit"] if four_bit else [])]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read()
    if process.returncode:
        if "OutOfMemory" in said or "out of memory" in said or process.returncode == -9:
            raise Absent("out of memory")
        last = (said.strip().splitlines() or ["nothing said"])[-1]
        raise Absent(f"failed: {last[:160]}")
    result = json.loads(out.splitlines()[-1])
    if "absent" in result:
        raise Absent(result["absent"])
    return result | {"resident": usage.ru_maxrss * 1024}


def measured(arguments, model, work, packed, four_bit, say):
    """Every kind twice, the second time backwards; what cannot be measured is told once."""
    cells, absent = {}, {}
    kinds = [kind for kind in arguments.kinds.split(",") if kind != "engraft" or arguments.engraft]
    for kind in [*kinds, *reversed(kinds)]:
        if kind in absent:
            continue
        say(f"{model} {work}{' nf4' if four_bit else ''}: {kind}")
        try:
            done = engraft(arguments, model, work, packed, four_bit) if kind == "engraft" else cell(arguments, kind, model, work, four_bit)
            cells.setdefault(kind, []).append(done)
        except Absent as why:
            absent[kind] = str(why)
            cells.pop(kind, None)
    return cells, absent


def row(machine, model, work, four_bit, kind, cells):
    """A kind's numbers."""
    lengths = lengths_of(work)
    seconds = [s for done in cells for s in done["seconds"][WARMUP:]]
    median = statistics.median(seconds)
    allocated = [done["allocated"] for done in cells if done.get("allocated")]
    return {
        "model": model, "work": work, "base": "nf4" if four_bit else "bf16", "kind": kind,
        "tokens_per_second": [sum(lengths) / quantile(seconds, q) for q in (0.9, 0.5, 0.1)],
        "share_of_gemm": arithmetic(model, lengths)["model"] / median / machine["gemm"],
        "share_of_floor": floor_seconds(machine, model, lengths, four_bit) / median,
        "peak_memory": max(allocated) if allocated else max(done["resident"] for done in cells),
        "first_step": statistics.median(done["first_step"] for done in cells),
        "first_loss": cells[0]["losses"][0], "smallest_norm": min(done["smallest_norm"] for done in cells),
    }  # fmt: skip


def table(result):
    """The results as Markdown."""
    lines = [
        f"{result['machine']}, {result['date']}, {result['versions']}. {STEPS} timed steps in each of two processes; r={RANK} on all linears,"
        " every token supervised.",
        "",
        "| Model | Documents | Base | | tokens/s (p10 to p90) | against the best PEFT | F_model of GEMM rate | of the floor | peak memory | first step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for work in result["works"]:
        rows = {row["kind"]: row for row in work["rows"]}
        best = max((row["tokens_per_second"][1] for kind, row in rows.items() if kind.startswith("peft")), default=None)
        losses = [row["first_loss"] for row in rows.values()]
        for kind in KINDS:
            begin = f"| {work['model']} | {work['work']} | {work['base']} | {kind} |"
            if kind in rows:
                of = rows[kind]
                low, middle, high = of["tokens_per_second"]
                against = f"{middle / best:.2f}x" if best else "n/a"
                lines.append(
                    f"{begin} {middle:.0f} ({low:.0f} to {high:.0f}) | {against} | {100 * of['share_of_gemm']:.0f}% |"
                    f" {100 * of['share_of_floor']:.0f}% | {of['peak_memory'] / 2**30:.2f} GiB | {of['first_step']:.1f} s |"
                )
            elif kind in work["absent"]:
                lines.append(f"{begin} n/a: {work['absent'][kind]} | | | | | |")
        if losses and max(losses) - min(losses) > 0.02 * min(losses):
            told = ", ".join(f"{kind} {row['first_loss']:.3f}" for kind, row in rows.items())
            lines.append(f"| | | | losses of the first step differ: {told} | | | | | | |")
    return "\n".join(lines)


def run(arguments):
    """The grid."""
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    arguments.device = "cpu" if arguments.grid == "cpu" else "cuda"
    arguments.models.mkdir(parents=True, exist_ok=True)
    works, versions, name, before = [], "", "", device_memory()
    for model, work, packed, four_bit in GRIDS[arguments.grid]:
        if arguments.only and arguments.only not in f"{model} {work} {'nf4' if four_bit else 'bf16'}":
            continue
        try:
            if not (arguments.models / model / "model.safetensors").exists():
                say(f"making {model}")
                cell(arguments, "model", model)
            machine = cell(arguments, "machine", model, work)
        except Absent as why:
            sys.exit(f"{model} {work}: {why}")
        name, versions = machine["device"], f"torch {machine['torch']}"
        cells, absent = measured(arguments, model, work, packed, four_bit, say)
        rows = [row(machine, model, work, four_bit, kind, done) for kind, done in cells.items()]
        works.append({"model": model, "work": work, "base": "nf4" if four_bit else "bf16", "machine": machine, "rows": rows, "absent": absent})
    result = {
        "date": datetime.date.today().isoformat(), "machine": name, "versions": versions, "device_memory_before": before,
        "warmup": WARMUP, "steps": STEPS, "works": works,
    }  # fmt: skip
    text = table(result)
    print(text)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        say(f"written: {arguments.out}")


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare")
    verb.add_argument("folder", type=pathlib.Path)
    verb = verbs.add_parser("run")
    verb.add_argument("--engraft", type=lambda p: pathlib.Path(p).resolve(), help="the executable; without it only peers run")
    verb.add_argument("--grid", default="gpu", choices=GRIDS)
    verb.add_argument("--only", help="works whose `model documents base` holds this text")
    verb.add_argument("--kinds", default=",".join(KINDS), help="which of them")
    verb.add_argument("--models", type=lambda p: pathlib.Path(p).resolve(), default=HERE / "models", help="where models are made")
    verb.add_argument("--threads", type=int, default=0, help="of the CPU; as each program chooses where it is 0")
    verb.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    verb = verbs.add_parser("cell")
    verb.add_argument("kind", choices=["model", "machine", *PEERS])
    verb.add_argument("--model", required=True)
    verb.add_argument("--work")
    verb.add_argument("--models", type=pathlib.Path, required=True)
    verb.add_argument("--device", required=True)
    verb.add_argument("--threads", type=int, default=0)
    verb.add_argument("--launched", type=float, default=0.0)
    verb.add_argument("--four-bit", action="store_true")
    arguments = parser.parse_args()
    if arguments.verb == "prepare":
        prepare(arguments.folder)
    elif arguments.verb == "run":
        run(arguments)
    else:
        cells = {"model": cell_model, "machine": cell_machine, **PEERS}
        try:
            print(json.dumps(cells[arguments.kind](arguments)))
        except Absent as why:
            print(json.dumps({"absent": str(why)}))


if __name__ == "__main__":
    main()
