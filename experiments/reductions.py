"""The claims that are not a difference of losses: spikes, the similarity of scaling factors, the variance of φ²."""

import json
import re
import statistics

import numpy as np

from experiments import stored
from experiments.claims import GRIDS, RUNS
from experiments.similarity import reduce_seed
from experiments.stored import code_hash, load

REFERENCE = "spike-lr0.002-adamw"


def marks(used: list[dict]) -> str:
    """† where a run is of older code, ‡ where runs are of different data."""
    older = any(result["code"] != code_hash(RUNS.get(result["run"], "")) for result in used)
    return " †" * older + " ‡" * (len({result["data"] for result in used}) > 1)


def choice(claim: str, method: str) -> str:
    """What seed 0 found in a method's grid, as a table of α (if it varies) by learning rate."""
    runs = {run: dict(re.findall(r"(lr|alpha|adagrad)[ =](\S+)", RUNS[run])) for run in GRIDS[claim][method]}
    values = {key: sorted({float(s[key]) for s in runs.values() if key in s}) for key in ("alpha", "adagrad", "lr")}
    first, second = [*(key for key in values if len(values[key]) > 1), "lr", "lr"][:2]
    found = {(float(s.get(first, 0)), float(s[second])): load(run, 0) for run, s in runs.items()}
    done = [result for result in found.values() if result]
    best = min(done, key=lambda result: result["val_loss"], default=None)
    lines = [f"| {method}, seed 0: {first} \\\\ {second} | " + " | ".join(f"{v:g}" for v in values[second]) + " |"]
    lines.append("| --- |" + " --- |" * len(values[second]))
    for v in values[first] if first != second else [None]:
        cells = [found.get((w if v is None else v, w)) for w in values[second]]
        texts = [
            "" if c is None else f"**{c['val_loss']:.4f}**" if c is best else f"{c['val_loss']:.4f}" for c in cells
        ]
        lines.append(f"| {'' if v is None else f'{v:g}'} | " + " | ".join(texts) + " |")
    edges = [
        key for key in (first, second) if best and float(runs[best["run"]][key]) in (values[key][0], values[key][-1])
    ]
    note = f"\nThe best is at the edge of the grid in {' and '.join(dict.fromkeys(edges))}.\n" if edges else ""
    return "\n".join(lines) + marks(done) + "\n" + note


