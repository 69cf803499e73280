"""Speed and memory of engraft beside PEFT, Unsloth and torchtune on one GPU: from a folder that can be copied to where the GPU is.

    python bench/grid.py prepare FOLDER                         anywhere, with pyarrow: rows of fixed tokens, a tokenizer, these programs
    python FOLDER/grid.py run --engraft BINARY                  on the machine with the GPU: torch 2.11 is all that must be there
    python FOLDER/grid.py run --engraft BINARY --grid cpu       without a GPU: the same at small sizes
    python FOLDER/grid.py table results/FILE.json               the table of results once more

Models are random, made of the sizes in grid_works.py where they are used. Every cell is a fresh process; the kinds of one piece of work
take turns (A B C C B A), so that a machine that warms up or slows down hurts all alike. Ten steps warm up, thirty are timed, by CUDA events
that nothing waits for (engraft: by its own clock, which does not wait either); the table has the median step, and the fastest and slowest
tenth. Every kind trains the same documents from the same adapter of the same rank on all linears.

    engraft             recomputes what would not fit, which may be nothing
    engraft-recompute   recomputes every layer, as peft-recompute does
    engraft-offload     and keeps what it recomputes from in the host's memory, as unsloth does
    engraft-fp8         fp8 products of a base in fp8: another arithmetic, so apart
    peft, peft-recompute, peft-liger        PEFT + transformers; the last with Liger's kernels; documents of mixed lengths are padded
    unsloth, unsloth-keep                   as its notebooks have it; without recompute
    torchtune                               its modules as its single-device recipe has them, Llama in bf16 only
    reference           loss and gradient norm of the first step in fp32, by plain transformers and PEFT

What does not agree is told below the table: first losses and gradient norms with the reference's, counts of what is trained, gradient norms
that are not above zero. A kind that is not installed, lacks the memory or fails is n/a with the reason and never given a number.

The floor is the time that the arithmetic of a step takes at this machine's own rates, measured before and after the cells of each work (N
tokens, of which all but each document's first are predicted, which is the share rho; A = sum over documents of l(l+1)/2, rank r):

    P_L = L(2dHh + 2dHk h + 3df)    P_h = V d    P_A = L r[(d+Hh) + 2(d+Hk h) + (Hh+d) + 2(d+f) + (f+d)]
    F_model = N(4P_L + 4 rho P_h + 6P_A) + 12 L H h A
    T_floor = N(4P_L + 4 rho P_h + 6P_A) / R_mm + 4LHhA / R_af + 10LHhA / R_ab + bytes / BW + k T_dq

with k = 2 and T_dq the time of making all weights whole at the speed of a copy, where the base is in four bits. F_model a second over R_mm
is what others call MFU, of what this machine's products really reach.

Results and their table are written after every cell; what is in the file already is not measured again, so a run that ended early, or at
its `--minutes`, is taken up by the same command (exit code 75 while something is left). `--fresh` measures anew what `--only` and `--kinds`
choose.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from grid_table import KINDS, base_of, kinds_of, table
from grid_works import ALPHA, END, GRIDS, LINEARS, RANK, RATE, STEPS, WARMUP, config_of, documents_of, lengths_of, token_ids
from run import describe_machine, watched

HERE = pathlib.Path(__file__).resolve().parent
FILES = ["grid.py", "grid_cells.py", "grid_table.py", "grid_works.py", "run.py"]
PACKAGES = ["torch", "transformers", "peft", "unsloth", "liger-kernel", "bitsandbytes", "torchtune", "torchao"]
# What a reason may take of a table's width.
WIDTH = 200


class Absent(Exception):
    """A cell that cannot be measured here, and why."""


class OutOfTime(Exception):
    """The minutes are over; what is not measured yet is left to the next run."""


def say(text):
    """Tells how it goes."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Before: what needs more than torch


