"""One family live against transformers and PEFT, at a size and seed of your own: `make parity FAMILY=qwen3`.

`families.py` makes the model, its adapter and what transformers and PEFT compute with them; the executable then reads the
same folder, and its logits of every document are compared with theirs, without the adapter and with it.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from safetensors.torch import load_file

HERE = pathlib.Path(__file__).resolve().parent
LOGITS = 1e-4  # of the largest logit


def main():
    """Makes the family's variants, runs the executable on each and says how far apart they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--family", required=True)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--hidden", help="width of the stream; the family's own where not given")
    parser.add_argument("--layers", help="number of blocks; the family's own where not given")
    parser.add_argument("--lengths", help="tokens of each of three documents, as in 230,7,90")
    arguments = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="engraft-family-") as work:
        work = pathlib.Path(work)
        make = [sys.executable, "-B", HERE / "families.py", "--family", arguments.family, "--weights", "--out", work / "made"]
        for name in ("seed", "hidden", "layers", "lengths"):
            if value := getattr(arguments, name):
                make += [f"--{name}", value]
        subprocess.run(list(map(str, make)), check=True)
        for folder in sorted(path.parent for path in (work / "made").glob("*/config.json")):
            reference = load_file(folder / "reference.safetensors")
            offsets = reference["offsets"].tolist()
            for what, extra in [("base_logits", []), ("logits", ["--adapter", folder / "adapter"])]:
                worst = 0.0
                for begin, end in zip(offsets, offsets[1:]):
                    ids = ",".join(map(str, reference["ids"][begin:end].tolist()))
                    out = work / "logits.safetensors"
                    command = [arguments.engraft, "logits", "--model", folder, *extra, "--dtype", "fp32", "--ids", ids, "--out", out]
                    subprocess.run(list(map(str, command)), check=True)
                    ours, theirs = load_file(out)["logits"], reference[what][begin:end]
                    worst = max(worst, ((ours - theirs).abs().max() / reference[what].abs().max()).item())
                good = worst <= LOGITS
                failed += not good
                print(f"{'ok  ' if good else 'FAIL'}  {folder.name}: {what}: {worst:.2e} (bound {LOGITS:.0e})", flush=True)
    if failed:
        sys.exit(f"{failed} comparisons failed")


if __name__ == "__main__":
    main()
