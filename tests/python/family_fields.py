"""Every field of a family's `config.json`, one at a time: `make parity FAMILY=qwen3_moe FIELDS=1`, also with SEED, HIDDEN,
LAYERS and LENGTHS of your own.

A field that changes what a model computes and that engraft does not understand has to be an error. So this program makes
the model that `families.py` makes, changes its config.json in one place, asks transformers and the executable for the
logits of the same documents, and compares. What is changed:

    saved             the whole file, as transformers writes it for the model it has read; also with the weights it writes
    FIELD = VALUE     a field of the file, or one that transformers knows and the file leaves out: another value, null
    FIELD left out    one of the file
    FIELD from TYPE   a field that the file of another family has, with what it says there
    FIELD of all      one that transformers reads of every config and no family's names
    rope: ...         how positions are stretched: every kind, under the old name, the new one and both

Both may refuse, or engraft alone; that is not said, but where transformers then computes what it did before
(`harmless`), unless the field is another family's. What transformers is known to do wrong is said as well (`mistaken`),
and where both answer and not alike, but the changed model chooses so near a tie that rounding may decide (`near a tie`).
It fails where both answer and not alike (`DIFFERS`), and where engraft refuses what transformers has written
(`REFUSED`).
"""

import argparse
import collections
import concurrent.futures
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import families

LOGITS = 1e-4  # of the largest logit: both compute the same
SAME = 1e-6  # of the largest logit: nothing has changed
SECONDS = 300  # for one run of the executable
SEEDS = 5  # tried before a variant is given up whose choices are too near a tie
AT_ONCE = 8  # changes whose answers are waited for together
# Of other parts and tasks: left out or null, but not looked into.
APART = ("vision_config", "audio_config", "id2label", "label2id")
ACTIVATIONS = ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu"]
# Embeddings so small that another `eps` of the first norms is seen.
SMALL = (r"(embed_tokens|embed|word_embeddings|embed_in)\.weight$", 0.0, 0.01)
# What transformers 5.17 does wrong, by the models' own code: it uses the short factors of Phi-3.5-MoE for long documents, too.
MISTAKEN = {"phimoe": re.compile("(long|short)_factor")}
FOREIGN = re.compile(r" from \w+$")  # what is said of another family's field
# What transformers asks every config for, by name alone, and goes by the truth of.
OF_ALL = {"is_causal": [False, 0, None, True]}
NOTHING = object()  # leaves the field out