def prepare(folder):
    """Writes what the machine with the GPU has no library for, and these programs beside it."""
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
    for documents in sorted({documents for grid in GRIDS.values() for _, documents, _ in grid}):
        texts = documents_of(documents) * (WARMUP + STEPS)
        pq.write_table(pa.table({"text": texts}), folder / f"{documents}.parquet")
    if folder.resolve() != HERE:
        for file in FILES:
            shutil.copy(HERE / file, folder / file)
    print(f"{folder} is ready: copy it to the machine with the GPU, then `python grid.py run --engraft BINARY`")


# ---------------------------------------------------------------------------------------------------------------------
# Cells. This process has the standard library only, so that a child's peak is its own.


class DeviceMemory:
    """Bytes in use on the GPU as its driver counts them, sampled while a cell runs; nothing where it does not tell."""

    def __init__(self, wanted):
        self.before = self.most = None
        self.process = nvidia_smi("memory.used", "-lms", "100") if wanted else None

    def __enter__(self):
        if self.process:
            self.before = self.most = self.next()
            self.thread = threading.Thread(target=self.follow, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.thread.join()
            self.process.wait()

    def next(self):
        """The next sample; nothing where there is none, or it is no number."""
        text = self.process.stdout.readline().strip()
        return int(text) << 20 if text.isdigit() else None

    def follow(self):
        """Keeps the largest."""
        while (sample := self.next()) is not None:
            self.most = max(self.most or 0, sample)

    def told(self):
        """The most there was beyond what was in use before."""
        return None if self.most is None else self.most - (self.before or 0)


def nvidia_smi(query, *more):
    """A process that prints what the driver says of the GPU that CUDA takes first; nothing where there is no such program."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", first, *more]
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def with_libtorch():
    """The environment in which the executable finds the libtorch of this Python, and what that needs, if it does not know one itself."""
    spec = importlib.util.find_spec("torch")
    torch = pathlib.Path(spec.submodule_search_locations[0]) if spec else None
    folders = [torch / "lib", *sorted(torch.parent.glob("nvidia/*/lib"))] if torch else []
    known = os.environ.get("LD_LIBRARY_PATH")
    return os.environ | {"LD_LIBRARY_PATH": ":".join([*([known] if known else []), *map(str, folders)])}


def recipe_of(arguments, kind, model, documents, four_bit, run):
    """The recipe of engraft's cell. A row is a document, and a micro-batch is all of them, end to end without padding."""
    lengths = lengths_of(documents)
    text = lambda path: json.dumps(str(path))  # noqa: E731
    form = {"engraft-fp8": "{type: fp8, compute: fp8}"}.get(kind, "{type: nf4, double_quant: true}" if four_bit else None)
    how = {"engraft-recompute": "recompute: full", "engraft-offload": "recompute: full\n  offload: on"}.get(kind, "recompute: auto")
    lines = [
        f"base_model: {text(arguments.models / model)}",
        "dtype: bf16",
        f"device: {arguments.device}",
        f"adapter: {{adapter_name_or_path: {text(arguments.models / model / 'adapter')}, r: {RANK}, lora_alpha: {ALPHA},"
        f" target_modules: [{', '.join(LINEARS)}], method: {'qlora' if form else 'lora'}}}",
        *([f"quantization: {form}"] if form else []),
        f"dataset: {{train: {text(arguments.folder / f'{documents}.parquet')}, format: text, shuffle: false, packing: false, max_length: {max(lengths)}}}",
        "training:",
        f"  max_steps: {WARMUP + STEPS}",
        f"  micro_batch_size: {len(lengths)}",
        f"  learning_rate: {RATE}",
        "  lr_scheduler: constant",
        "  warmup_steps: 0",
        "  weight_decay: 0",
        "  max_grad_norm: 1",
        "  logging_steps: 1",
        f"  {how}",
        *([f"  threads: {arguments.threads}"] if arguments.threads else []),
        f"output: {{dir: {text(run)}, tensorboard: false}}",
    ]
    return "\n".join(lines) + "\n"


def engraft(arguments, kind, model, documents, four_bit, seconds):
    """`engraft train` on the same documents, read from its metrics and events."""
    with tempfile.TemporaryDirectory(prefix="engraft-grid-") as folder:
        folder = pathlib.Path(folder)
        run = folder / "run"
        (folder / "recipe.yaml").write_text(recipe_of(arguments, kind, model, documents, four_bit, run))
        metrics = run / "metrics.jsonl"
        command = [arguments.engraft, "train", folder / "recipe.yaml", "--json"]
        code, said, first, resident = watched(command, metrics, seconds, with_libtorch())
        events = [json.loads(line) for line in said.splitlines() if line.startswith('{"event"')]
        if code:
            raise Absent(last_error(code, said, events))
        logged = [m for m in map(json.loads, metrics.read_text().splitlines()) if "loss" in m]
    lengths = lengths_of(documents)
    for counted, should in (("tokens", sum(lengths)), ("trained_tokens", sum(lengths) - len(lengths))):
        counts = [m[counted] for m in logged]
        if [b - a for a, b in zip([0, *counts], counts)] != [should] * (WARMUP + STEPS):
            raise Absent(f"{WARMUP + STEPS} steps of {should} {counted.replace('_', ' ')} were expected, it counted {counts[:3]}... in {len(counts)}")
    event = {e["event"]: e for e in events}
    elapsed = [m["elapsed_seconds"] for m in logged]
    return {
        # The first step's own time is not known from outside; it is a warm-up step anyway.
        "seconds": [elapsed[0]] + [b - a for a, b in zip(elapsed, elapsed[1:])],
        "losses": [m["loss"] for m in logged], "norms": [m["grad_norm"] for m in logged], "first_step": first,
        "allocated": max(m.get("peak_memory_bytes") or 0 for m in logged) if arguments.device == "cuda" else None,
        "resident": resident, "parameters": event["start"]["trained_parameters"],
        "recomputed_layers": event["memory_plan"]["recomputed_layers"],
        "planned_bytes": event["memory"]["planned_bytes"], "measured_bytes": event["memory"]["measured_bytes"],
    }  # fmt: skip


def last_error(code, said, events):
    """What a run of engraft that ended with `code` said last."""
    errors = [e for e in events if e["event"] == "error"]
    if errors:
        return f"{errors[-1]['place']}: {errors[-1]['what']}".removeprefix(": ")
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith('{"event"')]
    return lines[-1].strip() if lines else f"ended with {code} and said nothing"


