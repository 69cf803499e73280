"""What bench/grid.py makes of its measurements: a row to each kind, remarks on what does not agree, the table, the goals. The standard
library only."""

import math
import statistics

from grid_works import GRIDS, RANK, STEPS, WARMUP, arithmetic, floor_seconds, lengths_of
from run import quantile

KINDS = [
    "reference", "engraft", "engraft-recompute", "engraft-offload", "engraft-fp8", "peft", "peft-recompute", "peft-liger", "unsloth",
    "unsloth-keep", "torchtune",
]  # fmt: skip
# Whose memory is compared: neither recomputes; both recompute; both recompute, and keep what they recompute from in the host's memory.
EQUAL = {"engraft": "unsloth-keep", "engraft-recompute": "unsloth", "engraft-offload": "unsloth"}
# How far a first step in bf16 may be from fp32.
LOSS_WITHIN, NORM_WITHIN = 0.01, 0.05


def kinds_of(four_bit):
    """The kinds of a work: fp8 products have a base of their own, so they are measured beside bf16 only."""
    return [kind for kind in KINDS if not (four_bit and kind == "engraft-fp8")]


def base_of(four_bit):
    """The base's form, in a word."""
    return "nf4" if four_bit else "bf16"


def rates_of(work):
    """The machine's best rates of all readings taken around a work's cells."""
    names = ("gemm", "attention_forward", "attention_backward", "copy")
    return {name: max(reading[name] for reading in work["rates"]) for name in names} if work["rates"] else None


def row(work, kind):
    """A kind's numbers; nothing where it was not timed."""
    cells = work["cells"].get(kind)
    if not cells or "seconds" not in cells[0]:
        return None
    lengths, four_bit, rates = lengths_of(work["work"]), work["base"] == "nf4", rates_of(work)
    seconds = [s for cell in cells for s in cell["seconds"][WARMUP:]]
    median = statistics.median(seconds)
    most = lambda key: max((cell[key] for cell in cells if cell.get(key)), default=None)  # noqa: E731
    return {
        "rates": [sum(lengths) / quantile(seconds, q) for q in (0.9, 0.5, 0.1)],
        "of_gemm": arithmetic(work["model"], lengths)["model"] / median / rates["gemm"] if rates else None,
        "of_floor": floor_seconds(rates, work["model"], lengths, four_bit) / median if rates else None,
        "memory": most("allocated") or most("resident"),
        "device": most("device_peak"),
        "recomputed": most("recomputed_layers") or 0,
        "first_step": statistics.median(cell["first_step"] for cell in cells),
        "loss": cells[0]["losses"][0], "norm": cells[0]["norms"][0],
    }  # fmt: skip


def rows_of(work):
    """Rows by kind."""
    found = {kind: row(work, kind) for kind in KINDS}
    return {kind: of for kind, of in found.items() if of}


def best(rows, family):
    """Tokens a second of the fastest of a peer's kinds."""
    return max((of["rates"][1] for kind, of in rows.items() if kind.partition("-")[0] == family), default=None)


def memory_against(rows, kind):
    """Memory of a kind against Unsloth's at equal settings, and which of its kinds that is; nothing where they are not equal."""
    other = EQUAL.get(kind)
    if kind not in rows or other not in rows or (kind == "engraft" and rows[kind]["recomputed"]):
        return None
    return rows[kind]["memory"] / rows[other]["memory"], other


def remarks(work):
    """What does not agree: with the fp32 reference (without one, with the first kind that there is), among the counts of what is trained,
    and gradient norms that are not above zero."""
    said, cells = [], {kind: found for kind, found in work["cells"].items() if found}
    for kind, found in cells.items():
        norms = [norm for cell in found for norm in cell["norms"]]
        if bad := sum(not (norm is not None and math.isfinite(norm) and norm > 0) for norm in norms):
            said.append(f"{kind}: the gradient norm of {bad} of {len(norms)} steps is not above zero")
    against = next((kind for kind in KINDS if kind in cells), None)
    for kind, found in cells.items():
        for what, within in (("losses", LOSS_WITHIN), ("norms", NORM_WITHIN)):
            is_, should = found[0][what][0], cells[against][0][what][0]
            if is_ is None or should is None or not abs(is_ - should) <= within * abs(should):
                name = {"losses": "loss", "norms": "gradient norm"}[what]
                said.append(f"{kind}: {name} of the first step is {shown(is_)}, {against}'s is {shown(should)}")
    counts = {kind: found[0]["parameters"] for kind, found in cells.items()}
    if len(set(counts.values())) > 1:
        said.append("trained parameters differ: " + ", ".join(f"{kind} {count}" for kind, count in counts.items()))
    return said


