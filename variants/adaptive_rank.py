"""A rank for each matrix, chosen anew at every change: as many directions as hold a share of the gradient's energy.

Source: AdaRankGrad (arXiv:2410.17881). With ‖R_j‖² the energy of direction j (of singular vectors σ_j², largest first):

    r = the smallest number with  ‖R_1‖² + … + ‖R_r‖² ≥ energy · ‖G‖²,  at most the group's `rank`

Singular values 4, 3, 2, 1, ½, ¼ give r = 1, 3, 5 at energy = 0.5, 0.9, 0.99. AdaRankGrad only ever lowers r; here it
may grow again. M and V lose the rows of the directions that go. A new direction begins with M = 0 and with the V of the
last one before it, which had more energy: with V = 0 its N would be three times too large for its first steps.

Costs: the state is at most that of the cap, (m + 2n) r. A change reads a number back for each matrix, and where r is
below the cap the next choice is exact (`eigh`), since a step of subspace iteration finds no directions beyond the old.
With `proj_method="random"` the directions have no order and this has no sense. Data-parallel processes have the same
gradient, so choose the same r.
"""

import torch

from fira import Fira


class AdaptiveRank(Fira):
    def __init__(self, params, *args, energy: float = 0.9, **options):
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy!r} must be a share, above 0 and at most 1")
        super().__init__(params, *args, **options)
        self.defaults["energy"] = energy  # an attribute would be lost by a deepcopy

    def find_projection(self, G, P, step, group):
        if P is not None and P.shape[1] < group["rank"]:
            P = None
        P = super().find_projection(G, P, step, group)
        shares = (G.T @ P).square().sum(0).cumsum(0) / G.square().sum()
        return P[:, : int((shares < self.defaults["energy"]).sum()) + 1]  # a slice ends at the cap

    def change_subspace(self, state, P, group):
        resize(state, P.shape[1])
        super().change_subspace(state, P, group)

    def restored(self, saved, state, name):
        if "projection" in state and "projection" in saved:
            resize(state, min(saved["projection"].shape[1], state["projection"].shape[1]))
        return super().restored(saved, state, name)


def resize(state, r):
    """The state with r directions: the last ones dropped, or new ones added."""
    old = state["projection"].shape[1]
    rows = torch.arange(r).clamp(max=old - 1)  # the last one again for each new one
    M, V = (state[name].T[:, rows].contiguous().T for name in ("exp_avg", "exp_avg_sq"))
    M[old:] = 0
    state |= {"projection": state["projection"][:, rows], "exp_avg": M, "exp_avg_sq": V}
