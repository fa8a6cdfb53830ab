"""Exercise 2: Adam in a subspace (15 minutes).

GaLore is Adam for R = PᵀG instead of G. It goes on from the moments M and V of the step before, both as large as R:

    R = PᵀG
    M ← β₁ M + (1 − β₁) R
    V ← β₂ V + (1 − β₂) R²                    elementwise
    N = M / (√V + ε)
    W ← W − η c_t α P N,     c_t = √(1 − β₂ᵗ) / (1 − β₁ᵗ)

t counts from 1. c_t is Adam's bias correction: it stands with the learning rate η, as in the authors' code, and not in
N. P brings N back to the size of W; α = 0.25 is GaLore's own factor. P stays for T steps and is then chosen anew, but
your function need not know: it takes the P that it is given.

How large is the state? You count it in exercise 6; see for now that nothing here but W, G and P N is as large as W.

Before you run the check: let r = m, so that nothing of G is lost. Is GaLore with α = 1 then Adam, for every P?
"""

import torch


# %% Write this
def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
    """W, M and V after step t, from W and G (m, n), P (m, r), and M and V (r, n) of step t − 1 (at first 0)."""
    raise NotImplementedError


# %% Look at it: 300 steps towards a target of which W can reach only a part. Which?
if __name__ == "__main__":
    target, P = torch.randn(8, 12), torch.eye(8)[:, :3]
    W, M, V = torch.zeros(8, 12), torch.zeros(3, 12), torch.zeros(3, 12)
    for t in range(1, 301):
        W, M, V = galore_step(W, W - target, P, M, V, t, lr=0.1)
    print("distance of each row:", (W - target).norm(dim=1))
