"""Speed and memory of engraft beside PEFT + transformers, in one run on one machine: `make bench`.

Same base (bf16), same adapter (r=16 on all linears, fp32), same rows in the same order, same optimizer, no activation
recompute. Every cell is a fresh process; the order is A B C C B A, so that a machine that warms up or slows down hurts
all alike. The machine's own rates (GEMM, attention, copy) are measured before and after, and the floor is the time the
arithmetic of a step would take at those rates:

    P_L = L(2 d H h + 2 d Hk h + 3 d f)     P_h = V d      A = sum over documents of l(l+1)/2
    P_A = L r [(d+Hh) + 2(d+Hk h) + (Hh+d) + 2(d+f) + (f+d)]
    T   = N (4 P_L + 6 P_A) / R_mm + 4 rho N P_h / R_head + 4 L H h A / R_af + 10 L H h A / R_ab + bytes / BW
    bytes = 2 x N L [2 (2d + (H + 2 Hk) h + H h + 2 f) + 4 H]      activations saved once and read once

for N tokens of which the share rho is supervised. A frozen base costs 4 P per token, not 6 P.

Then the quantised base: QLoRA (nf4, quantised scales) beside LoRA, both engraft's, and beside PEFT on bitsandbytes, on the
first set; and the speed of quantising and of making whole again, in bytes read and written a second, beside that of a copy and
beside bitsandbytes.

This file without arguments but the paths runs everything, `--parts` some of it; `--cell` runs one cell and prints its numbers
as JSON.
PEFT is measured twice: at `equal` settings (the same micro-batch, padded to its longest row) and at its `best` here
(rows grouped by length first, so that there is next to no padding; torch's fused AdamW in both).
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
RANK, ALPHA, RATE = 16, 32, 1e-3
QLORA = ["adapter.method=qlora", "quantization={type: nf4, double_quant: true}"]
# A weight of an 8B model's feed-forward, in bf16: far more than any cache holds.
WEIGHT = (14336, 4096)

SETS = {
    "tickets": {
        "file": ROOT / "datasets/tickets/train.parquet",
        "batch": 8,
        "max_length": 256,
        "overrides": [],
    },
    "gsm8k": {
        "file": ROOT.parent / "shared/data/gsm8k/train.parquet",
        "batch": 4,
        "max_length": 512,
        "overrides": [
            "dataset.format=prompt-completion",
            "dataset.columns={prompt: question, completion: answer}",
            "dataset.train_on=completion",
        ],
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# Cells: each runs in a process of its own, so that torch is imported nowhere else.


def encoded_rows(name, model, count):
    """The first `count` rows that fit as (ids, length of the prompt, end of what is supervised)."""
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    limit = SETS[name]["max_length"]
    rows = []
    for row in pq.read_table(SETS[name]["file"]).slice(0, 2 * count).to_pylist():
        if "messages" in row:
            prompt = encode(tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True))
            answer = encode(row["messages"][-1]["content"] + "<|im_end|>")
            tail = encode("\n")
        else:
            prompt, answer, tail = encode(row["question"]), encode(row["answer"] + "<|im_end|>"), []  # the loader's own eos_token is wrong for this GGUF
        ids = prompt + answer + tail
        if len(ids) <= limit:
            rows.append((ids, len(prompt), len(prompt) + len(answer)))
        if len(rows) == count:
            return rows
    sys.exit(f"{name} has fewer than {count} rows; ask for fewer steps")


def cell_rows(arguments):
    """Token counts of every step."""
    batch = SETS[arguments.set]["batch"]
    rows = encoded_rows(arguments.set, arguments.model, batch * (arguments.warmup + arguments.steps))
    steps = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return {
        "tokens": [sum(len(ids) for ids, _, _ in step) for step in steps],
        "trained": [sum(end - begin for _, begin, end in step) for step in steps],
        "attended": [sum(len(ids) * (len(ids) + 1) // 2 for ids, _, _ in step) for step in steps],
    }


def cell_peft(arguments):
    """PEFT + transformers on the set's rows; the time of every step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch = SETS[arguments.set]["batch"]
    count = arguments.warmup + arguments.steps
    rows = encoded_rows(arguments.set, arguments.model, batch * count)
    if arguments.setting == "best":
        # Grouped by length, as transformers' Trainer does on request; the groups mixed, so that the timed ones are typical.
        rows.sort(key=lambda row: len(row[0]))
        steps = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        random.Random(0).shuffle(steps)
    else:
        steps = [rows[i : i + batch] for i in range(0, len(rows), batch)]

    if arguments.setting == "qlora":
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.bfloat16, quantization_config=how, device_map="cpu")
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model.parent, gguf_file=arguments.model.name, dtype=torch.bfloat16)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    times, losses, norms, first = [], [], [], None
    for step in steps:
        begun = time.perf_counter()
        longest = max(len(ids) for ids, _, _ in step)
        ids = torch.zeros(len(step), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, (row, begin, end) in enumerate(step):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            labels[i, begin:end] = ids[i, begin:end]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
        losses.append(loss.item())
        norms.append(norm.item())
        first = first or time.time() - arguments.launched
    assert min(norms) > 0
    return {
        "seconds": times,
        "tokens": [sum(len(ids) for ids, _, _ in step) for step in steps],
        "trained": [sum(end - begin for _, begin, end in step) for step in steps],
        "losses": losses,
        "first_step": first,
        "parameters": sum(p.numel() for p in parameters),
    }


def cell_folder(arguments):
    """Writes the model as a folder of bf16 safetensors: transformers does not quantise a GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model.parent, gguf_file=arguments.model.name, dtype=torch.bfloat16
    )
    # It holds plain numbers now, but is not saved as long as it says where they came from.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(arguments.model.parent, gguf_file=arguments.model.name).save_pretrained(arguments.folder)
    return {}


def cell_codes(arguments):
    """bitsandbytes on a weight that is written for engraft, too; seconds of each repetition."""
    import bitsandbytes.functional as bnb
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    weight = (torch.randn(WEIGHT) * 0.02).bfloat16()
    save_file({"weight": weight}, arguments.folder / "weight.safetensors")
    seconds = {"quantise": [], "dequantise": [], "copy": []}

    def timed(what, run):
        begun = time.perf_counter()
        result = run()
        seconds[what].append(time.perf_counter() - begun)
        return result

    for _ in range(arguments.repeat):
        codes, state = timed("quantise", lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
        timed("dequantise", lambda: bnb.dequantize_4bit(codes, state))  # noqa: B023
        timed("copy", weight.clone)
    return {"numbers": weight.numel(), **seconds}


def cell_machine(arguments):
    """The rates of this machine at the model's shapes, and the model's sizes."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(arguments.threads)
    config = AutoConfig.from_pretrained(arguments.model.parent, gguf_file=arguments.model.name)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "L": config.num_hidden_layers, "d": config.hidden_size, "f": config.intermediate_size, "V": config.vocab_size,
        "H": config.num_attention_heads, "Hk": config.num_key_value_heads, "h": head, "r": RANK,
    }  # fmt: skip

    def best(work, run, seconds=1.5):
        """Work units a second, of the fastest of many runs."""
        run()
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            begun = time.perf_counter()
            run()
            fastest = min(fastest, time.perf_counter() - begun)
        return work / fastest

    tokens, d, f = 1024, sizes["d"], sizes["f"]
    shapes = [(d, sizes["H"] * head), (d, sizes["Hk"] * head), (d, f), (f, d)]
    rates, flops, spent = {}, 0.0, 0.0
    for rows, columns in shapes:
        x = torch.randn(tokens, rows).bfloat16()
        w = torch.randn(columns, rows).bfloat16()
        rate = best(2 * tokens * rows * columns, lambda: torch.nn.functional.linear(x, w))  # noqa: B023
        rates[f"{tokens}x{rows}x{columns}"] = rate
        # How often a layer has this shape: q and o, k and v, gate and up, down.
        share = {(d, f): 2, (f, d): 1}.get((rows, columns), 2) * 2 * tokens * rows * columns
        flops, spent = flops + share, spent + share / rate
    # The head sees only the supervised rows of a step, some 256 of them.
    x, w = torch.randn(256, d).bfloat16(), torch.randn(sizes["V"], d).bfloat16()
    head_rate = best(2 * 256 * d * sizes["V"], lambda: torch.nn.functional.linear(x, w))
    length = 128
    q, k, v = (torch.randn(8, sizes["H"], length, head).bfloat16().requires_grad_() for _ in range(3))
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    pairs = 8 * length * (length + 1) / 2 * sizes["H"] * head
    with torch.no_grad():
        forward = best(4 * pairs, attend)
    out = attend()
    upstream = torch.randn_like(out)
    backward = best(10 * pairs, lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True))
    block = torch.empty(64 << 20, dtype=torch.uint8)
    copy = best(2 * block.numel(), block.clone)
    return {
        "sizes": sizes, "gemm": flops / spent, "gemm_head": head_rate, "gemm_by_shape": rates, "attention_forward": forward,
        "attention_backward": backward, "copy": copy, "torch": torch.__version__,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The parent: stdlib only and small, because a child's peak memory is measured from the moment it is forked.


def child(command):
    """Runs a command to its end; its output, and its peak resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}\n{errors.read()}")
    return out, usage.ru_maxrss * 1024


def watched(command, metrics, seconds=float("inf"), environment=None):
    """Runs `engraft train` to its end: the exit code, what was said, seconds to the first logged step, peak resident bytes.

    A run that takes longer than `seconds` is stopped: TimeoutError.
    """
    with tempfile.TemporaryFile("w+") as log:
        launched, first = time.time(), None
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if first is None and metrics.exists() and '"loss"' in metrics.read_text():
                    first = time.time() - launched
                if pid:
                    break
                if time.time() - launched > seconds:
                    raise TimeoutError
                time.sleep(0.02)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return process.returncode, log.read(), first, usage.ru_maxrss * 1024


def cell(arguments, name, **options):
    """One of the Python cells in a process of its own."""
    command = [sys.executable, "-B", __file__, "--cell", name, "--model", arguments.model, "--threads", arguments.threads]
    command += ["--steps", arguments.steps, "--warmup", arguments.warmup, "--repeat", arguments.repeat, "--launched", time.time()]
    for key, value in options.items():
        command += [f"--{key}", value]
    out, memory = child(list(map(str, command)))
    return json.loads(out.splitlines()[-1]) | {"peak_memory": memory}


def engraft(arguments, name, *more):
    """`engraft train` on the set's rows, with more settings, read from its metrics."""
    chosen = SETS[name]
    rows = chosen["batch"] * (arguments.warmup + arguments.steps)
    with tempfile.TemporaryDirectory(prefix="engraft-bench-") as folder:
        run = pathlib.Path(folder) / "run"
        settings = [
            f"base_model={arguments.model}", "dtype=bf16", "device=cpu",
            f"adapter.r={RANK}", f"adapter.lora_alpha={ALPHA}", "adapter.target_modules=all-linear",
            f"dataset.train={chosen['file']}", "dataset.eval=null", "dataset.shuffle=false", "dataset.packing=false",
            f"dataset.max_length={chosen['max_length']}", "dataset.overlong=drop", *chosen["overrides"],
            f"training.max_steps={arguments.warmup + arguments.steps}", f"training.micro_batch_size={chosen['batch']}",
            "training.gradient_accumulation_steps=1", f"training.learning_rate={RATE}", "training.lr_scheduler=constant",
            "training.warmup_steps=0", "training.recompute=none", "training.logging_steps=1",
            f"training.threads={arguments.threads}", f"output.dir={run}", "output.tensorboard=false", *more,
        ]  # fmt: skip
        command = [str(arguments.engraft), "train", str(ROOT / "recipes/quickstart.yaml")]
        command += [part for setting in settings for part in ("--set", setting)]
        metrics = run / "metrics.jsonl"
        code, said, first, peak = watched(command, metrics)
        if code:
            sys.exit(f"{' '.join(command)}\nended with {code}\n{said}")
        logged = [m for m in map(json.loads, metrics.read_text().splitlines()) if "loss" in m]
    if len(logged) != arguments.warmup + arguments.steps:
        sys.exit(f"engraft logged {len(logged)} steps on {rows} rows, expected {arguments.warmup + arguments.steps}")
    elapsed = [m["elapsed_seconds"] for m in logged]
    return {
        # The first step's own time is not known from outside; it is a warm-up step anyway.
        "seconds": [elapsed[0]] + [b - a for a, b in zip(elapsed, elapsed[1:])],
        "tokens": per_step([m["tokens"] for m in logged]),
        "trained": per_step([m["trained_tokens"] for m in logged]),
        "losses": [m["loss"] for m in logged],
        "first_step": first,
        "peak_memory": peak,
    }


def quantised_base(arguments, name, say):
    """QLoRA beside LoRA and beside PEFT on bitsandbytes, on the rows of a set: every kind twice, the second time backwards."""
    with tempfile.TemporaryDirectory(prefix="engraft-bench-") as folder:
        cell(arguments, "folder", folder=folder)
        base = f"base_model={folder}"
        kinds = {"peft-qlora": lambda: cell(arguments, "peft", set=name, setting="qlora", folder=folder)}
        if arguments.engraft:
            kinds |= {
                "engraft-lora": lambda: engraft(arguments, name, base),
                "engraft-qlora": lambda: engraft(arguments, name, base, *QLORA),
                "engraft-qlora-never": lambda: engraft(arguments, name, base, *QLORA, "quantization.cache_dequantized=never"),
            }
        cells = {kind: [] for kind in kinds}
        for kind in [*kinds, *reversed(kinds)]:
            say(f"{name}: {kind}")
            cells[kind].append(kinds[kind]())
    return cells


# Bytes of a number's code; in nf4 with the scales of blocks of 64 in eight bits, and theirs in fp32. A row's scale is next to nothing.
FORMS = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1, "fp8": 1}