def find_spikes(losses: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The steps (from 0) of spikes and their heights: the loss above another run's on the same batches, which takes the
    batch's own noise out, minus its running median over 51 steps, where that is over 6 of its usual deviations."""
    d = losses - reference
    padded = np.pad(d, 25, mode="edge")
    e = d - np.median(np.lib.stride_tricks.sliding_window_view(padded, 51), axis=-1)
    limit = max(0.05, 6 * 1.4826 * np.median(np.abs(e - np.median(e))))
    steps = np.flatnonzero(e > limit)
    return steps, e[steps]


def spikes(runs: list[str], seeds: list[int]) -> str:
    """A table of the spikes of each run. The steps kT+1 are the first with a new subspace, T = 100."""
    lines = ["| run | spikes by seed | highest, nats | share in the 10 steps after a change (chance: 10 %) |"]
    lines.append("| --- | --- | --- | --- |")
    for run in runs:
        counts, heights, after = [], [0.0], []
        for seed in seeds:
            one, reference = load(run, seed), load(REFERENCE, seed)
            if one and reference and run != REFERENCE:
                loss, other = (np.array(r["log"]["loss"]) for r in (one, reference))
                n = min(len(loss), len(other))  # one that diverged is shorter
                steps, height = find_spikes(loss[:n], other[:n])
                counts.append(f"{len(steps)}" + " (diverged)" * (n < len(other)))
                heights += height.tolist()
                after += ((steps >= 100) & (steps % 100 < 10)).tolist()
        if run != REFERENCE:
            share = f"{100 * statistics.mean(after):.0f} % of {len(after)}" if after else "-"
            lines.append(f"| {run} | {', '.join(counts) or 'not run'} | {max(heights):.2f} | {share} |")
    return "\n".join(lines)


def variance_ratios() -> dict[int, float]:
    """Var[φ²] / Var[ψ²] for columns of n entries: φ² is the mean of the entries' ψ² = 1/v, weighted by g²; v is the
    mean of 20 squares."""
    rng, ratios = np.random.default_rng(0), {}
    for n in (1, 5, 10, 50, 100):
        psi_sq, weights = 20 / rng.chisquare(20, (20_000, n)), rng.standard_normal((20_000, n)) ** 2
        ratios[n] = ((psi_sq * weights).sum(1) / weights.sum(1)).var() / psi_sq.var()
    return ratios


def variance(runs: list[str], seeds: list[int]) -> str:
    """The simulation beside 3/(n+2), which the proof of Theorem 2 gives."""
    lines = ["| n | simulated | 3/(n+2) | |", "| --- | --- | --- | --- |"]
    for n, ratio in variance_ratios().items():
        judged = "confirmed" if abs(ratio * (n + 2) / 3 - 1) < 0.1 else "**contradicted**"
        lines.append(f"| {n} | {ratio:.4f} | {3 / (n + 2):.4f} | {judged} |")
    return "\n".join(lines)


PAPER_60M = {"matrix cosine": 0.9922, "matrix Spearman": 0.9972, "matrix Kendall": 0.9662, "matrix Pearson": 0.9891}
PAPER_60M |= {"column cosine": 0.9273, "column Spearman": 0.9372, "column Kendall": 0.7942, "column Pearson": 0.8723}


def judge(name: str, values: list[float], nulls: list[float]) -> str:
    """The rules for the run at the paper's ratio of rank to width."""
    low, high = min(values), max(values)
    if name == "matrix Spearman":
        return "confirmed" if low >= 0.9 else "**contradicted**" if high < 0.7 else "not decidable here"
    if name == "within R, full":
        return (
            "**contradicted**"
            if high <= 0.2
            else "confirmed"
            if low > max(nulls) and low > 0.2
            else "not decidable here"
        )
    bound = {"matrix cosine": 0.97, "column cosine": 0.85}.get(name)
    if bound is None:
        return ""
    return (
        "confirmed"
        if low >= bound and low > max(nulls)
        else "**contradicted**"
        if high <= min(nulls)
        else "not decidable here"
    )


def similarity(runs: list[str], seeds: list[int]) -> str:
    """A row for each figure of `similarity.py`, with its mean and deviation over the seeds; a column for each run."""
    paths = {seed: stored.RESULTS.with_name(f"similarity-seed{seed}.json") for seed in seeds}
    for seed, path in paths.items():
        if all(load(run, seed) for run in runs):
            reduce_seed(stored.OUT, runs, seed, path)
    figures = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.exists()]
    if not figures:
        return "Not run."
    names = [name for name, value in figures[0]["fira-svd-r8"].items() if not isinstance(value, list)]
    lines = [
        "| figure | paper, 60M | " + " | ".join(run.removeprefix("fira-") for run in runs) + " | verdict, svd-r32 |"
    ]
    lines.append("| --- " * (len(runs) + 3) + "|")
    for name in names:
        cells = []
        for run in runs:
            values = [f[run][name] for f in figures if name in f[run]]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        values, nulls = ([f["fira-svd-r32"].get(key, 0.0) for f in figures] for key in (name, f"{name} null"))
        lines.append(f"| {name} | {PAPER_60M.get(name, '')} | {' | '.join(cells)} | {judge(name, values, nulls)} |")
    return f"Seeds {' '.join(str(s) for s in seeds if paths[s].exists())}, mean ± deviation.\n\n" + "\n".join(lines)


REDUCTIONS = {"spikes": spikes, "variance": variance, "similarity": similarity}
