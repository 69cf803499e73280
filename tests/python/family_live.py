"""Families live against transformers and PEFT, at a size and seed of your own: `make parity FAMILY=qwen3`, several with
commas between them, or `all`.

`families.py` makes the model, its adapter and what transformers and PEFT compute with them; the executable then reads the
same folder, and its logits of every document are compared with theirs, without the adapter and with it. Then the executable
trains the model for two steps: PEFT loads the adapter it saved, transformers the merged model it saved, and both must
answer as the executable does with the same files. What fails of one variant is said, and the next one follows; a table
at the end says how far apart every two were.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

import pyarrow
import pyarrow.parquet
import torch
from peft import PeftModel
from safetensors.torch import load_file

import families

HERE = pathlib.Path(__file__).resolve().parent
LOGITS = 1e-4  # of the largest logit
SECONDS = 300  # for one run of the executable
SEEDS = 5  # tried before a variant is given up whose choices are too near a tie
WORDS = ["<unk>", "<s>", "</s>"]  # the first of a vocabulary of whole words


def write_vocabulary(folder, size):
    """A tokenizer, which the made models lack: every id a word of its own."""
    words = WORDS + [f"w{i}" for i in range(len(WORDS), size)]
    added = [
        {"id": i, "content": word, "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        for i, word in enumerate(WORDS)
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | roles))


def trained(engraft, folder, ids):
    """Trains for two steps on the model's own documents: the run's folder."""
    place = folder.with_name(f"{folder.name}-trained")
    place.mkdir()
    text = " ".join(f"w{i}" for i in ids.tolist() if i >= len(WORDS))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text, text]}), place / "rows.parquet")
    recipe = {
        "base_model": str(folder),
        "dtype": "fp32",
        "device": "cpu",
        "adapter": {"r": families.RANK, "lora_alpha": families.ALPHA},
        "dataset": {"train": "rows.parquet", "max_length": 128},
        "training": {"max_steps": 2, "micro_batch_size": 1, "learning_rate": 0.05, "lr_scheduler": "constant"},
        "output": {"dir": str(place / "run"), "save": ["adapter", "merged"]},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    executed(engraft, "train", place / "recipe.yaml")
    return place / "run"


def executed(*command):
    """Runs the executable; what it said is the error where it fails."""
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)
    if run.returncode:
        raise Failed(f"{command[1]} ended with {run.returncode}: {run.stderr.strip()}")


class Failed(Exception):
    """A step without a result, hence with nothing to compare."""


class Checks:
    """The comparisons of one variant."""

    def __init__(self, engraft, folder):
        self.engraft, self.folder = engraft, folder
        self.worst = {}  # the largest difference by what was compared
        self.reference = load_file(folder / "reference.safetensors")
        self.variant = families.VARIANTS[folder.name]

    def ours(self, model, *adapter):
        """The executable's logits (T, V) of all documents, end to end."""
        ids, lengths = self.reference["ids"], self.reference["offsets"].diff()
        ids, lengths = (",".join(map(str, numbers.tolist())) for numbers in (ids, lengths))
        out = self.folder / "logits.safetensors"
        command = ["logits", "--model", model, *adapter, "--dtype", "fp32", "--ids", ids, "--lengths", lengths, "--out", out]
        executed(self.engraft, *command)
        return load_file(out)["logits"]

    def theirs(self, model):
        """transformers' logits of the same documents, every one on its own."""
        with torch.no_grad():
            return families.forward(model.eval(), self.reference["ids"], self.reference["offsets"])

    def compare(self, what, ours, theirs):
        """Says how far apart they are, of the largest."""
        worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        self.worst[what] = worst
        word = "ok  " if worst <= LOGITS else "FAIL"
        print(f"{word}  {self.folder.name}: {what}: {worst:.2e} (bound {LOGITS:.0e})", flush=True)

    def run(self):
        """All comparisons."""
        folder, base = self.folder, self.reference["base_logits"]
        self.compare("logits", self.ours(folder), base)
        self.compare("adapted logits", self.ours(folder, "--adapter", folder / "adapter"), self.reference["logits"])

        write_vocabulary(folder, base.shape[1])
        run = trained(self.engraft, folder, self.reference["ids"])
        adapted = self.ours(folder, "--adapter", run / "adapter")
        if not (adapted - base).abs().max() > 100 * LOGITS * base.abs().max():
            raise Failed("training changed nothing, so nothing could be compared")
        peft = PeftModel.from_pretrained(families.load(self.variant, folder), run / "adapter")
        self.compare("the adapter it trained, in PEFT", adapted, self.theirs(peft))
        merged = families.load(self.variant, run / "merged")
        ours = self.ours(run / "merged")
        self.compare("its merged model, in transformers", ours, self.theirs(merged))
        self.compare("merged and adapted", ours, adapted)


def made(name, variant, arguments, work):
    """A variant's folder under `work`; the next seed where this one's choices are too near a tie."""
    for seed in range(arguments.seed, arguments.seed + SEEDS):
        of = argparse.Namespace(**vars(arguments) | {"seed": seed, "out": work, "weights": True})
        try:
            families.make(name, variant, of)
            return work / name
        except families.Tie as tie:
            print(tie, flush=True)
    raise Failed(f"no seed from {arguments.seed} to {seed} is far enough from a tie")


def checked(name, variant, arguments):
    """One variant: a row of the table, and whether all was well."""
    begin, worst = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="engraft-family-") as work:
        try:
            checks = Checks(arguments.engraft, made(name, variant, arguments, pathlib.Path(work)))
            worst = checks.worst
            checks.run()
            good = all(value <= LOGITS for value in worst.values())
            said = "ok" if good else "FAIL"
        except Exception as error:
            traceback.print_exc()
            good, said = False, f"FAIL: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
    figures = [*worst.values(), *[None] * (5 - len(worst))]
    cells = "".join("        -" if figure is None else f" {figure:8.1e}" for figure in figures)
    return f"{name:22}{cells} {time.monotonic() - begin:6.0f}  {said}", good


def main():
    """Makes the variants, runs the executable on each and says how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--family", required=True, type=families.chosen)
    parser.add_argument("--seed", default=1, type=int)
    parser.add_argument("--hidden", type=int, help="width of the stream; the family's own where not given")
    parser.add_argument("--layers", type=int, help="number of blocks; the family's own where not given")
    parser.add_argument("--lengths", type=families.lengths, help="tokens of each of three documents, as in 230,7,90")
    arguments = parser.parse_args()
    families.settle()
    rows = [checked(name, variant, arguments) for name, variant in arguments.family.items()]
    print("\nLargest differences, of the largest logit: between engraft and transformers; PEFT, with an adapter; PEFT, with the")
    print("adapter engraft trained; transformers, with the model it merged; and between that and the adapter unmerged.\n")
    print(f"{'':22} {'base':>8} {'adapted':>8} {'trained':>8} {'merged':>8} {'alike':>8} {'s':>6}")
    for row, _ in rows:
        print(row)
    if failed := sum(not good for _, good in rows):
        sys.exit(f"{failed} of {len(rows)} failed (bound {LOGITS:.0e})")


if __name__ == "__main__":
    main()
