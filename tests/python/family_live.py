"""One family live against transformers and PEFT, at a size and seed of your own: `make parity FAMILY=qwen3`.

`families.py` makes the model, its adapter and what transformers and PEFT compute with them; the executable then reads the
same folder, and its logits of every document are compared with theirs, without the adapter and with it. Then the executable
trains the model for two steps: PEFT loads the adapter it saved, transformers the merged model it saved, and both must
answer as the executable does with the same files.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import pyarrow
import pyarrow.parquet
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import families

HERE = pathlib.Path(__file__).resolve().parent
LOGITS = 1e-4  # of the largest logit
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
    run = subprocess.run([engraft, "train", place / "recipe.yaml"], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{folder.name}: training ended with {run.returncode}:\n{run.stderr}")
    return place / "run"


class Checks:
    """Counts what is off."""

    def __init__(self, engraft, folder):
        self.engraft, self.folder, self.failed = engraft, folder, 0
        self.reference = load_file(folder / "reference.safetensors")
        self.variant = families.VARIANTS[folder.name]

    def ours(self, model, *adapter):
        """The executable's logits (T, V), every document on its own."""
        offsets, out = self.reference["offsets"].tolist(), self.folder / "logits.safetensors"
        parts = []
        for begin, end in zip(offsets, offsets[1:]):
            ids = ",".join(map(str, self.reference["ids"][begin:end].tolist()))
            command = [self.engraft, "logits", "--model", model, *adapter, "--dtype", "fp32", "--ids", ids, "--out", out]
            subprocess.run(list(map(str, command)), check=True)
            parts.append(load_file(out)["logits"])
        return torch.cat(parts)

    def theirs(self, model):
        """transformers' logits of the same documents."""
        with torch.no_grad():
            return families.forward(model.eval(), self.reference["ids"], self.reference["offsets"])

    def compare(self, what, ours, theirs):
        """Says how far apart they are."""
        worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        good = worst <= LOGITS
        self.failed += not good
        print(f"{'ok  ' if good else 'FAIL'}  {self.folder.name}: {what}: {worst:.2e} (bound {LOGITS:.0e})", flush=True)

    def run(self):
        """All comparisons."""
        folder, base = self.folder, self.reference["base_logits"]
        self.compare("logits", self.ours(folder), base)
        self.compare("adapted logits", self.ours(folder, "--adapter", folder / "adapter"), self.reference["logits"])

        write_vocabulary(folder, base.shape[1])
        run = trained(self.engraft, folder, self.reference["ids"])
        adapted = self.ours(folder, "--adapter", run / "adapter")
        if not (adapted - base).abs().max() > 100 * LOGITS * base.abs().max():
            sys.exit(f"{folder.name}: training changed nothing, so nothing could be compared")
        peft = PeftModel.from_pretrained(families.load(self.variant, folder), run / "adapter")
        self.compare("the adapter it trained, in PEFT", adapted, self.theirs(peft))
        merged = families.load(self.variant, run / "merged")
        self.compare("its merged model, in transformers", self.ours(run / "merged"), self.theirs(merged))
        self.compare("merged and adapted", self.ours(run / "merged"), adapted)
        return self.failed


def main():
    """Makes the family's variants, runs the executable on each and says how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--family", required=True)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--hidden", help="width of the stream; the family's own where not given")
    parser.add_argument("--layers", help="number of blocks; the family's own where not given")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="engraft-family-") as work:
        work = pathlib.Path(work)
        make = [sys.executable, "-B", HERE / "families.py", "--family", arguments.family, "--weights", "--out", work / "made"]
        for name in ("seed", "hidden", "layers"):
            if value := getattr(arguments, name):
                make += [f"--{name}", value]
        subprocess.run(list(map(str, make)), check=True)
        for folder in sorted(path.parent for path in (work / "made").glob("*/config.json")):
            failed += Checks(arguments.engraft, folder).run()
    if failed:
        sys.exit(f"{failed} comparisons failed")


if __name__ == "__main__":
    main()
