"""What is not one difference of losses: spikes, similarity of scaling factors, variance of φ², variants."""

import json
import math
import statistics

import numpy as np

from experiments import stored
from experiments.memory import table
from experiments.similarity import reduce_seed
from experiments.stored import interval, load

REFERENCE = "spike-lr0.002-adamw"


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


LEFT_OUT = ("MSE", "step 20 K", "step 20 P", "φ) K", "φ) P", "φ) from", "φ) cosine null")  # the stored files have them
LEGEND = """X is G − P R. Matrix and column: φ of the run beside φ of the run at full rank, time means after warm-up;
"null" is the 97.5 % point with the items exchanged at random. Within: Spearman's ρ over the columns of a matrix. Level:
the geometric mean of φ(R)/φ(G) and φ(R)/φ(X), beside what it would be if all entries had one size; the prediction,
which is not the paper's, is that R/X is below 1: Fira scales the rest less than Adam would."""
PAPER_60M = {"matrix cosine": 0.9922, "matrix Spearman": 0.9972, "matrix Kendall": 0.9662, "matrix Pearson": 0.9891}
PAPER_60M |= {"column cosine": 0.9273, "column Spearman": 0.9372, "column Kendall": 0.7942, "column Pearson": 0.8723}


def judge(name: str, values: list[float], nulls: list[float]) -> str:
    """The rules for the run at the paper's ratio of rank to width."""
    low, high = min(values), max(values)
    bound = {"matrix cosine": 0.97, "column cosine": 0.85}.get(name, math.inf)
    rules = {  # when it is confirmed, and when contradicted
        "matrix Spearman": (low >= 0.9, high < 0.7),
        "level R/X": (high < 1, low >= 1),  # predicted here, not by the paper
        "within R, full": (low > max(*nulls, 0.2), high <= 0.2),
        "matrix cosine": (low >= bound and low > max(nulls), high <= min(nulls)),
        "column cosine": (low >= bound and low > max(nulls), high <= min(nulls)),
    }
    yes, no = rules.get(name, (False, False))
    return "confirmed" if yes else "**contradicted**" if no else "not decidable here" if name in rules else ""


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
    names = [name for name in names if not any(word in name for word in LEFT_OUT)]
    lines = [
        "| figure | paper, 60M | " + " | ".join(run.removeprefix("fira-") for run in runs) + " | verdict, svd-r32 |"
    ]
    lines.append("| --- " * (len(runs) + 3) + "|")
    for name in names:
        cells = []
        for run in runs:
            values = [f[run][name] for f in figures if np.isfinite(f[run].get(name, np.nan))]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        values, nulls = ([f["fira-svd-r32"].get(key, 0.0) for f in figures] for key in (name, f"{name} null"))
        lines.append(f"| {name} | {PAPER_60M.get(name, '')} | {' | '.join(cells)} | {judge(name, values, nulls)} |")
    seen = " ".join(str(seed) for seed in seeds if paths[seed].exists())
    return f"Seeds {seen}, mean ± deviation. {LEGEND}\n\n" + "\n".join(lines)


BASES = {"variant-two_sided": "galore", "variant-stochastic_rounding": "default-bf16"}  # of the others: default


def variants(runs: list[str], seeds: list[int]) -> str:
    """A row for each run beside its base: loss, paired difference, bytes of the state. Times: `variant_steps.py`."""
    head = "| run | beside | validation loss | difference | state bytes | of its base's | seeds |"
    lines = [head, "| --- " * 7 + "|"]
    for run in runs:
        base = BASES.get(run, "default")
        pairs = {seed: (load(run, seed), load(base, seed)) for seed in seeds if load(run, seed) and load(base, seed)}
        if not pairs:
            lines.append(f"| {run} | {base} | not run | | | | |")
            continue
        mean, half = interval([a["val_loss"] - b["val_loss"] for a, b in pairs.values()])
        ours, theirs = (max(pair[i]["state_bytes"] for pair in pairs.values()) for i in (0, 1))
        loss = statistics.mean(a["val_loss"] for a, _ in pairs.values())
        difference = f"{mean:+.4f}" + f" ± {half:.4f}" * math.isfinite(half) if run != base else ""
        cells = [run, base, f"{loss:.4f}", difference, f"{ours:,}", f"{ours / theirs:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {' '.join(map(str, pairs))} |")
    return "\n".join(lines)


REDUCTIONS = {"memory": table, "spikes": spikes, "variance": variance, "similarity": similarity, "variants": variants}
