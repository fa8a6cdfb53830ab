"""GaLore projected from both sides: R = UᵀG V̄, a matrix of r×r.

Source: the GaLore article (arXiv:2403.03507), which states its method with P and Q and uses one of them. U (m×r) holds
left and V̄ (n×r) right singular vectors of the gradient (V̄, as V is Adam's):

    R = Uᵀ G V̄,  N = Adam(R),  W ← W − η c_t α U N V̄ᵀ

This is GaLore, φ = 0, whatever `scaling` says, for Fira's φ does not carry over. It compares ‖N_i‖ and ‖R_i‖ for column
i of the gradient, and here column i of R is no column of G: it is direction i of V̄, a mixture of all columns. The
limiter's shortcut to ‖S‖ fails too: ‖G‖² − ‖R‖² is the rest of the whole matrix, and no longer of each column. What is
left is one φ for the matrix, out of r² numbers.

V̄ needs no second decomposition: for singular vectors U, the rows of UᵀG are orthogonal, σ_j times the right ones.

Costs: the state is U, V̄ and 2 r² moments, (m + n) r + 2 r² for (m + 2n) r: less wherever r < n / 2. One QR of n×r
at each change, two products with V̄ in each step. A second side throws more of the gradient away.
"""

import torch

from fira import Fira


class TwoSided(Fira):
    def new_state(self, p, group):
        state = super().new_state(p, group)
        if "projection" in state:
            R = state["exp_avg"]
            state |= self.new_moments(R[:, : len(R)]) | {"right": torch.zeros_like(R.T), "stale": True}
        return state

    def change_subspace(self, state, P, group):
        super().change_subspace(state, P, group)
        state["stale"] = True  # V̄ follows in `inner`, which sees UᵀG

    def inner(self, R, state, group):
        if "right" not in state:  # rank ≥ the short side: Adam
            return super().inner(R, state, group)
        if state["stale"]:
            side = {"projection": state["right"]}
            super().change_subspace(side, torch.linalg.qr(R.T).Q, group)  # for the signs
            state |= {"right": side["projection"], "stale": False}
        N, c_t = super().inner(R @ state["right"], state, group)
        return N @ state["right"].T, c_t

    def update_matrix(self, p, group):
        super().update_matrix(p, group | {"scaling": None, "only_scaling": False})