def cell(arguments, kind, model, documents="", four_bit=False, seconds=math.inf):
    """A cell of grid_cells.py in a process of its own, which is stopped after so many seconds: TimeoutError."""
    command = [sys.executable, "-B", HERE / "grid_cells.py", kind, "--model", model, "--work", documents, "--models", arguments.models]
    command += ["--tokenizer", arguments.folder / "tokenizer", "--device", arguments.device, "--threads", arguments.threads]
    command += ["--launched", time.time(), *(["--four-bit"] if four_bit else [])]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as out:
        # A group of its own: a peer's compilers are stopped with it.
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=errors, start_new_session=True)
        begun, status = time.time(), None
        try:
            while status is None:
                pid, waited, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    status = waited
                elif time.time() - begun > seconds:
                    raise TimeoutError
                else:
                    time.sleep(0.02)
        finally:
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (errors, out):
            file.seek(0)
        said = errors.read().strip().splitlines()
        results = [line for line in out.read().splitlines() if line.startswith("{")]
    if process.returncode or not results:
        killed = "killed, as the system does where memory runs out" if process.returncode == -signal.SIGKILL else None
        raise Absent(killed or f"failed: {said[-1] if said else 'nothing said'}")
    result = json.loads(results[-1])
    if "absent" in result:
        raise Absent(result["absent"])
    return result | {"resident": usage.ru_maxrss * 1024}


