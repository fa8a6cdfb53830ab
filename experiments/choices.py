"""Which setting seed 0 chose in a claim's grid, as a table; and the marks of runs that are not of one make."""

import re

from experiments.claims import GRIDS, RUNS
from experiments.stored import code_hash, load


def marks(used: list[dict]) -> str:
    """† where a run is of older code, ‡ where runs are of different data."""
    older = any(result["code"] != code_hash(RUNS.get(result["run"], "")) for result in used)
    return " †" * older + " ‡" * (len({result["data"] for result in used}) > 1)


def choice(claim: str, method: str) -> str:
    """What seed 0 found in a method's grid, as a table of α (if it varies) by learning rate."""
    flags = {run: re.sub(r"inside=\w+,", "factor ", RUNS[run]) for run in GRIDS[claim][method]}
    runs = {run: dict(re.findall(r"(lr|alpha|factor) (\S+)", words)) for run, words in flags.items()}
    values = {key: sorted({float(s[key]) for s in runs.values() if key in s}) for key in ("alpha", "factor", "lr")}
    first, second = [*(key for key in values if len(values[key]) > 1), "lr", "lr"][:2]
    found = {(float(s.get(first, 0)), float(s[second])): load(run, 0) for run, s in runs.items()}
    done = [result for result in found.values() if result]
    if not done:
        return ""
    best = min(done, key=lambda result: result["val_loss"])
    axes = first if first == second else f"{first} \\\\ {second}"
    lines = [f"| {method}, seed 0: {axes} | " + " | ".join(f"{v:g}" for v in values[second]) + " |"]
    lines.append("| --- |" + " --- |" * len(values[second]))
    for v in values[first] if first != second else [None]:
        cells = [found.get((w if v is None else v, w)) for w in values[second]]
        texts = [
            "" if c is None else f"**{c['val_loss']:.4f}**" if c is best else f"{c['val_loss']:.4f}" for c in cells
        ]
        lines.append(f"| {'' if v is None else f'{v:g}'} | " + " | ".join(texts) + " |")
    varied = [key for key in (first, second) if len(values[key]) > 1]
    edges = [key for key in varied if float(runs[best["run"]][key]) in (values[key][0], values[key][-1])]
    note = f"The best is at the edge of the grid in {' and '.join(edges)}.\n" * bool(edges)
    return "\n".join(lines) + "\n\n" + note + marks(done)