def codes(arguments):
    """The best rates of quantising and making whole, and of a copy, in bytes read and written a second."""
    with tempfile.TemporaryDirectory(prefix="engraft-bench-") as folder:
        measured = {"bitsandbytes": [cell(arguments, "codes", folder=folder)]}
        for form in FORMS if arguments.engraft else []:
            command = [arguments.engraft, "codes", "--tensors", pathlib.Path(folder) / "weight.safetensors", "--type", form]
            command += ["--repeat", arguments.repeat, "--threads", arguments.threads]
            name = "engraft" if form == "nf4" else f"engraft, {form}"
            measured[name] = [json.loads(child(list(map(str, command)))[0]) for _ in range(2)]
            if form == "nf4":
                measured["bitsandbytes"].append(cell(arguments, "codes", folder=folder))

    def rates(kind, runs):
        codes = FORMS[kind.partition(", ")[2] or "nf4"]
        seconds = {what: min(s for run in runs for s in run[what]) for what in runs[0] if what != "numbers"}
        return {what: (4 if what == "copy" else 2 + codes) * runs[0]["numbers"] / took for what, took in seconds.items()}

    return {kind: rates(kind, runs) for kind, runs in measured.items()}


def per_step(counts):
    """Counts of each step, from counts that run on or that do not."""
    running = all(b > a for a, b in zip(counts, counts[1:])) and counts[-1] > counts[0] * len(counts) / 4
    return [b - a for a, b in zip([0, *counts], counts)] if running else counts


