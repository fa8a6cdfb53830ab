"""What is not one difference of losses: spikes, loss curves, variance of φ², variants."""

import math
import statistics

import numpy as np

from experiments.memory import table as memory
from experiments.similarity import table as similarity
from experiments.stored import interval, load

REFERENCE = "spike-lr0.002-adamw"
FIRST, T = 126, 100  # the first step of 750 that counts, 51 after the warm-up of 75; steps between changes of P


def find_spikes(losses: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The steps (from 0) at which spikes begin, from FIRST on, and their heights: the loss above another run's on
    the same batches, which takes the batch's own noise out, minus the median of the 51 steps before, where that is over
    6 of its usual deviations. What is at most 5 steps apart is one spike. And the highest rise, as a share of those 6.
    """
    d = losses - reference
    if len(d) <= FIRST:  # it diverged before that
        return np.array([], int), np.array([]), 0.0
    before = np.median(np.lib.stride_tricks.sliding_window_view(d[:-1], 51), axis=-1)[FIRST - 51 :]
    e = d[FIRST:] - before
    limit = max(0.05, 6 * 1.4826 * np.median(np.abs(e - np.median(e))))
    above = np.flatnonzero(e > limit)
    groups = [g for g in np.split(above, np.flatnonzero(np.diff(above) > 5) + 1) if len(g)]
    return np.array([FIRST + g[0] for g in groups], int), np.array([e[g].max() for g in groups]), e.max() / limit


def spikes(runs: list[str], seeds: list[int]) -> str:
    """A table of the spikes of each run, and whether Figures 2 and 3 hold. Step kT + 1 is the first with a new P."""
    counted = np.arange(FIRST, 750)
    chance = 100 * np.mean(counted % T < 10)
    head = f"share in the 10 steps after a change (chance: {chance:.0f} %)"
    lines = [f"| run | spikes by seed | highest, nats | highest rise / a spike's least | {head} |", "| --- " * 5 + "|"]
    found, shares = {}, {}
    for run in (run for run in runs if run != REFERENCE):
        counts, heights, rises, after = [], [], [], []
        for seed in seeds:
            if (one := load(run, seed)) and (reference := load(REFERENCE, seed)):
                loss, other = (np.array(r["log"]["loss"]) for r in (one, reference))
                n = min(len(loss), len(other))  # one that diverged is shorter
                steps, height, rise = find_spikes(loss[:n], other[:n])
                counts.append(f"{len(steps)}" + " (diverged)" * (n < len(other)))
                heights += height.tolist()
                rises.append(rise)
                after += (steps % T < 10).tolist()
        if counts:
            found[run], shares[run] = len(after), 100 * statistics.mean(after) if after else 0.0
            share = f"{shares[run]:.0f} % of {len(after)}" if after else "-"
            highest = f"{max(heights):.2f}" if heights else "-"
            lines.append(f"| {run} | {', '.join(counts)} | {highest} | {max(rises):.2f} | {share} |")
    if not found:
        return "Not run."
    if galores := [shares[run] for run in ("steps-galore", "steps-galore-add") if run in shares]:
        seen = "confirmed" if min(galores) > chance else "not seen here"
        lines.append(f"\nFigure 2, GaLore's spikes follow the changes of the subspace: {seen}.")
    kinds = "no-limiter", "fira"
    free, limited = (sum(found.get(f"spike-lr{lr}-{kind}", 0) for lr in ("0.01", "0.03")) for kind in kinds)
    if "spike-lr0.03-no-limiter" in found:
        seen = "confirmed" if free > limited else "not seen here" if free else "**contradicted**: none without it"
        lines.append(f"\nFigure 3, the limiter takes spikes away ({free} without it, {limited} with it): {seen}.")
    return "\n".join(lines)


def curves(runs: list[str], seeds: list[int]) -> str:
    """Validation losses on the way minus the last run's, paired by seed."""
    *ours, base = runs
    lines = []
    for run in ours:
        pairs = [(load(run, seed), load(base, seed)) for seed in seeds if load(run, seed) and load(base, seed)]
        pairs = [[dict(map(tuple, result["evaluations"])) for result in pair] for pair in pairs]
        if not pairs:
            continue
        steps = sorted(set.intersection(*(set(curve) for pair in pairs for curve in pair)))
        if not lines:
            lines = [f"| minus {base} at step | {' | '.join(map(str, steps))} | verdict |"]
            lines.append("| --- " * (len(steps) + 2) + "|")
        intervals = [interval([a[step] - b[step] for a, b in pairs]) for step in steps]
        first, half = intervals[0]
        judged = "confirmed" if first > half else "**contradicted**" if first < -half else "not decidable here"
        cells = " | ".join(f"{mean:+.3f} ± {half:.3f}" for mean, half in intervals)
        lines.append(f"| {run} | {cells} | AdamW leads at step {steps[0]}: {judged} |")
    return "\n".join(lines) or "Not run."


def variance_ratios() -> dict[int, float]:
    """Var[φ²] / Var[ψ²] for columns of n entries: φ² is the mean of the entries' ψ² = 1/v, weighted by g²; v is the
    mean of 20 squares."""
    rng, ratios = np.random.default_rng(0), {}
    for n in (1, 5, 10, 50, 100):
        psi_sq, weights = 20 / rng.chisquare(20, (20_000, n)), rng.standard_normal((20_000, n)) ** 2
        ratios[n] = ((psi_sq * weights).sum(1) / weights.sum(1)).var() / psi_sq.var()
    return ratios


def variance(*_) -> str:
    """The simulation beside 3/(n+2), which the proof of Theorem 2 gives."""
    lines = ["| n | simulated | 3/(n+2) | |", "| --- | --- | --- | --- |"]
    for n, ratio in variance_ratios().items():
        judged = "confirmed" if abs(ratio * (n + 2) / 3 - 1) < 0.1 else "**contradicted**"
        lines.append(f"| {n} | {ratio:.4f} | {3 / (n + 2):.4f} | {judged} |")
    return "\n".join(lines)


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
        ours, theirs = (max(pair[i]["state_bytes"] or 0 for pair in pairs.values()) for i in (0, 1))  # None: diverged
        loss = statistics.mean(a["val_loss"] for a, _ in pairs.values())
        difference = f"{mean:+.4f}" + f" ± {half:.4f}" * math.isfinite(half) if run != base else ""
        cells = [run, base, f"{loss:.4f}", difference, f"{ours:,}", f"{ours / theirs:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {' '.join(map(str, pairs))} |")
    lines.append("\nvariant-inner ran as Adagrad at Fira's learning rate, which is not its own: see `kinds`.")
    return "\n".join(lines)


REDUCTIONS = {"memory": memory, "similarity": similarity, "spikes": spikes, "curves": curves, "variance": variance}
REDUCTIONS |= {"variants": variants}
