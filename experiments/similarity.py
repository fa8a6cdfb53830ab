"""Scaling factors φ of the subspace beside the whole gradient's: the paper's Tables 1 and 10, and what they omit.

    python -m experiments.paper T1              # trains with the recorder, reduces, prints

The recorder keeps, every 20th step and for each column i of each matrix, ‖R_i‖, ‖G_i‖, ‖X_i‖ with X = G − P R, and the
norms of what Adam makes of R, of G and of X; the moments of G and X are shadows, kept beside the training and without
effect on it. φ is the quotient of the two norms. c_t is left out: it is the same for all. From this come, per seed:
  paper's way   time means of two runs, rank r and full rank, compared over matrices and over columns, after warm-up
  within        Spearman's ρ over the columns of a matrix, the mean over matrices: what scaling by column needs
  null          the 97.5 % point of the same figure with the columns exchanged at random inside of each matrix
  level         the geometric mean of φ(R)/φ(G) and φ(R)/φ(X), and √(r/m)‖G‖/‖R‖, √(r/(m−r))‖X‖/‖R‖, what they would
                be if all entries of what Adam makes had one size: below 1, Fira scales the rest less than Adam would
"""

import json
from pathlib import Path

import numpy as np
import torch

import fira
from experiments.coefficients import COEFFICIENTS, cosine, pearson, ranks, spearman

EVERY, WARMUP, MATRICES = 20, 160, 28  # steps, steps, of the nano model


class Recorder:
    """`update` stands in for `fira.fira_update`, which it calls; the matrices come in the same order in each step."""

    def __init__(self):
        self.calls, self.moments, self.rows, self.last, self.shapes = 0, {}, [], [], {}

    def adam(self, key, X: torch.Tensor) -> torch.Tensor:
        M, V = self.moments.setdefault(key, (torch.zeros_like(X), torch.zeros_like(X)))
        M.lerp_(X, 0.1)
        V.mul_(0.999).addcmul_(X, X, value=0.001)
        return M / V.sqrt().add_(1e-8)

    @torch.no_grad()
    def update(self, W, G, P, R, N, prev_norm, *args, original=fira.fira_update, **options):
        step, matrix = self.calls // MATRICES + 1, self.calls % MATRICES
        self.calls += 1
        X = G if P is None else G - P @ R
        adam_G, adam_X = (N, N) if P is None else (self.adam((matrix, "G"), G), self.adam((matrix, "X"), X))
        if step % EVERY == 0:
            self.last.append(torch.stack([fira.column_norms(x) for x in (R, G, X, N, adam_G, adam_X)]).numpy())
            self.shapes[matrix] = (len(R), *G.shape)
            if matrix == MATRICES - 1:
                self.rows.append(np.concatenate(self.last, axis=1))
                self.last = []
        return original(W, G, P, R, N, prev_norm, *args, **options)

    def save(self, path: Path) -> None:
        """norms (records, 6, columns) of R, G, X and of Adam of each; shapes (28, 3): r, m and n of each matrix."""
        np.savez_compressed(path, norms=np.stack(self.rows), shapes=[self.shapes[i] for i in range(MATRICES)])


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
    for level, (a, b) in {"matrix": matrices, "matrix (mean φ)": means, "column": (phi, phi_full)}.items():
        for window, first in {"": late, " from step 20": 0}.items():
            x, y = a[first:].mean(0), b[first:].mean(0)
            figures |= {f"{level}{window} {name}": f(x, y) for name, f in COEFFICIENTS.items()}
            figures[f"{level}{window} MSE"] = 2 * (1 - figures[f"{level}{window} cosine"]) / len(x)
        x, y = a[late:].mean(0), b[late:].mean(0)
        figures[f"{level} cosine null"] = float(np.quantile([cosine(x, rng.permutation(y)) for _ in range(200)], 0.975))
        for name, f in (("cosine", cosine), ("Spearman", spearman)):
            figures[f"{level} {name} by step"] = float(np.mean([f(*pair) for pair in zip(a[late:], b[late:])]))
    pairs = {"R, full": (phi, phi_full), "R, G": (phi, phi_G), "R, X": (phi, phi_X), "G, X": (phi_G, phi_X)}
    for name, (a, b) in pairs.items():
        x, y = a[late:].mean(0), b[late:].mean(0)
        figures[f"within {name}"] = float(within(x, y, starts))
        figures[f"within {name} null"] = float(np.quantile(within(x, y, starts, 1000), 0.975))
        figures[f"cosine {name} by step"] = [cosine(*pair) for pair in zip(a, b)]
    tiny, mean = 1e-12, lambda x: float(np.exp(x[late:].mean()))
    if (r < m).all():
        log_R, log_G, log_X = np.log(R + tiny), np.log(G + tiny), np.log(X + tiny)
        figures["level R/G"] = mean(np.log(phi + tiny) - np.log(phi_G + tiny))
        figures["level R/X"] = mean(np.log(phi + tiny) - np.log(phi_X + tiny))
        figures["level R/G, one size"] = mean(np.log(r / m) / 2 + log_G - log_R)
        figures["level R/X, one size"] = mean(np.log(r / (m - r)) / 2 + log_X - log_R)
        figures["correlation of log ‖N‖"] = pearson(
            np.log(N + tiny)[late:].mean(0), np.log(adam_G + tiny)[late:].mean(0)
        )
        figures["correlation of log ‖R‖"] = pearson(log_R[late:].mean(0), log_G[late:].mean(0))
    figures["energy"] = (np.square(R).sum(1) / np.square(G).sum(1)).tolist()
    figures["phi of matrices"] = matrices[0].tolist()
    return figures


def reduce_seed(folder: Path, runs: list[str], seed: int, path: Path) -> None:
    """Write the figures of a seed's runs; nothing if a record is missing."""
    records = {run: folder / f"{run}-seed{seed}" / "record.npz" for run in runs}
    if all(record.exists() for record in records.values()):
        loaded = {run: dict(np.load(record)) for run, record in records.items()}
        figures = {run: reduce(record, loaded["fira-r128"]) for run, record in loaded.items()}
        text = json.dumps(figures, indent=None, default=float)
        path.write_text(
            json.dumps(json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"))) + "\n", encoding="utf-8"
        )
