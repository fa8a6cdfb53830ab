"""What the checks are made of: faults, seeded matrices in float64, and oracles."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Fault(Exception):
    """What is wrong with an answer: what came out, what should, and a question that helps."""


def must(holds, sentence: str) -> None:
    if not holds:
        raise Fault(sentence)


def same(X, want, name: str, question: str, limit: float = 1e-10) -> None:
    came = f"{name} is off by {off(X, want):.2g} of its size, should be 0"
    came = came if X.shape == want.shape else f"{name} is {tuple(X.shape)}, should be {tuple(want.shape)}"
    must(off(X, want) < limit, f"{came}: {question}")


def off(X, Y) -> float:
    """How far X is from Y, relative to Y; inf where the shapes differ or X is not finite."""
    same_kind = X.shape == Y.shape and X.isfinite().all()
    return ((X.double() - Y).norm() / (Y.norm() + 1e-300)).item() if same_kind else float("inf")


def randn(*shape, seed: int = 0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(m: int, r: int, seed: int = 0):
    """Random orthonormal columns (m, r)."""
    return torch.linalg.qr(randn(m, r, seed=seed)).Q


def inner(kind: str, Rs):
    """N after the last of the R's, from sums and not step by step: of "SGD", "momentum", or "Adam" without c_t."""
    ages = torch.arange(len(Rs) - 1, -1, -1, dtype=torch.float64)[:, None, None]
    if kind == "Adam":
        return (0.1 * 0.9**ages * Rs).sum(0) / ((0.001 * 0.999**ages * Rs**2).sum(0).sqrt() + 1e-30)
    return (0.9**ages * Rs).sum(0) if kind == "momentum" else Rs[-1]


class Counter(TorchDispatchMode):
    """Counts the products of matrices, and the numbers in the largest tensor that is made."""

    products = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket.__name__.strip("_") in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv")
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, out.numel())
        return out
