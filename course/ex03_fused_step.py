"""Exercise 3: the same update with two products and no large temporary (20 minutes).

Fira adds to GaLore's update what P cannot see, each column i of it scaled by a number φᵢ:

    W ← W − η (α P N + S),       S = φ ∘ (G − P R)        (φ∘X: column i of X times φᵢ;  η holds c_t here)

As it stands that takes three products with P (PᵀG, P N, P R) and several matrices as large as W. On a GPU these
temporaries are what undoes the memory that was saved. But φ has one number for each column, so it commutes with P:

    φ∘(P R) = P (φ∘R)

Use that to write the update with two products, PᵀG and one P(…), and with nothing new as large as W: change W in
place (`addmm_`, `addcmul_`). What is as large as R, r×n, is small and may be new.

Then show that this depends on the shape of φ. Let φ have one number for each *row* of P R. Find P (m×r, orthonormal
columns), R (r×n) and rows (m numbers) such that rows∘(P R) ≠ P (b∘R), whatever numbers b you give the rows of R.
Smallest sizes are best: m = 2, r = 1, n = 1 will do.

Before you write the second one: in what space do the columns of P X lie, whatever X is?

    python course/check.py 3
"""

import torch
from torch import Tensor

# %% Write these


def fused_step(
    W: Tensor,  # (m, n) the weight: change it in place
    G: Tensor,  # (m, n) its gradient: leave it as it is
    P: Tensor,  # (m, r) orthonormal columns
    N: Tensor,  # (r, n) what Adam made of R = PᵀG
    phi: Tensor,  # (n,) a factor for each column
    lr: float,
    alpha: float,
) -> None:
    """W ← W − lr (alpha P N + phi∘(G − P R)), with two products and no new tensor as large as W."""
    raise NotImplementedError


def counterexample() -> tuple[Tensor, Tensor, Tensor]:
    """P (m, r), R (r, n) and rows (m,) for which rows∘(P R) is not P (b∘R) for any b (r,)."""
    raise NotImplementedError


# %% Look at it

if __name__ == "__main__":
    torch.manual_seed(0)
    P, G, phi = torch.linalg.qr(torch.randn(8, 3)).Q, torch.randn(8, 12), torch.rand(12)
    W, N = torch.zeros(8, 12), torch.randn(3, 12)
    fused_step(W, G, P, N, phi, lr=0.01, alpha=0.25)
    book = -0.01 * (0.25 * P @ N + phi * (G - P @ (P.T @ G)))
    print("largest difference to the formula:", (W - book).abs().max().item())
