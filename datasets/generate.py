"""Writes the parquet files of this folder, byte for byte the same each time: `make datasets`.

With `--check` nothing is written: the files are made in memory and compared with those in the folder.
"""

import argparse
import hashlib
import io
import pathlib
import statistics
import sys

import pyarrow as pa
import pyarrow.parquet as pq

import dialogues
import notes
import tickets
from grammar import Distinct, shingles

PYARROW = "26.0.1"
HERE = pathlib.Path(__file__).parent

MESSAGES = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
TEXT = pa.schema([("text", pa.string())])

# name, maker, schema, seed, train rows, eval rows
SETS = [
    ("tickets", tickets, MESSAGES, 1, 1320, 120),
    ("dialogues", dialogues, MESSAGES, 2, 300, 30),
    ("notes", notes, TEXT, 3, 300, 30),
]


def parquet(rows, schema):
    """The rows as the bytes of a parquet file; several row groups, so that readers which stream are exercised."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, buffer, compression="zstd", compression_level=9, row_group_size=256, store_schema=False)
    return buffer.getvalue()


def largest_share(rows, others, words_of):
    """The largest share of its word 5-grams that a row of `rows` has in common with one of `others`."""
    index = {}
    sizes = []
    for i, row in enumerate(others):
        grams = shingles(words_of(row))
        sizes.append(len(grams))
        for gram in grams:
            index.setdefault(gram, []).append(i)
    worst = 0.0
    for i, row in enumerate(rows):
        grams = shingles(words_of(row))
        shared = {}
        for gram in grams:
            for j in index.get(gram, ()):
                if others is not rows or j != i:
                    shared[j] = shared.get(j, 0) + 1
        worst = max([worst, *(n / min(len(grams), sizes[j]) for j, n in shared.items())])
    return worst


def main():
    """Makes every set, prints its statistics, and writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the files in the folder instead of writing")
    arguments = parser.parse_args()
    if pa.__version__ != PYARROW:
        print(f"note: pyarrow is {pa.__version__}; the files were made with {PYARROW} and may differ in their bytes")

    differs = []
    for name, maker, schema, seed, train, evaluation in SETS:
        rows = maker.rows(seed, train + evaluation, Distinct())
        # The held-out rows come first, so that more training rows never move them.
        parts = {"eval": rows[:evaluation], "train": rows[evaluation:]}
        words = [len(maker.written(row).split()) for row in rows]
        print(
            f"{name}: {train} train + {evaluation} eval rows, {statistics.mean(words):.1f} words a row ({min(words)} to {max(words)});"
            f" largest share of word 5-grams between two rows {largest_share(rows, rows, maker.written):.2f},"
            f" between an eval and a train row {largest_share(parts['eval'], parts['train'], maker.written):.2f};"
            f" {len(set().union(*(shingles(maker.written(r)) for r in rows)))} distinct 5-grams"
        )
        for part, chosen in parts.items():
            data = parquet(chosen, schema)
            path = HERE / name / f"{part}.parquet"
            print(f"  {name}/{part}.parquet  {len(data):>7} bytes  sha256 {hashlib.sha256(data).hexdigest()}")
            if not arguments.check:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            elif not path.exists() or path.read_bytes() != data:
                differs.append(f"{name}/{part}.parquet")
    if differs:
        sys.exit(f"differs from what is committed: {', '.join(differs)}")


if __name__ == "__main__":
    main()
