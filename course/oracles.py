"""What the checks are made of: a fault in one sentence, seeded matrices, and oracles that are not the student's formulas."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "mv", "addmv", "addmv_", "dot")


class Fault(Exception):
    """What is wrong with an answer: one sentence."""


def must(holds, sentence: str) -> None:
    if not holds:
        raise Fault(sentence)


def off(X, Y) -> float:
    """How far X is from Y, relative to Y; inf where the shapes differ or X is not finite."""
    if X.shape != Y.shape or not X.isfinite().all():
        return math.inf
    return ((X.double() - Y).norm() / (Y.norm() + 1e-300)).item()


def size(X) -> str:
    return "×".join(map(str, X.shape))


def randn(*shape, seed: int = 0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(m: int, r: int, seed: int = 0):
    return torch.linalg.qr(randn(m, r, seed=seed)).Q


def moments(Rs) -> tuple:
    """Adam's M and V after the last of the R's, as sums and not as recursions."""
    T = len(Rs)
    M = sum(0.1 * 0.9 ** (T - s) * R for s, R in enumerate(Rs, 1))
    return M, sum(0.001 * 0.999 ** (T - s) * R.square() for s, R in enumerate(Rs, 1))


def inside(kind: str):
    """An optimizer inside the subspace: a function of R that gives N, and remembers."""
    seen = []

    def step(R):
        seen.append(R)
        if kind == "SGD":
            return R
        if kind == "momentum":
            return sum(0.9 ** (len(seen) - s) * R for s, R in enumerate(seen, 1))
        (M, V), t = moments(seen), len(seen)
        return math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * M / (V.sqrt() + 1e-30)

    return step


class Counter(TorchDispatchMode):
    """Counts the products of matrices, and the numbers in the largest tensor that is made."""

    products = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in PRODUCTS
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.numel())
        return out