def floor_seconds(machine, tokens, trained, attended):
    """The time the arithmetic of these tokens takes at the machine's rates (the formulas at the top)."""
    L, d, f, V, H, Hk, h, r = (machine["sizes"][k] for k in ("L", "d", "f", "V", "H", "Hk", "h", "r"))
    p_l = L * (2 * d * H * h + 2 * d * Hk * h + 3 * d * f)
    p_a = L * r * ((d + H * h) + 2 * (d + Hk * h) + (H * h + d) + 2 * (d + f) + (f + d))
    moved = 2 * tokens * L * (2 * (2 * d + (H + 2 * Hk) * h + H * h + 2 * f) + 4 * H)
    return (
        tokens * (4 * p_l + 6 * p_a) / machine["gemm"]
        + trained * 4 * V * d / machine["gemm_head"]
        + 4 * L * H * h * attended / machine["attention_forward"]
        + 10 * L * H * h * attended / machine["attention_backward"]
        + moved / machine["copy"]
    )


def quantile(values, q):
    """The q-quantile, linear between neighbours."""
    values = sorted(values)
    at = q * (len(values) - 1)
    low = int(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def summary(cells, warmup):
    """Rates of the timed steps of all cells of one kind; quantiles over steps."""
    steps = [s for c in cells for s in list(zip(c["seconds"], c["tokens"], c["trained"]))[warmup:]]
    seconds = sum(s for s, _, _ in steps)
    rates = [trained / s for s, _, trained in steps]
    return {
        "tokens_per_second": sum(t for _, t, _ in steps) / seconds,
        "trained_per_second": sum(t for _, _, t in steps) / seconds,
        "trained_p10_p50_p90": [quantile(rates, q) for q in (0.1, 0.5, 0.9)],
        "peak_memory": max(c["peak_memory"] for c in cells),
        "first_step": statistics.median(c["first_step"] for c in cells),
        "first_loss": cells[0]["losses"][0],
    }


def describe_machine(threads):
    """The machine in words."""
    model = platform.processor() or platform.machine()
    text = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    if found := re.search(r"model name\s*:\s*(.+)", text):
        model = found.group(1).strip()
    extra = "".join(f", {flag}" for flag in ("avx512_bf16", "amx_bf16") if flag in text)
    return f"{model}, {threads} threads{extra}"


def table(result):
    """The results as Markdown."""
    machine = result["machine"]
    lines = [
        f"{result['machine_name']}, {result['date']}: bf16 GEMM {machine['gemm'] / 1e9:.0f} GFLOP/s"
        f" (head {machine['gemm_head'] / 1e9:.0f}), attention"
        f" {machine['attention_forward'] / 1e9:.0f} forward and {machine['attention_backward'] / 1e9:.0f} GFLOP/s backward,"
        f" copy {machine['copy'] / 1e9:.1f} GB/s. SmolLM2-135M, bf16, r=16 on all linears, no recompute;"
        f" {result['steps']} timed steps in each of two processes.",
        "",
        "| Rows | | trained tokens/s (p10 to p90) | tokens/s | against PEFT's best | of the floor | peak memory | first step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"peft-equal": "PEFT + transformers, equal settings", "peft-best": "PEFT + transformers, its best", "engraft": "engraft"}
    for name, measured in result["sets"].items():
        for kind, label in names.items():
            if kind not in measured:
                continue
            s = measured[kind]
            low, _, high = s["trained_p10_p50_p90"]
            lines.append(
                f"| {name} | {label} | {s['trained_per_second']:.0f} ({low:.0f} to {high:.0f}) | {s['tokens_per_second']:.0f} |"
                f" {s['trained_per_second'] / measured['peft-best']['trained_per_second']:.2f}x |"
                f" {100 * s['tokens_per_second'] / measured['floor_tokens_per_second']:.0f}% |"
                f" {s['peak_memory'] / 2**30:.2f} GiB | {s['first_step']:.1f} s |"
            )
    return "\n".join(lines)


def table_of_quantised(measured, warmup):
    """QLoRA's speed and memory as Markdown."""
    names = {
        "peft-qlora": "PEFT + bitsandbytes, QLoRA",
        "engraft-lora": "engraft, LoRA",
        "engraft-qlora": "engraft, QLoRA",
        "engraft-qlora-never": "engraft, QLoRA, nothing kept whole",
    }
    of = {kind: summary(cells, warmup) for kind, cells in measured.items()}
    lines = ["| Tickets, nf4 | trained tokens/s (p10 to p90) | against LoRA | against PEFT + bitsandbytes | peak memory |", "|---|---|---|---|---|"]
    for kind, label in names.items():
        if kind in of:
            low, _, high = of[kind]["trained_p10_p50_p90"]
            ratio = lambda other: f"{of[kind]['trained_per_second'] / of[other]['trained_per_second']:.2f}x" if other in of else ""  # noqa: B023, E731
            lines.append(
                f"| {label} | {of[kind]['trained_per_second']:.0f} ({low:.0f} to {high:.0f}) | {ratio('engraft-lora')} |"
                f" {ratio('peft-qlora')} | {of[kind]['peak_memory'] / 2**30:.2f} GiB |"
            )
    return "\n".join(lines)


def table_of_codes(rates):
    """The speed of quantising and of making whole as Markdown."""
    heads = ["quantise, GB/s", "make whole, GB/s", "copy, GB/s", "make whole against copy", "against libtorch's operations"]
    lines = [f"| nf4, quantised scales, bf16 | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for kind, of in rates.items():
        numbers = " | ".join(f"{of[what] / 1e9:.2f}" for what in ("quantise", "dequantise", "copy"))
        twin = " and ".join(f"{of[what] / of[f'plain_{what}']:.1f}x" for what in ("quantise", "dequantise") if f"plain_{what}" in of)
        lines.append(f"| {kind} | {numbers} | {100 * of['dequantise'] / of['copy']:.0f}% | {twin} |")
    return "\n".join(lines)


def insert(path, text):
    """Puts the table between the README's markers."""
    old = path.read_text()
    new, count = re.subn(r"<!-- bench -->.*?<!-- /bench -->", lambda _: f"<!-- bench -->\n{text}\n<!-- /bench -->", old, flags=re.S)
    if not count:
        sys.exit(f"{path} has no <!-- bench --> ... <!-- /bench --> to put the table between")
    path.write_text(new)


def speed(arguments, say):
    """The sets: both peers and engraft, every kind twice, the second time backwards; and the machine's rates."""
    say("machine rates")
    machine = cell(arguments, "machine")
    sets, raw = {}, {}
    for name in arguments.sets.split(","):
        if not SETS[name]["file"].exists():
            say(f"{name}: {SETS[name]['file'].name} is not there, left out")
            continue
        counts = cell(arguments, "rows", set=name)
        kinds = ["peft-equal", "peft-best", *(["engraft"] if arguments.engraft else [])]
        cells = {kind: [] for kind in kinds}
        for kind in kinds + kinds[::-1]:
            say(f"{name}: {kind}")
            done = engraft(arguments, name) if kind == "engraft" else cell(arguments, "peft", set=name, setting=kind.removeprefix("peft-"))
            cells[kind].append(done)
        if "engraft" in cells and sum(cells["engraft"][0]["trained"]) != sum(counts["trained"]):
            say(f"note: engraft trained {sum(cells['engraft'][0]['trained'])} tokens, the peer {sum(counts['trained'])}")
        raw[name] = cells
        sets[name] = {kind: summary(done, arguments.warmup) for kind, done in cells.items()}
        timed = {key: sum(counts[key][arguments.warmup :]) for key in ("tokens", "trained", "attended")}
        sets[name]["supervised_share"] = timed["trained"] / timed["tokens"]
        sets[name]["counts"] = timed
    say("machine rates again")
    again = cell(arguments, "machine")
    # The better of the two: a floor is what the machine can do, not what it did while something else ran.
    for rate in ("gemm", "gemm_head", "attention_forward", "attention_backward", "copy"):
        machine[rate] = max(machine[rate], again[rate])
    machine["gemm_by_shape"] = {shape: max(rate, again["gemm_by_shape"][shape]) for shape, rate in machine["gemm_by_shape"].items()}
    for measured in sets.values():
        timed = measured["counts"]
        measured["floor_tokens_per_second"] = timed["tokens"] / floor_seconds(machine, timed["tokens"], timed["trained"], timed["attended"])

    return {"machine": machine, "sets": sets, "cells": raw}


def main():
    """Every cell, in order; then the table and the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", type=lambda p: pathlib.Path(p).resolve(), help="the executable; without it only the peer runs")
    parser.add_argument("--model", required=True, type=lambda p: pathlib.Path(p).resolve(), help="the demo model's GGUF")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=30, help="timed steps in each process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sets", default="tickets,gsm8k", help="which sets; one that is not there is left out")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results", help="folder for the results")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--parts", default="speed,qlora,codes", help="what is measured")
    parser.add_argument("--repeat", type=int, default=20, help="repetitions of quantising and making whole")
    parser.add_argument("--cell", choices=["machine", "rows", "peft", "folder", "codes"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        cells = {"machine": cell_machine, "rows": cell_rows, "peft": cell_peft, "folder": cell_folder, "codes": cell_codes}
        print(json.dumps(cells[arguments.cell](arguments)))
        return

    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    parts = arguments.parts.split(",")
    result = {"date": datetime.date.today().isoformat(), "machine_name": describe_machine(arguments.threads), "warmup": arguments.warmup, "steps": arguments.steps}
    tables = []
    if "speed" in parts:
        result |= speed(arguments, say)
        tables.append(table(result))
    if "qlora" in parts:
        result["quantised_base"] = quantised_base(arguments, arguments.sets.split(",")[0], say)
        tables.append(table_of_quantised(result["quantised_base"], arguments.warmup))
    if "codes" in parts:
        say("quantising and making whole")
        result["codes"] = codes(arguments)
        tables.append(table_of_codes(result["codes"]))
    text = "\n\n".join(tables)
    print(text)
    slug = re.sub(r"[^a-z0-9]+", "-", result["machine_name"].lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{result['date']}-{slug}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"written: {path}")
    if arguments.readme:
        insert(ROOT / "README.md", text)


if __name__ == "__main__":
    main()
