"""Scaling factors φ of the subspace beside the whole gradient's: the paper's Tables 1 and 10, and what they omit.

    python -m experiments.paper T1              # trains with the recorder, reduces, prints

φ of R, of G and of X = G − P R is ‖what Adam makes of it‖ / ‖it‖, of a column or of a matrix, from the norms that
`recorder.py` keeps. c_t is left out: it is the same for all. LEGEND says what the figures are. "By step" is the mean of
the steps' own coefficients; "one size" is √(r/m) ‖G‖/‖R‖ or √(r/m) ‖X‖/‖R‖.
"""

import json
import math
import statistics
from pathlib import Path

import numpy as np

from experiments import stored
from experiments.coefficients import COEFFICIENTS, cosine, pearson, ranks, spearman
from experiments.recorder import EVERY
from experiments.stored import load

WARMUP = 160  # steps, a little above the 150 of the learning rate
LEGEND = """φ(R) of each run beside φ of the run at full rank; X is G − P R. Matrix and column: time means over all
steps, as in the paper; "null" is the 97.5 % point with the items exchanged at random. Within: Spearman's ρ over the
columns of a matrix. Level: the geometric mean of φ(R)/φ(G) and of φ(R)/φ(X), beside what chance makes of it (a random
P) and what it would be if all entries of what Adam makes had one size. The prediction, which is not the paper's, is
that both lie below chance: Fira scales the rest less than Adam would. (Table 1's MSE says nothing more than its
cosine: each of its eight entries is 2 (1 − cosine) / k for k items, to the digit that is printed.)"""
PAPER_60M = {"matrix cosine": 0.9922, "matrix Spearman": 0.9972, "matrix Kendall": 0.9662, "matrix Pearson": 0.9891}
PAPER_60M |= {"column cosine": 0.9273, "column Spearman": 0.9372, "column Kendall": 0.7942, "column Pearson": 0.8723}


def within(x: np.ndarray, y: np.ndarray, starts: np.ndarray, shuffles: int = 0) -> np.ndarray:
    """The mean over the matrices of Spearman's ρ over its columns; with shuffles, of exchanged columns, as many."""
    rng, found = np.random.default_rng(0), []
    for a, b in zip(np.split(x, starts[1:]), np.split(y, starts[1:])):
        if shuffles:
            order = rng.permuted(np.tile(np.arange(len(a)), (shuffles, 1)), axis=1)
            centred = ranks(b) - (len(b) - 1) / 2
            found.append(centred[order] @ (ranks(a) - (len(a) - 1) / 2) / (centred @ centred))
        else:
            found.append(spearman(a, b))
    return np.mean(found, axis=0)


def reduce(record: dict, full: dict) -> dict:
    """All figures of a run, and of its comparison with the run of full rank."""
    R, G, X, N, adam_G, adam_X = record["norms"].swapaxes(0, 1).astype(float)  # (records, columns) each
    r, m, n = record["shapes"].T.astype(float)
    starts, late = np.concatenate([[0], np.cumsum(n)[:-1]]).astype(int), WARMUP // EVERY
    r, m = np.repeat(r, n.astype(int)), np.repeat(m, n.astype(int))
    phi, phi_G, phi_X = N / (R + 1e-8), adam_G / (G + 1e-8), adam_X / (X + 1e-8)
    phi_full = full["norms"][:, 3].astype(float) / (full["norms"][:, 0] + 1e-8)

    def frobenius(norms):
        return np.sqrt(np.add.reduceat(np.square(norms, dtype=float), starts, axis=1))  # (records, matrices)

    matrices = frobenius(N) / frobenius(R), frobenius(full["norms"][:, 3]) / frobenius(full["norms"][:, 0])
    means = np.add.reduceat(phi, starts, axis=1) / n, np.add.reduceat(phi_full, starts, axis=1) / n
    figures, rng = {}, np.random.default_rng(0)
    x, y = (phi.mean(0) for phi in means)
    figures |= {f"matrix (mean φ) {name}": COEFFICIENTS[name](x, y) for name in ("cosine", "Spearman")}
    for level, (a, b) in {"matrix": matrices, "column": (phi, phi_full)}.items():
        x, y = a.mean(0), b.mean(0)
        figures |= {f"{level} {name}": f(x, y) for name, f in COEFFICIENTS.items()}
        figures[f"{level} cosine null"] = float(np.quantile([cosine(x, rng.permutation(y)) for _ in range(200)], 0.975))
        for name, f in (("cosine", cosine), ("Spearman", spearman)):
            figures[f"{level} {name} after warm-up"] = f(a[late:].mean(0), b[late:].mean(0))
            figures[f"{level} {name} by step"] = float(np.mean([f(*pair) for pair in zip(a[late:], b[late:])]))
    pairs = {"R, full": (phi, phi_full), "R, G": (phi, phi_G), "R, X": (phi, phi_X), "G, X": (phi_G, phi_X)}
    for name, (a, b) in pairs.items():
        x, y = a[late:].mean(0), b[late:].mean(0)
        figures[f"within {name}"] = float(within(x, y, starts))
        if name == "R, full":
            figures[f"within {name} null"] = float(np.quantile(within(x, y, starts, 1000), 0.975))
        figures[f"cosine {name} by step"] = [cosine(*pair) for pair in zip(a, b)]
    tiny, mean = 1e-12, lambda x: float(np.exp(x[late:].mean()))
    spread = np.log(phi + tiny).std(axis=1)  # over the columns
    figures["spread of log φ, before / after step 160"] = float(spread[:late].mean() / spread[late:].mean())
    if (r < m).all():
        log_R, log_G, log_X = np.log(R + tiny), np.log(G + tiny), np.log(X + tiny)
        apart = np.mean(np.subtract(figures["cosine G, X by step"], figures["cosine R, G by step"])[late:])
        figures["cosine of φ(G), φ(X) − of φ(R), φ(G)"] = float(apart)
        figures["level R/G"] = mean(np.log(phi + tiny) - np.log(phi_G + tiny))
        figures["level R/X"] = mean(np.log(phi + tiny) - np.log(phi_X + tiny))
        figures |= {"level R/G chance": 1.0, "level R/X chance": float(np.sqrt(1 - r / m).mean())}
        figures["level R/G one size"] = mean(np.log(r / m) / 2 + log_G - log_R)
        figures["level R/X one size"] = mean(np.log(r / m) / 2 + log_X - log_R)
        figures["correlation of log ‖N‖"] = pearson(*(np.log(x + tiny)[late:].mean(0) for x in (N, adam_G)))
        figures["correlation of log ‖R‖"] = pearson(log_R[late:].mean(0), log_G[late:].mean(0))
    figures["energy"] = (np.square(R).sum(1) / np.square(G).sum(1)).tolist()
    figures["phi of matrices"] = matrices[0].tolist()
    return figures