def shown(number):
    """A number to four digits."""
    return "none" if number is None else f"{number:.4g}"


COLUMNS = [
    "Model", "Documents", "Base", "", "tokens/s (p10 to p90)", "against the best PEFT", "against the best Unsloth", "F_model of R_mm",
    "of the floor", "peak memory: tensors (CPU: resident)", "on the device", "memory against Unsloth's, equal settings",
    "first step", "loss and gradient norm of step 1",
]  # fmt: skip


def table(result):
    """The results as Markdown: all works of the grid, those that are not measured, too."""
    lines = [heading(result), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    found = {(work["model"], work["work"], work["base"]): work for work in result["works"]}
    doubts, fp8 = [], []
    for model, documents, four_bit in GRIDS[result["grid"]]:
        key = (model, documents, base_of(four_bit))
        work = found.get(key)
        line = lambda kind, *cells, key=key: f"| {' | '.join([*key, kind, *cells, *[''] * (len(COLUMNS) - 4 - len(cells))])} |"  # noqa: E731
        if work is None:
            lines.append(line("every kind", "not measured"))
            continue
        lines += lines_of(work, four_bit, line)
        doubts += [f"- {' '.join(key)}: {remark}" for remark in remarks(work)]
        if not four_bit:
            fp8.append(f"| {' '.join(key)} | {fp8_of(work)} |")
    goals = goals_of(result, found)
    if fp8:
        lines += ["", FP8, "", "| Work | tokens/s (p10 to p90) | against engraft's bf16 | peak memory | loss and gradient norm of step 1 |"]
        lines += ["|---|---|---|---|---|", *fp8]
    lines += ["", *(["What does not agree:", "", *doubts] if doubts else [agreed(result)])]
    if goals:
        lines += ["", "| Work | Goal | Measured | |", "|---|---|---|---|", *goals]
    return "\n".join(lines)


FP8 = "Apart, because it is another arithmetic: `engraft-fp8`, base, inputs and gradients of its products in eight bits."


def fp8_of(work):
    """engraft's fp8 products beside its bf16."""
    rows = rows_of(work)
    if "engraft-fp8" not in rows:
        return f"{'n/a: ' + work['absent']['engraft-fp8'] if 'engraft-fp8' in work['absent'] else 'not measured'} | | |"
    of = rows["engraft-fp8"]
    low, middle, high = of["rates"]
    against = f"{middle / rows['engraft']['rates'][1]:.2f}x" if "engraft" in rows else "n/a"
    return f"{middle:.0f} ({low:.0f} to {high:.0f}) | {against} | {of['memory'] / 2**30:.2f} GiB | {shown(of['loss'])}, {shown(of['norm'])}"


def heading(result):
    """What was measured where."""
    if not result["works"]:
        return "Nothing of this grid has been measured: there are no numbers below, and no claim follows from them."
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    days = sorted({day for work in result["works"] for day in work["days"]}) or ["nothing measured yet"]
    loads = [cell["load"] for work in result["works"] for cells in work["cells"].values() for cell in cells]
    told = ""
    if loads:
        told = f" Load average as the cells began: {min(loads):.1f} to {max(loads):.1f}; what is above a cell's own"
        told += f" {result['threads'] or 'few'} threads is other work on the same machine, which no figure here is corrected for."
    return (
        f"{result['machine']}, {' to '.join(dict.fromkeys((days[0], days[-1])))}, {versions}. {STEPS} timed steps in each process, two"
        f" processes of each kind; r={RANK} on all linears, from the same adapter, every token trained that follows another.{told}"
    )


def agreed(result):
    """That there is nothing to remark, and what that was held against."""
    works = [work for work in result["works"] if work["cells"]]
    if not works:
        return "No numbers, so nothing that could disagree."
    without = [f"{work['model']} {work['work']} {work['base']}" for work in works if "reference" not in work["cells"]]
    told = f" There is no reference in fp32 for {', '.join(without)}: the first kind of each stands for it." if without else ""
    return (
        f"Nothing disagrees: losses of the first step within {100 * LOSS_WITHIN:.0f}% of the fp32 reference's, gradient norms within"
        f" {100 * NORM_WITHIN:.0f}%, as many trained parameters, all gradient norms above zero.{told}"
    )


def lines_of(work, four_bit, line):
    """The rows of a work: the floor, the reference, every kind."""
    rows, rates = rows_of(work), rates_of(work)
    lengths = lengths_of(work["work"])
    if rates:
        floor = sum(lengths) / floor_seconds(rates, work["model"], lengths, four_bit)
        told = [
            f"{name} {in_units(rates[key], unit)}"
            for name, key, unit in (("R_mm", "gemm", "FLOP/s"), ("R_af", "attention_forward", "FLOP/s"), ("R_ab", "attention_backward", "FLOP/s"))
        ]
        told.append(f"BW {in_units(rates['copy'], 'B/s')}")
        yield line(f"floor: {', '.join(told)}", f"{floor:.0f}", "", "", "", "100%")
    for kind in kinds_of(four_bit):
        if kind == "engraft-fp8":
            continue
        cells = work["cells"].get(kind)
        if kind in work["absent"]:
            yield line(kind, f"n/a: {work['absent'][kind]}")
        elif kind == "reference" and cells:
            yield line("reference in fp32", *[""] * 9, f"{shown(cells[0]['losses'][0])}, {shown(cells[0]['norms'][0])}")
        elif kind in rows:
            of = rows[kind]
            low, middle, high = of["rates"]
            peft, unsloth = (best(rows, family) for family in ("peft", "unsloth"))
            against = lambda other: f"{middle / other:.2f}x" if other else "n/a"  # noqa: B023, E731
            memory = memory_against(rows, kind)
            size = lambda n: f"{n / 2**30:.2f} GiB" if n else "n/a"  # noqa: E731
            once = "" if len(cells) > 1 else ", one process"
            layers = f" ({of['recomputed']} layers recomputed)" if kind == "engraft" and of["recomputed"] else ""
            yield line(
                kind + layers + once,
                f"{middle:.0f} ({low:.0f} to {high:.0f})",
                against(peft),
                against(unsloth),
                f"{100 * of['of_gemm']:.0f}%" if rates else "n/a",
                f"{100 * of['of_floor']:.0f}%" if rates else "n/a",
                size(of["memory"]),
                size(of["device"]),
                f"{memory[0]:.2f}x ({memory[1]})" if memory else "",
                f"{of['first_step']:.1f} s",
                f"{shown(of['loss'])}, {shown(of['norm'])}",
            )
        else:
            yield line(kind, "not measured")


def in_units(rate, unit):
    """A rate with its unit, to four digits."""
    power, letter = next(((power, letter) for power, letter in ((12, "T"), (9, "G"), (6, "M")) if rate >= 10**power), (0, ""))
    return f"{shown(rate / 10**power)} {letter}{unit}"


# ---------------------------------------------------------------------------------------------------------------------
# Goals, of the grid on a GPU


def goals_of(result, found):
    """What is to be reached on one GPU, what was measured of it, and whether it is reached, as rows of a table."""
    if result["grid"] != "gpu":
        return []
    rows = {key: rows_of(work) for key, work in found.items()}

    def ratio(key, of):
        try:
            return of(rows[key])
        except (KeyError, TypeError):
            return None

    speed = lambda of: of["engraft"]["rates"][1]  # noqa: E731
    lines = []

    def goal(key, text, of, reached, form="{:.2f}x"):
        value = ratio(key, of)
        told = ["not measured", ""] if value is None else [form.format(value), "reached" if reached(value) else "missed"]
        lines.append(f"| {' '.join(key)} | {text} | {told[0]} | {told[1]} |")

    def faster(key, family, times, name):
        goal(key, f"at least {times} times the tokens/s of {name}", lambda of: speed(of) / best(of, family), lambda v: v >= times)

    for model, documents, four_bit in GRIDS["gpu"]:
        key = (model, documents, base_of(four_bit))
        if model.endswith("8b") and documents.startswith("mixed"):
            faster(key, "peft", 3, "PEFT, which pads")
        elif model.endswith("8b") and not four_bit:
            faster(key, "unsloth", 1.3, "Unsloth's best")
            faster(key, "peft", 1.8, "PEFT's best")
            goal(key, "at least 75% of the floor without recompute", lambda of: 100 * of["engraft"]["of_floor"], lambda v: v >= 75, "{:.0f}%")
        elif model.endswith("8b"):
            faster(key, "unsloth", 1.5, "Unsloth's best")
            plain = rows.get((model, documents, "bf16"))
            own = lambda of, plain=plain: 100 * speed(of) / speed(plain)  # noqa: E731
            goal(key, "at least 90% of engraft's own tokens/s in bf16", own, lambda v: v >= 90, "{:.0f}%")
        elif model == "qwen3-0.6b":
            faster(key, "unsloth", 2.5, "Unsloth's best")
        for kind in () if documents.startswith("mixed") else ("engraft", "engraft-offload"):
            text = f"{kind}: at most 0.9 times the peak memory of {EQUAL[kind]}"
            goal(key, text, lambda of, kind=kind: memory_against(of, kind)[0], lambda v: v <= 0.9)
    return lines
