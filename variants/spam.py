"""Spike-aware clipping and momentum reset, instead of the norm-growth limiter.

Source: SPAM (Huang et al., arXiv:2501.06842): entries of a gradient can be a thousand times their usual size, and Adam
remembers them in V for a thousand steps. SPAM cuts what is far above its own past, and forgets M and V from time to
time. Inside the subspace this is SPAM itself, entry by entry:

    R_ij ← sign(R_ij) √(θ V_ij)   where R_ij² > θ V_ij > 0          θ = `threshold`
    every `reset` steps:   M, V ← 0, and the step size rises from 0 to its full height in `warmup` steps, a half cosine

Outside nothing of that size may be kept. Nor can columns of the gradient be cut: φ = ‖N‖/‖R‖ rises as R falls, and S
stays as it was. So ‖S‖ is cut, where the limiter did it, at a multiple of the root of its own mean square v:

    S ← S · min(1, √(θ_S v̂) / ‖S‖),   v ← β₂ v + (1 − β₂) ‖S‖²,   v̂ = v / (1 − β₂ᵗ),   θ_S = `outside`

The limiter bounds any growth of ‖S‖ to 1 % a step; this lets it move freely below twice its usual size.

Costs: one number a matrix, and work on R. Only matrices with a rank are watched. SPAM's sparse momentum is left out:
here the subspace is what saves memory.
"""

import math

import torch

from fira import Fira


class Spam(Fira):
    def __init__(self, params, *args, threshold=5000.0, outside=4.0, reset=500, warmup=150, **options):
        mine = {"threshold": threshold, "outside": outside, "reset": reset, "warmup": warmup}
        if bad := [name for name, x in mine.items() if not x > 0]:
            raise ValueError(f"{bad[0]}={mine[bad[0]]!r} must be above 0")
        super().__init__(params, *args, **options)
        self.defaults |= mine  # attributes would be lost by a deepcopy

    def new_state(self, p, group):
        state = super().new_state(p, group)
        return state | {"S_sq": torch.zeros_like(state["prev_norm"])} if "prev_norm" in state else state

    def inner(self, R, state, group):
        M, V, since = state["exp_avg"], state["exp_avg_sq"], (state["step"] - 1) % self.defaults["reset"]
        if since == 0:
            M.zero_()
            V.zero_()
        limit = (V * self.defaults["threshold"]).sqrt().where(V > 0, math.inf)
        N, c_t = super().inner(R.clamp(-limit, limit), state | {"step": since + 1}, group)
        if since < min(self.defaults["warmup"], state["step"] - 1):  # not at the start of training
            c_t *= (1 - math.cos(math.pi * (since + 1) / self.defaults["warmup"])) / 2
        return N, c_t

    def update_matrix(self, p, group):
        state, beta2, steps = self.state[p], group["betas"][1], self.state[p]["step"]
        mean = state["S_sq"] / max(1 - beta2**steps, 1e-30)
        state["prev_norm"].copy_((mean * self.defaults["outside"]).sqrt().where(mean > 0, math.inf))
        super().update_matrix(p, group | {"gamma": 1.0})  # with γ = 1 the limiter cuts ‖S‖ at `prev_norm`
        if "limited" in self.seen[p]:
            state["S_sq"].lerp_(self.seen[p]["limited"].square(), 1 - beta2)