def reduce_seed(runs: list[str], seed: int, path: Path) -> None:
    """Write the figures of a seed's runs; nothing if a record is missing."""
    records = {run: stored.OUT / f"{run}-seed{seed}" / "record.npz" for run in runs}
    if all(record.exists() for record in records.values()):
        loaded = {run: dict(np.load(record)) for run, record in records.items()}
        figures = {run: reduce(record, loaded["fira-r128"]) for run, record in loaded.items()}
        rounded = json.loads(json.dumps(figures, default=float), parse_float=lambda x: float(f"{float(x):.4g}"))
        path.write_text(json.dumps(rounded) + "\n", encoding="utf-8")


def judge(name: str, values: list[float], figures: list[dict]) -> str:
    """The rules for the run at the paper's ratio of rank to width; they must hold for all seeds alike."""
    low, high = min(values), max(values)
    nulls = [f.get(f"{name} null", f.get(f"{name} chance", 0.0)) for f in figures]
    rules = {  # when it is confirmed, and when contradicted
        "matrix cosine": (low >= 0.97, high <= max(nulls)),
        "column cosine": (low >= 0.85, high <= max(nulls)),
        "matrix Spearman": (low >= 0.9, high < 0.7),
        "within R, full": (low > max(*nulls, 0.2), high <= 0.2),
        "cosine of φ(G), φ(X) − of φ(R), φ(G)": (low > 0, high < 0),  # Figures 8 and 9
        "spread of log φ, before / after step 160": (low > 1, high < 1),  # Figure 10
        "level R/G": (high < min(nulls), low >= max(nulls)),  # predicted here, not by the paper
        "level R/X": (high < min(nulls), low >= max(nulls)),
    }
    yes, no = rules.get(name, (False, False))
    between = "above chance, below the bound" if nulls[0] and low > max(nulls) else "not decidable here"
    return "confirmed" if yes else "**contradicted**" if no else between if name in rules else ""


def table(runs: list[str], seeds: list[int]) -> str:
    """A row for each figure, with its mean and deviation over the seeds; a column for each run."""
    paths = {seed: stored.RESULTS.with_name(f"similarity-seed{seed}.json") for seed in seeds}
    for seed, path in paths.items():
        if all(load(run, seed) for run in runs):
            reduce_seed(runs, seed, path)
    figures = [json.loads(path.read_text(encoding="utf-8")) for path in paths.values() if path.exists()]
    if not figures:
        return "Not run."
    head = ["figure", "paper, 60M", *(run.removeprefix("fira-") for run in runs), "verdict, svd-r32"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name in [name for name, value in figures[0]["fira-svd-r32"].items() if not isinstance(value, list)]:
        cells = []
        for run in runs:
            values = [f[run][name] for f in figures if math.isfinite(f[run].get(name, math.nan))]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        ours = [f["fira-svd-r32"] for f in figures]
        verdict = judge(name, [f[name] for f in ours], ours)
        lines.append(f"| {name} | {PAPER_60M.get(name, '')} | {' | '.join(cells)} | {verdict} |")
    seen = " ".join(str(seed) for seed in seeds if paths[seed].exists())
    return f"Seeds {seen}, mean ± deviation. {LEGEND}\n\n" + "\n".join(lines)