# How positions are stretched; a factor of longrope is the first of as many as the head has.
STRETCHES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 0.1, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.3, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.4},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "short_factor": 1.3, "long_factor": 2.5},
    {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": 1.3, "long_factor": 2.5},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
]
BOTH = [
    ({"rope_type": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 5.0}),
    ({"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}, {"rope_type": "default", "rope_theta": 900.0}),
    ({"rope_type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {"rope_type": "yarn", "factor": 2.0, "beta_fast": 3.0}),
    ({}, {"rope_type": "linear", "factor": 5.0}),
]


def others(name, value):
    """What else a field may say that says `value`."""
    if isinstance(value, bool):
        found = [not value]
    elif isinstance(value, int):
        found = [value + 1, value // 2, 0]
    elif isinstance(value, float):
        found = [round(value * 1.7 + 0.01, 6), 0.0]
    elif isinstance(value, str):
        found = [*(ACTIVATIONS if "act" in name else []), "other"]
    elif isinstance(value, list):
        found = [value[::-1], value[:-1], [*value, *value[-1:]], []]
    else:
        found = [True, 3, 0.5]
    return [other for n, other in enumerate(found) if other != value and other not in found[:n]]


def places(fields, below=()):
    """The paths of all values of an object."""
    for name, value in fields.items():
        yield (*below, name), value
        if isinstance(value, dict) and name not in APART:
            yield from places(value, (*below, name))


def changed(config, path, value):
    """A config that says `value` at `path`, whose objects are copied where it lacks them."""
    config = copy.deepcopy(config)
    inner = config
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    if value is NOTHING:
        inner.pop(path[-1], None)
    else:
        inner[path[-1]] = value
    return config


class Family:
    """The variant of a family, with all that its config.json may say instead."""

    def __init__(self, variant, folder, arguments, seed):
        if "alibi" in variant.options:  # not eager, which adds the ALiBi twice in transformers 5.17
            variant = dataclasses.replace(variant, attention="sdpa")
        self.variant = variant = dataclasses.replace(variant, rules=[SMALL, *variant.rules])
        families.write_model(variant, argparse.Namespace(**vars(arguments) | {"seed": seed}), folder)
        model = families.load(variant, folder)
        vocabulary, lengths = model.config.get_text_config().vocab_size, arguments.lengths or variant.lengths
        self.ids, self.offsets, _ = families.documents(vocabulary, lengths, seed)
        self.config = json.loads((folder / "config.json").read_text())
        self.near_a_tie = False  # what was computed last
        self.known, self.base = model.config, self.forward(model)
        self.model = model

    def forward(self, model):
        """transformers' logits (T, V)."""
        with torch.no_grad(), families.routing_gaps() as gaps:
            logits = families.forward(model, self.ids, self.offsets)
        self.near_a_tie = min(gaps, default=1.0) < families.TIED
        return logits

    def theirs(self, folder):
        """transformers' logits of a folder with another config.json; none where it refuses, or misses a tensor."""
        try:
            logits = self.forward(families.load(self.variant, folder))
            return logits if bool(logits.isfinite().all()) else None
        except Exception:  # whatever it is that does not fit together
            return None

    def cases(self, foreign):
        """What is changed, in words, and the config that says so."""
        inner = ("text_config",) if "text_config" in self.config else ()
        for whole in (False, True):
            said = json.loads(self.known.to_json_string(use_diff=whole))
            # Of some larger models transformers makes the text model alone.
            said = said if said["model_type"] == self.config["model_type"] else changed(self.config, inner, said)
            yield "saved" if whole else "saved, all fields", said
        text = self.config["text_config"] if inner else self.config
        knows = json.loads(self.known.get_text_config().to_json_string(use_diff=False))
        if inner:
            yield from self.fields((), {k: v for k, v in self.config.items() if k not in ("text_config", "model_type")})
        yield from self.fields(inner, text | {k: v for k, v in knows.items() if k not in text})
        for model_type, fields in foreign.items():
            for name, value in fields.items():
                if name not in text and name not in knows:
                    yield f"{name} = {json.dumps(value)[:60]} from {model_type}", changed(self.config, (*inner, name), value)
        yield from self.of_all(inner)
        yield from self.stretches(inner, text, knows)

    def fields(self, inner, fields):
        """Each field below `inner` otherwise."""
        for path, value in places({k: v for k, v in fields.items() if not k.startswith("_")}):
            name = ".".join(path)
            missing = len(path) > 1 and path[0] not in (self.config.get("text_config", {}) if inner else self.config)
            config = changed(self.config, (*inner, path[0]), fields[path[0]]) if missing else self.config
            if not isinstance(value, dict):
                for other in others(path[-1], value):
                    yield f"{name} = {json.dumps(other)}", changed(config, (*inner, *path), other)
            if value is not None:
                yield f"{name} = null", changed(config, (*inner, *path), None)
            yield f"{name} left out", changed(config, (*inner, *path), NOTHING)

    def of_all(self, inner):
        """Fields that no family names, of the model and of its text part."""
        for name, values in OF_ALL.items():
            for value, place in itertools.product(values, {(), inner}):
                yield f"{'.'.join((*place, name))} = {json.dumps(value)} of all", changed(self.config, (*place, name), value)

    def stretches(self, inner, text, knows):
        """Positions stretched otherwise, by every name that says so."""
        parameters = knows.get("rope_parameters")
        if not parameters:
            return
        kinds = [kind for kind, value in parameters.items() if isinstance(value, dict)]
        part = {k: parameters[k] for k in ["partial_rotary_factor"] if k in parameters and k not in text}
        bare = changed(changed(self.config, (*inner, "rope_scaling"), NOTHING), (*inner, "rope_parameters"), NOTHING)

        def fitting(stretch):
            head = knows.get("head_dim") or knows["hidden_size"] // knows["num_attention_heads"]
            turning = (knows | text | part | stretch).get("partial_rotary_factor") or 1.0
            pairs = (knows.get("qk_rope_head_dim") or int(head * turning)) // 2
            factors = {k: [v + 0.1 * i for i in range(pairs)] for k, v in stretch.items() if k in ("short_factor", "long_factor")}
            return part | stretch | factors

        def said(old, new):
            config = bare if old is None else changed(bare, (*inner, "rope_scaling"), old)
            return config if new is None else changed(config, (*inner, "rope_parameters"), new)

        for stretch in map(fitting, STRETCHES):
            word = json.dumps(stretch)
            yield f"rope: rope_scaling {word}", said(stretch, None)
            yield f"rope: rope_scaling by type {word}", said({("type" if k == "rope_type" else k): v for k, v in stretch.items()}, None)
            yield f"rope: rope_parameters {word}", said(None, stretch)
            yield f"rope: rope_parameters with a base {word}", said(None, stretch | {"rope_theta": 800.0})
            for kind in kinds:
                yield f"rope: of {kind} {word}", said(None, parameters | {kind: {"rope_theta": 800.0} | stretch})
                yield f"rope: of {kind} alone {word}", said(None, {kind: stretch})
        for old, new in BOTH:
            yield f"rope: {json.dumps(old)} beside {json.dumps(new)}", said(old, new)
            for kind in kinds:
                yield f"rope: {json.dumps(old)} beside {kind} {json.dumps(new)}", said(old, parameters | {kind: new})
        outer = said(fitting(STRETCHES[5]), None)
        yield "rope: another original length outside", changed(outer, (*inner, "original_max_position_embeddings"), 20)
        yield "rope: no length", changed(outer, (*inner, "max_position_embeddings"), NOTHING)


def ours(engraft, folder, family):
    """The executable's logits of a folder, or what it says."""
    ids, lengths = (",".join(map(str, numbers.tolist())) for numbers in (family.ids, family.offsets.diff()))
    out = folder / "logits.safetensors"
    command = [engraft, "logits", "--model", folder, "--dtype", "fp32", "--ids", ids, "--lengths", lengths, "--out", out]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS)
    return load_file(out)["logits"] if run.returncode == 0 else " ".join(run.stderr.replace(f"{folder}/", "").split())


def apart(one, other):
    """How far apart logits are, of the largest; infinitely where they are not even of a shape."""
    return ((one - other).abs().max() / other.abs().max()).item() if one.shape == other.shape else float("inf")


def judged(family, what, mine, other):
    """What came of one change: a word and a sentence."""
    moves = "refuses" if other is None else f"moves by {apart(other, family.base):.1e}"
    if isinstance(mine, str):
        harmless = other is not None and apart(other, family.base) <= SAME and not FOREIGN.search(what)
        word = "harmless" if harmless else "both refuse" if other is None else "refused"
        return "REFUSED" if what.startswith("saved") else word, f"{what}: transformers {moves}: {mine}"
    if other is None:
        return "transformers refuses", f"{what}: engraft moves by {apart(mine, family.base):.1e}"
    difference, known = apart(mine, other), MISTAKEN.get(family.variant.model_type)
    if difference <= LOGITS:
        word = "alike"
    elif known and known.search(what):
        word = "mistaken"
    else:
        word = "near a tie" if family.near_a_tie else "DIFFERS"
    return word, f"{what}: {difference:.1e}, transformers {moves}"


def compared(family, engraft, work, foreign, pool):
    """Every change of a family with what came of it."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        place = pathlib.Path(place)
        family.model.save_pretrained(place)
        yield judged(family, "saved with its weights", ours(engraft, place, family), family.theirs(place))
    cases = iter(family.cases(foreign))
    while some := list(itertools.islice(cases, AT_ONCE)):
        folders = [pathlib.Path(tempfile.mkdtemp(dir=work)) for _ in some]
        for folder, (_, config) in zip(folders, some):
            (folder / "model.safetensors").symlink_to(work / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config))
        answers = [pool.submit(ours, engraft, folder, family) for folder in folders]
        for folder, (what, _), answer in zip(folders, some, answers):
            other, mine = family.theirs(folder), answer.result()
            yield judged(family, what, mine, other)
            shutil.rmtree(folder)


def made(variant, arguments, work):
    """The family under `work`; with the next seed where this one's choices are too near a tie."""
    for seed in range(arguments.seed, arguments.seed + SEEDS):
        family = Family(variant, work, arguments, seed)
        if not family.near_a_tie:
            return family
        print(f"seed {seed}: too near a tie to be compared", flush=True)
    sys.exit(f"no seed from {arguments.seed} to {seed} is far enough from a tie")


def foreign_fields(variants):
    """By model_type, the fields of its config.json, each with the first that has it."""
    seen, found = set(), {}
    for variant in variants:
        options = families.configuration(variant, None, None)
        config = AutoConfig.for_model(variant.model_type, **copy.deepcopy(options))
        fields = json.loads(config.to_json_string(use_diff=False)) | options
        fresh = {k: v for k, v in fields.items() if k not in seen and v is not None and not k.startswith("_")}
        seen |= fresh.keys()
        found[variant.model_type] = found.get(variant.model_type, {}) | fresh
    return found


def main():
    """Changes the fields of every family that was asked for, and says what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--family", required=True, type=families.chosen)
    parser.add_argument("--seed", default=1, type=int)
    parser.add_argument("--hidden", type=int, help="width of the stream; the family's own where not given")
    parser.add_argument("--layers", type=int, help="number of blocks; the family's own where not given")
    parser.add_argument("--lengths", type=families.lengths, help="tokens of each of three documents, as in 230,7,90")
    parser.add_argument("--all", action="store_true", help="also say where both refuse, or one of the two")
    arguments = parser.parse_args()
    families.settle()
    foreign, failed = foreign_fields(families.VARIANTS.values()), 0
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    for name, variant in arguments.family.items():
        counts = collections.Counter()
        with tempfile.TemporaryDirectory(prefix="engraft-fields-") as work:
            family = made(variant, arguments, pathlib.Path(work))
            for word, sentence in compared(family, arguments.engraft, pathlib.Path(work), foreign, pool):
                counts[word] += 1
                if word in ("DIFFERS", "REFUSED", "harmless", "mistaken", "near a tie") or arguments.all:
                    print(f"{word:9} {name}: {sentence}", flush=True)
        failed += counts["DIFFERS"] + counts["REFUSED"]
        print(f"{name}: {', '.join(f'{count} {word}' for word, count in counts.most_common())}", flush=True)
    if failed:
        sys.exit(f"{failed} changes are not understood as transformers does (bound {LOGITS:.0e})")


if __name__ == "__main__":
    main()
