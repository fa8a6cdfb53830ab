"""Fira by the book: one step on one weight, with every matrix written out in full. Slow; read this first.

The names are those of the paper (arXiv:2410.01623, Algorithm 1): W (m×n, m ≤ n) is a weight, G its gradient, P (m×r)
has r orthonormal columns that span the subspace, M and V are Adam's moments of R, S is the gradient outside of it.
`state` is {} before the first step. `fira.py` computes the same, fast, and `test_fira.py` compares the two.
"""

import torch


def singular_vectors(G, P, r):
    return torch.linalg.svd(G).U[:, :r]  # the r leading ones, whatever the old P was


def fira_step(
    W, G, state, *, rank, lr=1e-3, T=200, alpha=0.25, alpha_mode="unscaled", scaling="column", only_scaling=False,
    gamma=1.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, choose=singular_vectors,
):  # fmt: skip
    """Returns the new W, and changes the state."""
    (m, n), (beta1, beta2), r = W.shape, betas, min(rank, W.shape[0])
    if not state:
        state.update(t=0, P=W.new_zeros(m, r), M=W.new_zeros(r, n), V=W.new_zeros(r, n), S_prev=None)
    t, P, M, V, S_prev = state["t"], state["P"], state["M"], state["V"], state["S_prev"]
    # 1. Every T steps: the subspace. A zero gradient has no direction. A sign is arbitrary: as the old vector's.
    if G.any() and (t % T == 0 or not P.any()):
        P_new = torch.eye(m, dtype=W.dtype) if r == m else choose(G, P, r)
        P = torch.stack([new if new @ old >= 0 else -new for new, old in zip(P_new.T, P.T)], dim=1)
    # 2. Adam inside the subspace. The bias correction c_t stands in the step size.
    t, R = t + 1, P.T @ G
    M, V = beta1 * M + (1 - beta1) * R, beta2 * V + (1 - beta2) * R**2
    N, c_t = M / (V**0.5 + eps), (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    # 3. Norm-based scaling: by how much did Adam scale each column, or the matrix?
    columns = torch.stack([N[:, i].norm() / (R[:, i].norm() + 1e-8) for i in range(n)])
    phi = {"column": columns, "matrix": N.norm() / (R.norm() + 1e-8), "unit": 1.0, None: 0.0}[scaling]
    # 4. The gradient outside the subspace, scaled alike. The published code subtracts α P R; at full rank S is 0.
    S = phi * (G if only_scaling else G - P @ R * (alpha if alpha_mode == "released" and r < m else 1.0))
    # 5. Norm-growth limiter: ‖S‖ grows at most by the factor γ, from the last one that was not 0.
    if gamma is not None and S_prev is not None and S.norm() / (S_prev + 1e-8) > gamma:
        S = S * gamma * (S_prev + 1e-8) / S.norm()
    state.update(t=t, P=P, M=M, V=V, S_prev=S.norm() if S.any() else S_prev)
    # 6. The update, in one of three readings of α; then weight decay.
    update = alpha * S if only_scaling else alpha * P @ N + S * (alpha if alpha_mode == "paper" else 1.0)
    W = W - lr * c_t * update
    return W - lr * weight_decay * W
