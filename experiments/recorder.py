"""What `python -m experiments.patches record ...` keeps of a run for `similarity.py`: columns' norms, every 20 steps.

Of each column i of each matrix ‖R_i‖, ‖G_i‖, ‖X_i‖ with X = G − P R, and the norms of what Adam makes of R, of G and of
X. The moments of G and X are shadows, kept beside the training and without effect on it.
"""

from pathlib import Path

import numpy as np
import torch

import fira

EVERY, MATRICES = 20, 28  # steps; of the nano model


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