def measured(arguments, kind, work, seconds):
    """A kind's cell, with what the whole device had in use meanwhile."""
    model, documents, four_bit = work["model"], work["work"], work["base"] == "nf4"
    if kind == "engraft-fp8":
        capability = next((reading["capability"] for reading in work["rates"] if reading["capability"]), None)
        if arguments.device == "cpu":
            raise Absent("a CPU has no fp8 products")
        if capability and capability < [8, 9]:
            raise Absent(f"compute capability {capability[0]}.{capability[1]}: fp8 products begin with 8.9")
    if kind == "engraft-offload" and arguments.device == "cpu":
        raise Absent("on a CPU there is no other memory")
    begun, load = time.time(), os.getloadavg()[0]
    with DeviceMemory(arguments.device == "cuda") as memory:
        run = engraft if kind.startswith("engraft") else cell
        done = run(arguments, kind, model, documents, four_bit, seconds)
    return done | {"device_peak": memory.told(), "wall": time.time() - begun, "load": load}


# ---------------------------------------------------------------------------------------------------------------------
# The grid, cell after cell


class Results:
    """What is measured, in a file that is whole after every cell, and its table beside it."""

    def __init__(self, path, identity):
        self.path, self.of = path, identity | {"works": []}

    def take_up(self, fresh, chosen):
        """Goes on with what is in the file; `fresh(work, kind)` says what of it is measured anew."""
        if not self.path.exists():
            return
        before = json.loads(self.path.read_text())
        if before.keys() != self.of.keys():
            sys.exit(f"{self.path} holds other things than results of this program: name another file (--out)")
        for work in before["works"]:
            for held in (work["cells"], work["absent"]):
                for kind in [kind for kind in held if fresh(work, kind)]:
                    del held[kind]
            if not work["cells"] and not work["absent"]:
                work["rates"] = []
        before["works"] = [work for work in before["works"] if work["cells"] or work["absent"]]
        if before["works"]:
            self.same(before, chosen)
            self.of = before | {"engraft": self.of["engraft"] or before["engraft"], "versions": self.of["versions"] | before["versions"]}

    def same(self, before, chosen):
        """Refuses to mix machines, programs or versions."""
        here = {key: value for key, value in self.of.items() if key != "works"}
        if not here["engraft"]:
            here |= {"engraft": before["engraft"], "versions": here["versions"] | {k: v for k, v in before["versions"].items() if k == "engraft"}}
        elif not before["engraft"]:
            before = before | {"engraft": here["engraft"], "versions": before["versions"] | {"engraft": here["versions"]["engraft"]}}
        for key, value in here.items():
            if before[key] != value:
                sys.exit(
                    f"{self.path} was measured with {key} {before[key]}, and here it is {value}: measure {chosen} into another file (--out), or"
                    " all of it anew (--fresh, without --only and --kinds)"
                )

    def work(self, model, documents, base):
        """The entry of a work."""
        for work in self.of["works"]:
            if (work["model"], work["work"], work["base"]) == (model, documents, base):
                return work
        work = {"model": model, "work": documents, "base": base, "days": [], "rates": [], "cells": {}, "absent": {}}
        self.of["works"].append(work)
        return work

    def write(self):
        """Writes both files."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(tidy(self.of), indent=1)
        # A list of numbers is a line.
        text = re.sub(r"\[([-+\d.eE,\s]|null)*\]", lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text)
        for path, whole in ((self.path, text), (self.path.with_suffix(".md"), table(self.of))):
            part = path.with_name(path.name + ".part")
            part.write_text(whole + "\n")
            os.replace(part, path)


def tidy(value):
    """Numbers to seven digits; those that JSON has no word for are null."""
    if isinstance(value, dict):
        return {key: tidy(held) for key, held in value.items()}
    if isinstance(value, list):
        return [tidy(held) for held in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


class Minutes:
    """How long a run may go on."""

    def __init__(self, minutes):
        self.minutes, self.begun = minutes, time.time()

    def left(self):
        """Seconds."""
        return self.minutes * 60 - (time.time() - self.begun) if self.minutes else math.inf

    def bounded(self, run, expected=0.0):
        """What `run` gives for the seconds that are left: [`OutOfTime`] where they do not suffice, [`Absent`] where all of them do not."""
        left = self.left()
        if left < max(expected, 1.0):
            raise OutOfTime
        try:
            return run(left)
        except TimeoutError:
            if left < 0.9 * self.minutes * 60:
                raise OutOfTime from None
            raise Absent(f"took longer than {self.minutes:g} minutes") from None


def measure(arguments, results, minutes, model, documents, four_bit):
    """A work: the model, the machine's rates, every kind in its turn, the rates again."""
    kinds = [kind for kind in kinds_of(four_bit) if kind in arguments.kinds and (arguments.engraft or not kind.startswith("engraft"))]
    turns = [(kind, 0) for kind in kinds]
    # The reference is not timed.
    turns += [(kind, turn) for turn in range(1, arguments.turns) for kind in (reversed(kinds) if turn % 2 else kinds) if kind != "reference"]
    work = results.work(model, documents, base_of(four_bit))
    name = f"{model} {documents} {work['base']}"
    missing = lambda: [(k, turn) for k, turn in turns if k not in work["absent"] and len(work["cells"].get(k, [])) <= turn]  # noqa: E731
    if not missing():
        return say(f"{name}: is in the file")

    def rates():
        say(f"{name}: the machine's rates")
        try:
            work["rates"].append(minutes.bounded(lambda seconds: cell(arguments, "machine", model, documents, seconds=seconds)))
        except Absent as why:
            say(f"{name}: the machine's rates are not known: {why}")

    try:
        if not made(arguments.models / model, model):
            say(f"making {model}")
            minutes.bounded(lambda seconds: cell(arguments, "model", model, seconds=seconds))
    except Absent as why:
        work["absent"] |= {kind: one_line(f"there is no model: {why}") for kind in kinds}
        return results.write()
    rates()
    while pending := missing():
        kind, turn = pending[0]
        say(f"{name}: {kind}")
        before = work["cells"].get(kind, [])
        try:
            expected = max((done["wall"] for done in before), default=0.0)
            done = minutes.bounded(lambda seconds: measured(arguments, kind, work, seconds), expected)  # noqa: B023
            work["cells"].setdefault(kind, []).append(done)
        except Absent as why:
            # Half of a kind is none: what failed once may have failed silently before.
            work["absent"][kind] = one_line(str(why))
            work["cells"].pop(kind, None)
            say(f"{name}: {kind} is n/a: {work['absent'][kind]}")
        day = datetime.date.today().isoformat()
        work["days"] += [day] if day not in work["days"] else []
        results.write()
    rates()
    results.write()


