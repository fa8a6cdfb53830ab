"""One solution of each exercise, with why. No check reads this file: a teacher may delete it."""

import math

import torch
from torch import Tensor

# 1. The rank-r matrix nearest to G is made of its r leading singular vectors (Eckart and Young); any other basis of the
#    same space keeps the same energy. The short side is projected because P has short·r numbers.


def project(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    if G.shape[0] <= G.shape[1]:
        P = U[:, :r]
        return P, P.T @ G
    P = Vt[:r].T
    return P, G @ P


# 2. Nothing here is larger than W but W: the moments are R's. At r = m a P that turns the axes makes another optimizer,
#    because Adam divides element by element, and elements depend on the axes.


def galore_step(
    W: Tensor, G: Tensor, P: Tensor, M: Tensor, V: Tensor, t: int,
    lr: float = 0.01, alpha: float = 0.25, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    R = P.T @ G
    M = beta1 * M + (1 - beta1) * R
    V = beta2 * V + (1 - beta2) * R**2
    N = M / (V.sqrt() + eps)
    c_t = math.sqrt(1 - beta2**t) / (1 - beta1**t)
    return W - lr * c_t * alpha * P @ N, M, V


# 3. α P N + φ∘(G − P R) = P (α N − φ∘R) + φ∘G. The columns of P X always lie in the span of P; a factor for each row
#    takes them out of it, a factor for each column cannot.


def fused_step(W: Tensor, G: Tensor, P: Tensor, N: Tensor, phi: Tensor, lr: float, alpha: float) -> None:
    R = P.T @ G
    W.addmm_(P, alpha * N - phi * R, alpha=-lr)
    W.addcmul_(G, phi, value=-lr)


def counterexample() -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((2, 1), 0.5).sqrt(), torch.ones(1, 1), torch.tensor([1.0, 2.0])


# 4. SGD has N = R, so φ = 1 and the parts add up to G again. Momentum's N is an average over steps and the rest of the
#    gradient is this step's alone: φ gives it the right length, not the right direction.


def scaling(N: Tensor, R: Tensor, eps: float = 1e-8) -> Tensor:
    return N.norm(dim=0) / (R.norm(dim=0) + eps)


# 5. The limited norm is kept, or a spike would be let through in its second step. A norm of zero is not: it would cap S
#    near zero for 1,851 steps. If the whole gradient is 50 times too large, R is too, and Adam's ‖N‖ hardly grows:
#    φ = ‖N‖/‖R‖ falls and does most of the limiter's work. Only what P does not see needs it.


def limit(S: Tensor, prev_norm: float | None, gamma: float = 1.01) -> tuple[Tensor, float | None]:
    norm = S.norm().item()
    if norm == 0:
        return S, prev_norm
    if prev_norm is not None:
        factor = gamma / max(norm / (prev_norm + 1e-8), gamma)
        S, norm = S * factor, norm * factor
    return S, norm


def spike(G: Tensor, P: Tensor, factor: float) -> Tensor:
    inside = P @ (P.T @ G)
    return inside + factor * (G - inside)
