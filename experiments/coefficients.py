"""Four measures of likeness, with numpy only."""

import numpy as np


def ranks(x: np.ndarray) -> np.ndarray:
    """The ranks of the values along the last axis; equal ones have their mean rank."""
    order = np.argsort(x, axis=-1, kind="stable")
    plain = np.empty(x.shape)
    np.put_along_axis(plain, order, np.broadcast_to(np.arange(x.shape[-1], dtype=float), x.shape), axis=-1)
    if x.ndim == 1 and len(np.unique(x)) < len(x):
        _, group = np.unique(x, return_inverse=True)
        plain = (np.bincount(group, plain) / np.bincount(group))[group]
    return plain


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return pearson(ranks(x), ranks(y))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's τ_b: over all pairs, those in the same order minus those in the other, ties taken out."""
    both = ties_x = ties_y = 0.0
    for i in range(len(x) - 1):
        a, b = np.sign(x[i + 1 :] - x[i]), np.sign(y[i + 1 :] - y[i])
        both, ties_x, ties_y = both + a @ b, ties_x + a @ a, ties_y + b @ b
    return float(both / np.sqrt(ties_x * ties_y))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


COEFFICIENTS = {"cosine": cosine, "Spearman": spearman, "Kendall": kendall, "Pearson": pearson}