def made(folder, model):
    """Whether a model is there, of the sizes it should have."""
    files = [folder / "config.json", folder / "model.safetensors", folder / "adapter/adapter_model.safetensors"]
    return all(file.exists() for file in files) and json.loads(files[0].read_text()) == config_of(model)


def one_line(text):
    """A reason as a cell of a table takes it."""
    return " ".join(text.split()).replace("|", "/")[:WIDTH]


def identity_of(arguments):
    """What must be the same for results to stand in one file."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if arguments.engraft:
        try:
            told = subprocess.run([arguments.engraft, "--version"], capture_output=True, text=True, env=with_libtorch())
        except OSError as error:
            sys.exit(f"{arguments.engraft} cannot be run: {error}")
        if told.returncode:
            sys.exit(f"{arguments.engraft} --version ended with {told.returncode}: {told.stderr.strip()}")
        versions = {"engraft": told.stdout.split()[-1]} | versions
    machine = describe_machine(arguments.threads)
    if arguments.device == "cuda":
        process = nvidia_smi("name,driver_version")
        told = process.communicate()[0].strip() if process else ""
        if not told:
            sys.exit("there is no NVIDIA GPU here, or nvidia-smi does not tell of it: --grid cpu is the grid without one")
        machine, _, driver = told.partition(", ")
        versions["driver"] = driver
    return {
        "grid": arguments.grid, "machine": machine, "threads": arguments.threads, "versions": versions, "warmup": WARMUP, "steps": STEPS,
        "engraft": hashlib.sha256(arguments.engraft.read_bytes()).hexdigest() if arguments.engraft else None,
    }  # fmt: skip


def run(arguments):
    """The grid."""
    arguments.device = "cpu" if arguments.grid == "cpu" else "cuda"
    if arguments.device == "cpu" and not arguments.threads:
        arguments.threads = len(os.sched_getaffinity(0))
    arguments.models = arguments.models or arguments.folder / "models"
    unknown = sorted(set(arguments.kinds) - set(KINDS))
    chosen = [work for work in GRIDS[arguments.grid] if arguments.only in f"{work[0]} {work[1]} {base_of(work[2])}"]
    if unknown or not chosen:
        sys.exit(f"there is no kind {unknown[0]}: {', '.join(KINDS)}" if unknown else f"no work has `{arguments.only}` in it")
    if not (arguments.folder / "tokenizer/tokenizer.json").exists():
        sys.exit(f"{arguments.folder} is not prepared: python grid.py prepare {arguments.folder}")
    arguments.models.mkdir(parents=True, exist_ok=True)
    identity = identity_of(arguments)
    slug = re.sub(r"[^a-z0-9]+", "-", identity["machine"].lower()).strip("-")
    results = Results(arguments.out or HERE / "results" / f"grid-{arguments.grid}-{slug}.json", identity)
    keys = {(model, documents, base_of(four_bit)) for model, documents, four_bit in chosen}
    anew = lambda work, kind: arguments.fresh and (work["model"], work["work"], work["base"]) in keys and kind in arguments.kinds  # noqa: E731
    results.take_up(anew, arguments.only or "this")
    minutes = Minutes(arguments.minutes)
    ended_early = False
    try:
        for model, documents, four_bit in chosen:
            measure(arguments, results, minutes, model, documents, four_bit)
    except OutOfTime:
        ended_early = True
    results.write()
    print(table(results.of))
    say(f"written: {results.path} and {results.path.with_suffix('.md').name}")
    if ended_early:
        say(f"{arguments.minutes:g} minutes are over; the same command goes on from here")
        sys.exit(75)


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    path = lambda text: pathlib.Path(text).resolve()  # noqa: E731
    verb = verbs.add_parser("prepare")
    verb.add_argument("folder", type=pathlib.Path)
    verb = verbs.add_parser("run")
    verb.add_argument("--engraft", type=path, help="the executable; without it only peers run")
    verb.add_argument("--grid", default="gpu", choices=GRIDS)
    verb.add_argument("--only", default="", help="works whose `model documents base` holds this text")
    verb.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS, help="which of them, with commas")
    verb.add_argument("--turns", type=int, default=2, help="processes of each kind")
    verb.add_argument("--minutes", type=float, help="end after so many; the same command goes on")
    verb.add_argument("--fresh", action="store_true", help="measure anew what is in the file already")
    verb.add_argument("--threads", type=int, default=0, help="of the CPU; 0: all there are for --grid cpu, as each program chooses on a GPU")
    verb.add_argument("--folder", type=path, default=HERE, help="what `prepare` wrote (default: where this program is)")
    verb.add_argument("--models", type=path, help="where models are made (default: in that folder)")
    verb.add_argument("--out", type=path, help="the file for the results; their table is written beside it (default: in results/)")
    verb = verbs.add_parser("table")
    verb.add_argument("file", type=pathlib.Path, nargs="?", help="results; without them, the grid as it is before anything is measured")
    verb.add_argument("--grid", default="gpu", choices=GRIDS)
    arguments = parser.parse_args()
    if arguments.verb == "prepare":
        prepare(arguments.folder)
    elif arguments.verb == "run":
        run(arguments)
    else:
        print(table(json.loads(arguments.file.read_text()) if arguments.file else {"grid": arguments.grid, "works": []}))


if __name__ == "__main__":
    main()
