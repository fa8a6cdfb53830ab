"""Exercise 4: what makes Fira more than GaLore with SGD beside it (15 minutes).

GaLore throws away G − P R, what P cannot see. Fira uses it, but has no moments for it. Its idea: Adam multiplies a
column of the gradient by about the same number inside the subspace and outside. Inside we know that number:

    φᵢ = ‖Nᵢ‖ / (‖Rᵢ‖ + ε)          Rᵢ, column i of R, went into the inner optimizer, and Nᵢ came out
    W ← W − η c_t (α P N + φ∘(G − P R))

ε keeps a column of zeros from becoming 0/0. α and Adam's bias correction c_t come after φ: N is M / (√V + ε), without
them. Note that φ asks N for its norms, not where it came from. So the optimizer inside can be any: the check puts your
function around three (with α = 1, and c_t for Adam only).

Predict each before you run the check, with a word of why:

    1. Inside is SGD, N = R, and P is any. Is the whole then SGD for the full matrix?
    2. Inside is momentum, N = M with M ← 0.9 M + R. Is the whole then momentum for the full matrix?
    3. Inside is Adam, and P = I (r = m). Is the whole then Adam?
"""

import torch


# %% Write this
def scaling(N, R, eps=1e-8):
    """φ (n,), a number for each column: N (r, n) is what the inner optimizer made of R (r, n)."""
    raise NotImplementedError


# %% Look at it: φ of Adam's first step, where N = sign(R) but for a factor. Which columns get the largest φ?
if __name__ == "__main__":
    R = torch.randn(3, 5) * torch.tensor([0.01, 0.1, 1, 10, 100])  # columns of growing length
    phi = scaling(R.sign(), R)
    print("‖R_i‖:", R.norm(dim=0))
    print("φ_i:  ", phi)
    print("‖φ_i R_i‖:", (phi * R).norm(dim=0))
