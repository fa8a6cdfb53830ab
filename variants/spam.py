"""Spike-aware clipping and momentum reset, instead of the norm-growth limiter.

Source: SPAM (Huang et al., arXiv:2501.06842): single entries of a gradient can be a thousand times their usual size, and
Adam remembers them. It clips what is far above its own past, and forgets M and V from time to time. Inside the subspace
that is SPAM itself, entry by entry; V̂ is V with its bias corrected:

    R_ij ← sign(R_ij) √(θ V̂_ij)   where R_ij² > θ V̂_ij             θ = 5000: 70 times the usual size
    every `reset` steps   M, V ← 0, and c_t rises again from 0 to its full size over `warmup` steps, as a half cosine

Outside there is no V to compare with, and none of that size may be kept. So a column is clipped as a whole, before it is
projected, against the mean square of its own norm (v has n numbers):

    G_i ← G_i √(θ v̂_i) / ‖G_i‖   where ‖G_i‖² > θ v̂_i;   v ← β₂ v + (1 − β₂) ‖G_i‖²

The limiter bounds how fast ‖S‖ may grow by any cause, 1 % a step; this cuts only what is out of all proportion.

Costs: n numbers a matrix, one more pass over the gradient, and `p.grad` is changed in place where it is clipped. Only
the matrices with a rank are watched. SPAM's sparse momentum is not here: the subspace is this one's saving.
"""

import math

import torch

from fira import Fira, column_norms, oriented


class Spam(Fira):
    def __init__(self, params, *args, threshold: float = 5000.0, reset: int = 500, warmup: int = 150, **options):
        if not threshold > 0 or reset < 1 or warmup < 1:
            raise ValueError(f"threshold={threshold}, reset={reset} and warmup={warmup} must be above 0")
        super().__init__(params, *args, **options)
        self.defaults |= {"threshold": threshold, "reset": reset, "warmup": warmup}  # attributes: lost by a deepcopy

    def new_state(self, p, group):
        state = super().new_state(p, group)
        return state if group["rank"] is None else state | {"column_sq": torch.zeros_like(state["exp_avg"][0])}

    def update_matrix(self, p, group):
        G, state, beta2 = oriented(p.grad, group["proj_type"]), self.state[p], group["betas"][1]
        sq, v = column_norms(G).square(), state["column_sq"]
        allowed = self.clipped(sq, v, 1 - beta2 ** state["step"])
        G.mul_((allowed / sq.clamp_min(1e-38)).sqrt().to(G.dtype))
        v.lerp_(allowed, 1 - beta2)
        super().update_matrix(p, group | {"gamma": None})

    def inner(self, R, state, group):
        since = (state["step"] - 1) % self.defaults["reset"]  # steps since the last reset
        if since == 0:
            state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
        allowed = self.clipped(R.square(), state["exp_avg_sq"], 1 - group["betas"][1] ** since)
        N, c_t = super().inner(R.sign() * allowed.sqrt(), state | {"step": since + 1}, group)
        rising = since < state["step"] - 1 and since < self.defaults["warmup"]  # not at the start of training
        return N, c_t * (math.sin(math.pi / 2 * (since + 1) / self.defaults["warmup"]) ** 2 if rising else 1.0)

    def clipped(self, sq, mean_sq, correction):
        """Squares, cut at θ times their mean. Where there is no past, correction 0 or a mean of 0, nothing is cut."""
        return torch.where(
            mean_sq > 0, torch.minimum(sq, mean_sq * (self.defaults["threshold"] / max(correction, 1e-38))), sq
        )
