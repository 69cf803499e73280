"""Speed per FLOP of the model families beside Llama, at equal sizes: `make bench FAMILY=qwen3`, or FAMILY=all.

The models are random, made of the variants of tests/python/families.py at realistic sizes: heads of 64, the same width, depth,
vocabulary and rows for all. engraft trains r=16 on all linears of each, in processes that take turns with those of Llama
(A B B A), so that whatever else the machine does hurts both. Every step has the same rows, of the lengths in ROWS, whose second
halves are trained, so that all steps cost the same and the fastest quarter of them is what the machine can do. Per family:

    FLOP = 4 P N + 6 A N + 4 P_h S + 14 attention + delta + streams + index
    P    numbers in the matrices a token meets: of experts those that it is sent to; A likewise of the adapter
    P_h  numbers in the head; N tokens, of which S are trained
    attention = over layers: heads x (query head + value head) / 2 x pairs of tokens that see each other
    streams   = 6 N D (2 L (M M + 2 M) + M) where a token has M copies of its stream, of width D: each half of each of L layers reads
                one of them, writes to all and mixes all; the head reads one more
    index     = over layers that choose what they attend to: 2 x heads x width x pairs that it is chosen of, forward alone
    delta     = over delta-net layers: N x (value heads x (22 p h + 14 C h + 2/3 C^2) + key heads x 14 C p)

Backward through a frozen matrix costs one product, through an adapter two; attention has two products forward, five backward.
A delta-net with keys of p and values of h goes by chunks of C tokens (arXiv:2412.06464): what is learned, read and written, of
each 2 p h or 2 C h; keys with keys and queries with keys; the triangle's inverse. Of the two, as of attention, what backward has
to make again is counted, too.

A family is slow where its FLOP per second of the processors' time, of all threads, are less than 0.85 of Llama's: on a machine
that has other work, that is steadier than by the clock, which is shown beside it. Llama beside itself shows what the machine's
noise is. Families that engraft does not know are named and left out; of models that see or hear, the language model is measured
under its own name.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from run import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests/python"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import families  # noqa: E402 (offline before transformers is imported)
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

RANK, VOCABULARY, HEAD = 16, 16384, 64
BOUND = 0.85
# A family that seems slower is measured again, Llama beside it as ever, in so many times as many rounds: memory that other programs
# are busy with slows models of many experts for minutes.
AGAIN = 4
# Of 1,024 tokens; their second halves are trained.
ROWS = [512, 232, 128, 88, 64]
# Longer than some documents, shorter than others, as the fixtures' windows are.
WINDOW = 256
# Tokens of a delta-net's chunk.
CHUNK = 64
EXPERTS, CHOSEN = 8, 2
# What rotates of a head where not all of it does.
PART = 0.5
# How wide the feed-forward of a token is, by the width of the stream; without a gate it has two matrices instead of three, and as
# many numbers. Experts share it.
WIDER, WIDER_WITHOUT_GATE = 8 / 3, 4
WITHOUT_GATE = {"gpt_neox", "phi", "starcoder2", "falcon"}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def realistic(variant, hidden, layers):
    """The variant's fields at the sizes of this bench."""
    options = families.configuration(variant, None, layers)
    of = {**families.COMMON, **variant.options}
    heads, wide = hidden // HEAD, round(hidden * (WIDER_WITHOUT_GATE if variant.model_type in WITHOUT_GATE else WIDER) / 64) * 64
    groups = 3 if heads % 3 == 0 else 2 if heads % 2 == 0 else 1

    def kv_heads(was, tiny_heads):
        return was if was == 1 and (of.get("multi_query") or "o_groups" in of) else heads if was == tiny_heads else heads // groups

    tiny_heads = options.get("num_attention_heads", 0)
    sizes = {
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": hidden, "intermediate_size": wide,
        "intermediate_size_mlp": wide, "ffn_hidden_size": wide, "num_attention_heads": heads, "n_head": heads, "head_dim": HEAD,
        "global_head_dim": HEAD, "query_pre_attn_scalar": HEAD, "max_position_embeddings": 2048, "sliding_window": WINDOW,
        "attention_chunk_size": WINDOW, "original_max_position_embeddings": 2048, "hidden_size_per_layer_input": 64,
        # Latent attention, its parts of a head as DeepSeek's: two thirds without position.
        "q_lora_rank": hidden // 2, "kv_lora_rank": hidden // 4, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD // 2,
        "v_head_dim": HEAD, "o_lora_rank": hidden // 4,
        # Delta nets: half as many key heads as value heads.
        "linear_num_key_heads": max(heads // 2, 1), "linear_num_value_heads": 2 * max(heads // 2, 1),
        "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD,
        "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
        "top_k_experts": CHOSEN, "n_group": 1, "topk_group": 1, "moe_intermediate_size": wide // CHOSEN,
        "shared_expert_intermediate_size": wide // CHOSEN, "index_n_heads": heads, "index_head_dim": HEAD, "index_topk": 64,
    }  # fmt: skip
    experts_take_it = "moe_intermediate_size" not in options and {"num_local_experts", "num_experts"} & options.keys()
    if experts_take_it:
        sizes["intermediate_size"] = wide // CHOSEN
    for key, was in options.items():
        if key in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"):
            options[key] = kv_heads(was, tiny_heads)
        elif key in sizes and was not in (0, None):
            options[key] = sizes[key]
    if "n_group" in options and of["n_group"] > 1:
        options |= {"n_group": 4, "topk_group": 2}
    if "first_k_dense_replace" in of and of["first_k_dense_replace"] >= of["num_hidden_layers"]:
        options["first_k_dense_replace"] = layers
    for key in ("partial_rotary_factor", "rotary_pct"):
        options |= {key: PART} if options.get(key, 1.0) < 1.0 else {}
    rotated = round(HEAD * options.get("partial_rotary_factor", 1.0))
    for key in ("rope_scaling", "rope_parameters"):
        options[key] = scaled(options.get(key), options.get("qk_rope_head_dim", rotated))
        if options[key] is None:
            options.pop(key)
    return options


def scaled(rope, rotated):
    """Rotary scaling for heads of this bench."""
    if not isinstance(rope, dict):
        return rope
    rope = {key: scaled(value, rotated) if isinstance(value, dict) else value for key, value in rope.items()}
    for key in ("short_factor", "long_factor"):
        if key in rope:
            rope[key] = [1.0 + i / rotated for i in range(rotated // 2)]
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = 2048
    if rope.get("partial_rotary_factor", 1.0) < 1.0:
        rope["partial_rotary_factor"], rotated = PART, round(HEAD * PART)
    if "mrope_section" in rope:
        third = rotated // 2 // 3
        rope["mrope_section"] = [rotated // 2 - 2 * third, third, third]
    return rope


def write_model(variant, options, folder):
    """A checkpoint of random bf16 weights, with a tokenizer of bytes."""
    config = AutoConfig.for_model(variant.model_type, **copy.deepcopy(options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **families.how(variant))
    tensors = families.checkpoint_of(variant, model, folder)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    written = families.published(variant, model.config, json.loads((folder / "config.json").read_text()), options)
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "tests/fixtures/tokenizer/bytes" / name).read_bytes())
    return model.config


def write_rows(lengths, steps, path):
    """A dataset whose every step has rows of these lengths: a character is a token, and each row has one more, its end."""
    row = lambda n: {"prompt": "Q" * (n - n // 2), "completion": "Z" * (n // 2 - 1)}  # noqa: E731
    pq.write_table(pa.Table.from_pylist([row(n) for _ in range(steps) for n in lengths]), path)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def shapes(path):
    """(name, shape) of a safetensors file's tensors."""
    with safe_open(path, "pt") as file:
        return [(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118 (not a dict)


def met(name, shape, config):
    """How many of a matrix's numbers a token is multiplied with."""
    if len(shape) < 2 or "norm" in name:
        return 0
    count = math.prod(shape)
    if re.search(r"\.experts(\.|$)", name):
        experts = next(getattr(config, k) for k in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(config, k, None))
        chosen = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
        return count * chosen / experts
    return count


EMBEDDING = r"(embed_tokens|embed_tokens_per_layer|word_embeddings|embed_in|embed)\.weight$"
HEAD_NAME = r"(^|\.)(lm_head|embed_out|head)\.weight$"


def pairs(length, window, chunk):
    """Pairs of tokens of a document that see each other."""
    if chunk:
        return sum(pairs(min(chunk, length - at), None, None) for at in range(0, length, chunk))
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


# Attention to a window of tokens, and to entries that windows of earlier ones are made into.
ENTRIES = ("compressed_sparse_attention", "heavily_compressed_attention")


def entries(length, rate, most):
    """Pairs of a document's tokens and of the entries that each looks at: those complete before it, or the best of them."""
    return sum(min((at + 1) // rate, most or length) for at in range(length))


def flops(config, model, adapter, lengths):
    """Of a step, by part."""
    tokens, trained = sum(lengths), sum(n // 2 for n in lengths)
    base = sum(met(n, s, config) for n, s in shapes(model) if not re.search(EMBEDDING, n) and not re.search(HEAD_NAME, n))
    low_rank = sum(met(n, s, config) for n, s in shapes(adapter))
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    query, value = head, head
    if getattr(config, "kv_lora_rank", None):
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    attention = delta = index = 0
    for layer in range(layers):
        kind = types[layer] if types else "sliding_attention" if window else "full_attention"
        if kind == "linear_attention":
            key, value_size = config.linear_key_head_dim, config.linear_value_head_dim
            of_values = 22 * key * value_size + 14 * CHUNK * value_size + 2 / 3 * CHUNK**2
            delta += tokens * (config.linear_num_value_heads * of_values + config.linear_num_key_heads * 14 * CHUNK * key)
            continue
        seen = window if kind == "sliding_attention" else None
        chunk = config.attention_chunk_size if kind == "chunked_attention" else None
        own = 0
        if kind in ENTRIES:
            seen, rate = window, config.compress_rates[kind]
            most = config.index_topk if kind == "compressed_sparse_attention" else None
            own = sum(entries(n, rate, most) for n in lengths)
            if most:
                index += 2 * config.index_n_heads * config.index_head_dim * sum(entries(n, rate, None) for n in lengths)
        attention += heads * (query + value) / 2 * (own + sum(pairs(n, seen, chunk) for n in lengths))
    copies = getattr(config, "hc_mult", 0)
    mixed = 2 * layers * (copies * copies + 2 * copies) + copies
    if getattr(config, "layer_sharing", False):  # blocks are gone through twice
        base, low_rank, attention = 2 * base, 2 * low_rank, 2 * attention
    return {
        "matrices": 4 * base * tokens, "adapter": 6 * low_rank * tokens, "head": 4 * config.vocab_size * hidden * trained,
        "attention": 14 * attention, "delta": delta, "streams": 6 * tokens * hidden * mixed, "index": index,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class Unknown(Exception):
    """engraft does not know this family."""


@dataclasses.dataclass
class Steps:
    """Seconds of every timed step, by the clock and by the processors."""

    clock: list = dataclasses.field(default_factory=list)
    processors: list = dataclasses.field(default_factory=list)

    def add(self, more):
        """Those of one more process."""
        self.clock += more.clock
        self.processors += more.processors


def processor_seconds(process):
    """Of all its threads, in user and kernel, so far."""
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_logged(metrics):
    """What a run has written of its steps so far, whole lines only."""
    text = metrics.read_text() if metrics.exists() else ""
    return [m for m in map(json.loads, text[: text.rfind("\n") + 1].splitlines()) if "loss" in m]


def watch(command, metrics):
    """Runs a command to its end; its errors, and the processors' seconds when each step was logged."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        seconds, size = [], 0
        while process.poll() is None:
            now = metrics.stat().st_size if metrics.exists() else 0
            if now != size:
                spent, size = processor_seconds(process), now
                seconds += [spent] * (len(steps_logged(metrics)) - len(seconds))
            time.sleep(0.003)
        errors.seek(0)
        return errors.read() if process.returncode else None, seconds


def train(arguments, model, rows, lengths, run):
    """The timed steps of one process."""
    count = arguments.warmup + arguments.steps
    settings = [
        f"base_model={model}", f"dtype={arguments.dtype}", "device=cpu", f"adapter.r={RANK}", f"adapter.lora_alpha={2 * RANK}",
        "adapter.target_modules=all-linear", f"dataset.train={rows}", "dataset.eval=null", "dataset.shuffle=false",
        "dataset.format=prompt-completion", "dataset.train_on=completion", f"dataset.max_length={max(lengths)}",
        f"training.max_steps={count}", f"training.micro_batch_size={len(lengths)}", "training.learning_rate=1e-4",
        "training.warmup_steps=0", "training.recompute=none", "training.logging_steps=1", "training.save_steps=null",
        f"training.threads={arguments.threads}", f"output.dir={run}", "output.tensorboard=false", "dataset.packing=false",
    ]  # fmt: skip
    command = [str(arguments.engraft), "train", str(ROOT / "recipes/quickstart.yaml"), "--overwrite"]
    command += [part for setting in settings for part in ("--set", setting)]
    metrics = run / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    errors, processors = watch(command, metrics)
    if errors is not None:
        if "not supported" in errors or "unsupported" in errors or "not understood" in errors:
            raise Unknown(next(line for line in errors.splitlines() if "error" in line))
        sys.exit(f"{' '.join(command)}\n{errors}")
    logged = steps_logged(metrics)
    tokens = logged[-1]["tokens"]
    if len(logged) != count or len(processors) < count - 1 or tokens != count * sum(lengths):
        sys.exit(f"{model.name}: {len(logged)} steps of {tokens} tokens, expected {count} of {count * sum(lengths)} in all")
    between = lambda times: [b - a for a, b in zip(times, times[1:])][arguments.warmup - 1 :]  # noqa: E731
    return Steps(between([m["elapsed_seconds"] for m in logged]), between(processors))


def fastest(seconds):
    """Mean of the fastest quarter."""
    return statistics.mean(sorted(seconds)[: max(len(seconds) // 4, 1)])


class Contender:
    """A family's model on the disk and what was measured with it."""

    def __init__(self, name, arguments, work):
        self.name, self.folder = name, work / name
        self.folder.mkdir()
        variant = families.VARIANTS[name]
        options = realistic(variant, arguments.hidden, arguments.layers)
        self.config = write_model(variant, options, self.folder)
        self.run = work / f"{name}-run"
        self.steps = Steps()

    def measure(self, arguments, rows, lengths):
        """One more process."""
        self.steps.add(train(arguments, self.folder, rows, lengths, self.run))
        self.flops = flops(self.config, self.folder / "model.safetensors", self.run / "adapter/adapter_model.safetensors", lengths)


def compare(name, llama, arguments, work, rows, lengths):
    """One family's row of the table, or None where engraft does not know it; measured for longer where it seems slow."""
    row = once(name, llama, arguments, work, rows, lengths, arguments.rounds)
    if row and row["ratio"] < BOUND:
        row = once(name, llama, arguments, work, rows, lengths, AGAIN * arguments.rounds)
    return row


def once(name, llama, arguments, work, rows, lengths, rounds):
    """The row of `rounds` rounds."""
    llama.steps = Steps()
    family = Contender(name, arguments, work) if name != llama.name else copy.copy(llama)
    family.steps = Steps()
    try:
        for turn in [llama, family, family, llama] * rounds:
            turn.measure(arguments, rows, lengths)
    except Unknown as unknown:
        print(f"  --  {name}: {unknown}", flush=True)
        return None
    finally:
        if family.folder != llama.folder:
            shutil.rmtree(family.folder)
    parts, of_llama = family.flops, sum(llama.flops.values())
    flop = sum(parts.values())
    rate = lambda seconds, count: count / fastest(seconds)  # noqa: E731
    row = {
        "family": name, "rounds": rounds, "gflop": flop / 1e9, "parts": parts,
        "milliseconds": 1e3 * fastest(family.steps.clock), "llama_milliseconds": 1e3 * fastest(llama.steps.clock),
        "processor_milliseconds": 1e3 * fastest(family.steps.processors),
        "llama_processor_milliseconds": 1e3 * fastest(llama.steps.processors),
        "ratio": rate(family.steps.processors, flop) / rate(llama.steps.processors, of_llama),
        "ratio_by_clock": rate(family.steps.clock, flop) / rate(llama.steps.clock, of_llama),
    }  # fmt: skip
    print(line(row), flush=True)
    return row


def line(row):
    """A row for a person."""
    return (
        f"{'ok  ' if row['ratio'] >= BOUND else 'SLOW'}  {row['family']:22} {row['gflop']:7.1f} GFLOP"
        f" {row['processor_milliseconds']:7.0f} ms of processors, {row['milliseconds']:6.0f} by the clock,"
        f" beside {row['llama_processor_milliseconds']:.0f} and {row['llama_milliseconds']:.0f}:"
        f" {row['ratio']:.2f} of llama's speed per FLOP, {row['ratio_by_clock']:.2f} by the clock"
    )


def main():
    """Every family asked for, beside Llama."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve(), help="the executable")
    parser.add_argument("--family", required=True, help="model types or variants of tests/python/families.py, or all")
    parser.add_argument("--hidden", type=int, default=576, help="width of the stream, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="of base and activations")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=8, help="timed steps in each process")
    parser.add_argument("--rounds", type=int, default=1, help="of four processes each: llama, the family twice, llama")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    asked = set(arguments.family.split(","))
    chosen = [n for n, v in families.VARIANTS.items() if asked & {"all", n, v.model_type} and not v.parts]
    if unknown := {a for a in asked if a != "all" and not any(a in (n, v.model_type) for n, v in families.VARIANTS.items())}:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(families.VARIANTS)}")
    if arguments.hidden % HEAD or arguments.hidden < HEAD:
        parser.error(f"--hidden {arguments.hidden}: heads are {HEAD} wide, take a multiple")
    families.transformers.utils.logging.disable_progress_bar()
    lengths = [n * arguments.tokens // sum(ROWS) for n in ROWS]
    machine = describe_machine(arguments.threads)
    print(f"{machine}: width {arguments.hidden}, {arguments.layers} layers, {sum(lengths)} tokens a step, {arguments.dtype}", flush=True)
    with tempfile.TemporaryDirectory(prefix="engraft-bench-") as work:
        work = pathlib.Path(work)
        rows = work / "rows.parquet"
        write_rows(lengths, arguments.warmup + arguments.steps, rows)
        llama = Contender("llama", arguments, work)
        table = [compare(name, llama, arguments, work, rows, lengths) for name in chosen]
    table = [row for row in table if row]
    if arguments.out:
        settings = {k: getattr(arguments, k) for k in ("hidden", "layers", "tokens", "dtype", "warmup", "steps", "rounds")}
        result = {"date": datetime.date.today().isoformat(), "machine_name": machine, **settings, "families": table}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    slow = [row["family"] for row in table if row["ratio"] < BOUND]
    print(f"{len(table) - len(slow)} of {len(table)} are at least {BOUND} as fast per FLOP as Llama")
    if slow:
        sys.exit(f"slower than allowed: {', '.join(slow)}")


if __name__ == "__main__":
    main()
