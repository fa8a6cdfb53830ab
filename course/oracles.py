"""What the checks are made of: faults, seeded matrices, and oracles written another way than the exercises ask for."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "mv", "addmv", "addmv_", "dot")


class Fault(Exception):
    """What is wrong with an answer: what came out, what should, and a question that helps."""


def must(holds, sentence: str) -> None:
    if not holds:
        raise Fault(sentence)


def off(X, Y) -> float:
    """How far X is from Y, relative to Y; inf where the shapes differ or X is not finite."""
    if X.shape != Y.shape or not X.isfinite().all():
        return math.inf
    return ((X.double() - Y).norm() / (Y.norm() + 1e-300)).item()


def size(X) -> str:
    return "×".join(map(str, X.shape)) or "a single number"


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def eye(m: int):
    return torch.eye(m, dtype=torch.float64)


def randn(*shape, seed: int = 0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(m: int, r: int, seed: int = 0):
    """Random orthonormal columns (m, r)."""
    return torch.linalg.qr(randn(m, r, seed=seed)).Q


def moments(Rs) -> tuple:
    """Adam's M and V after the last of the R's, as sums and not step by step."""
    T = len(Rs)
    M = sum(0.1 * 0.9 ** (T - s) * R for s, R in enumerate(Rs, 1))
    return M, sum(0.001 * 0.999 ** (T - s) * R.square() for s, R in enumerate(Rs, 1))


class Inner:
    """An optimizer inside the subspace, "SGD", "momentum" or "Adam": called with R it gives N, and remembers."""

    def __init__(self, kind: str):
        self.kind, self.Rs = kind, []

    def __call__(self, R):
        self.Rs.append(R)
        t = len(self.Rs)
        if self.kind == "SGD":
            return R
        if self.kind == "momentum":
            return sum(0.9 ** (t - s) * R for s, R in enumerate(self.Rs, 1))
        M, V = moments(self.Rs)
        return math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * M / (V.sqrt() + 1e-30)


class Counter(TorchDispatchMode):
    """Counts the products of matrices, and the numbers in the largest tensor that is made."""

    products = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = (*args, *(kwargs or {}).values())
        given = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket.__name__ in PRODUCTS
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.numel())
        return out
