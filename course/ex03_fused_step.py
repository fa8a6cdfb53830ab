"""Exercise 3: the same update with two products and no large temporary (30 minutes).

Fira adds to GaLore's update what P cannot see, each column i of it scaled by a number φᵢ:

    W ← W − η (α P N + S),       S = φ ∘ (G − P R)        (φ∘X: column i of X times φᵢ;  η holds c_t here)

As it stands that takes three products with P (PᵀG, P N, P R) and several matrices as large as W. On a GPU these
temporaries are what undoes the memory that was saved. But φ has one number for each column, so it commutes with P:

    φ∘(P R) = P (φ∘R)

Use that to write the update with two products, PᵀG and one P(…), and with nothing new as large as W: change W in
place (`addmm_`, `addcmul_`; their keywords `alpha` and `value` are factors, not our α). What is as large as R, r×n, is
small and may be new.

Then show that this depends on the shape of φ. Let φ have one number for each *row* of P R. Find P (m×r, orthonormal
columns), R (r×n) and rows (m numbers) such that rows∘(P R) ≠ P (b∘R), whatever numbers b you give the rows of R.
Smallest sizes are best: m = 2, r = 1, n = 1 will do.

Before you write the second one: in what space do the columns of P X lie, whatever X is?
"""

import torch  # noqa: F401 (for your counterexample)


# %% Write these
def fused_step(W, G, P, N, phi, lr, alpha):
    """W ← W − lr (alpha P N + phi∘(G − P R)) in place: W, G (m, n), P (m, r), N (r, n) made of R = PᵀG, phi (n,)."""
    raise NotImplementedError


def counterexample():
    """P (m, r), R (r, n) and rows (m,), tensors, for which rows∘(P R) is not P (b∘R) for any b (r,)."""
    raise NotImplementedError
