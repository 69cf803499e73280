"""The grid of bench/grid.py at its smallest, part of `make parity`: half a minute.

Checked on the work `tiny-llama 4x128 bf16`, from a folder that was prepared anew:

 1. one cell of engraft and one of PEFT: forty steps each, the same count of trained parameters, gradient norms above zero, loss and
    gradient norm of the first step within what the table's remarks allow, and so no remark;
 2. the same command again measures nothing; another executable is refused;
 3. what does not agree is remarked: norms of zero, other losses, norms and counts;
 4. an engraft that fails is absent with its own words; a step of other tokens is refused; the driver's memory is sampled; time that
    runs out is told from a cell that takes longer than all of it.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import grid  # noqa: E402
import grid_table  # noqa: E402

WORK = ("tiny-llama", "4x128", False)


def check(holds, what):
    """Ends the program where something does not hold."""
    print(f"{'ok' if holds else 'FAILED'}: {what}")
    if not holds:
        sys.exit(1)


def absent(run):
    """Why a cell could not be measured; nothing if it could."""
    try:
        run()
    except grid.Absent as why:
        return str(why)
    return None


def grid_run(folder, engraft, *more):
    """`grid.py run` on the work, from the prepared folder."""
    command = [sys.executable, "-B", folder / "grid.py", "run", "--engraft", engraft, "--grid", "cpu", "--only", "tiny-llama 4x128 bf16"]
    command += ["--kinds", "engraft,peft", "--turns", "1", "--threads", "1", "--out", folder / "out.json", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def stand_in(path, program):
    """An executable that is not engraft."""
    path.write_text(f"#!/bin/sh\n{program}\n")
    path.chmod(0o755)
    return path


def measures(folder, engraft):
    """The two cells, and what is made of them."""
    ran = grid_run(folder, engraft)
    check(ran.returncode == 0, f"the grid runs from a folder of its own: {ran.stderr.strip()[-600:]}")
    result = json.loads((folder / "out.json").read_text())
    (work,) = result["works"]
    check(not work["absent"] and [len(work["cells"][kind]) for kind in ("engraft", "peft")] == [1, 1], f"a cell of each kind: {work['absent']}")
    for kind, (cell,) in work["cells"].items():
        steps = grid.WARMUP + grid.STEPS
        check([len(cell[what]) for what in ("seconds", "losses", "norms")] == [steps] * 3 and min(cell["seconds"]) > 0, f"{kind}: {steps} steps")
        check(min(cell["norms"]) > 0, f"{kind}: gradient norms above zero, the first {cell['norms'][0]:.4f}")
        check(cell["losses"][-1] < cell["losses"][0], f"{kind}: it learns, from {cell['losses'][0]:.4f} to {cell['losses'][-1]:.4f}")
    check(grid_table.remarks(work) == [], f"nothing to remark: {grid_table.remarks(work)}")
    check((folder / "out.md").read_text() == grid_table.table(result) + "\n", "the table lies beside the results")
    check("| engraft, one process |" in ran.stdout and "| peft, one process |" in ran.stdout, "it has both kinds")

    bytes_before = (folder / "out.json").read_bytes()
    again = grid_run(folder, engraft)
    check(again.returncode == 0 and (folder / "out.json").read_bytes() == bytes_before, "the same command measures nothing again")
    other = grid_run(folder, stand_in(folder / "other", "echo engraft 0.0.0"))
    check(other.returncode == 1 and "was measured with" in other.stderr, f"another executable is refused: {other.stderr.strip()[-200:]}")
    return work


def remarks(work):
    """Spoiled numbers, and what is said of them."""
    spoiled = {"norms": (0.0, "not above zero"), "losses": (9.0, "loss of the first step is 9"), "parameters": (7, "trained parameters differ")}
    for key, (value, words) in spoiled.items():
        spoilt = json.loads(json.dumps(work))
        held = spoilt["cells"]["peft"][0]
        if key == "parameters":
            held[key] = value
        else:
            held[key][0] = value
        said = grid_table.remarks(spoilt)
        check(any(words in remark for remark in said), f"{key} of {value} are remarked: {said}")


def failures(folder):
    """Cells that end badly, and time that runs out."""
    arguments = argparse.Namespace(device="cpu", threads=1, models=folder / "models", folder=folder)
    cell = lambda: grid.engraft(arguments, "engraft", *WORK, 60.0)  # noqa: E731
    event = json.dumps({"event": "error", "code": 8, "place": "training", "what": "9 GB were planned, 1 GB is free", "hint": "less"})
    arguments.engraft = stand_in(folder / "full", f"echo '{event}'; echo 'error: so' >&2; exit 8")
    check(absent(cell) == "training: 9 GB were planned, 1 GB is free", "an error of engraft is told in its own words")
    arguments.engraft = stand_in(folder / "mute", "exit 3")
    check(absent(cell) == "ended with 3 and said nothing", "so is silence")
    run = r"""$(sed -n 's/^output: {dir: "\(.*\)", tensorboard.*/\1/p' "$2")"""
    line = json.dumps({"loss": 1.0, "tokens": 511, "trained_tokens": 508})
    arguments.engraft = stand_in(folder / "short", f"mkdir -p {run}; echo '{line}' >{run}/metrics.jsonl")
    check("40 steps of 512 tokens were expected" in str(absent(cell)), "a step of other tokens is refused")

    (folder / "path").mkdir()
    stand_in(folder / "path/nvidia-smi", "echo 100; sleep 0.1; echo 300; sleep 0.1; echo 200; exec sleep 60")
    path, os.environ["PATH"] = os.environ["PATH"], f"{folder / 'path'}:{os.environ['PATH']}"
    with grid.DeviceMemory(True) as memory:
        until = time.time() + 20
        while memory.told() != 200 << 20 and time.time() < until:
            time.sleep(0.05)
        time.sleep(0.5)  # for the last sample, which is less
    os.environ["PATH"] = path
    check((memory.before, memory.told()) == (100 << 20, 200 << 20), "what the driver counts beyond what was in use before is sampled")

    def late(seconds):
        raise TimeoutError

    for used, words in ((0.0, "took longer than 1 minutes"), (30.0, None)):
        minutes = grid.Minutes(1.0)
        minutes.begun -= used
        try:
            why = absent(lambda: minutes.bounded(late))  # noqa: B023
        except grid.OutOfTime:
            why = None
        check(why == words, f"with {60 - used:.0f} of 60 seconds left, a cell that is cut short is {'n/a' if words else 'left to the next run'}")


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", type=lambda text: pathlib.Path(text).resolve(), required=True, help="the executable")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engraft-grid-test-") as folder:
        folder = pathlib.Path(folder)
        grid.prepare(folder)
        check(all((folder / file).exists() for file in grid.FILES), "the programs lie in the prepared folder")
        work = measures(folder, arguments.engraft)
        remarks(work)
        failures(folder)


if __name__ == "__main__":
    main()
