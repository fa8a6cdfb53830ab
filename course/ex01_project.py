"""Exercise 1: see a gradient from a subspace (15 minutes).

Adam remembers two numbers for every weight. GaLore and Fira remember them only for R, the gradient as it is seen from
a subspace of r dimensions. This exercise makes that subspace.

Let G (m×n) be the gradient of a weight matrix with m ≤ n. P (m×r) holds the r leading left singular vectors of G:

    G = U diag(σ) Vᵀ        P = the first r columns of U        R = PᵀG  (r×n)

PR is then the best approximation of G that has rank r. What part of G it keeps is called the energy,
‖PR‖² / ‖G‖² = (σ₁² + … + σᵣ²) / (σ₁² + … + σₘ²).

If G is tall (m > n), project the other side, which is now the short one: P (n×r) holds the leading right singular
vectors, R = GP (m×r), and R Pᵀ stands for PR. The short side makes P small. For a square G take the left side.

Before you write: G is 6×10 of random numbers and r = 3. Does PR keep less than half of the energy, half, or more? (The
checks give float64 and compare to 1e-10: change no dtype.)

    python course/check.py 1            check your function
    python course/check.py 1 --hint     the first of three hints; --hint 2 and --hint 3 are the others
"""

import torch


# %% Write this
def project(G, r):
    """P and R of a gradient G (m, n): P (m, r) and R (r, n), or for a tall G P (n, r) and R (m, r)."""
    raise NotImplementedError


# %% Look at it: run this file, or this cell
if __name__ == "__main__":
    G = torch.randn(6, 10)
    P, R = project(G, 3)
    print("PᵀP, which should be the identity:\n", P.T @ P)
    print("energy:", ((P @ R).norm() / G.norm()).item() ** 2)
    print("what P still sees of the rest, which should be 0:", (P.T @ (G - P @ R)).norm().item())
    print("R of a tall gradient:", project(G.T, 3)[1].shape)
