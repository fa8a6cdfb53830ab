"""bfloat16 weights whose updates are rounded up or down by chance, so that they are right on average.

A bfloat16 has 8 bits: next to 1 lies 1.0078. An update of a thousandth is lost if it is rounded to the nearest, in each
of a thousand steps again. Source: Gupta et al. (arXiv:1502.02551). With a and b the two neighbours of w, a ≤ w < b:

    w → b with probability (w − a) / (b − a), else a;      so the mean is w

bfloat16 is the upper half of a float32: adding a random 16-bit number and cutting the lower half off does just this.
The update is computed in float32, for groups without a rank too; the draws are seeded by a number in the state, so a
resumed run draws the same ones. Weights of other types are left to Fira.

Costs: one number a parameter; float32 copies of one weight and its gradient at a time; products in float32. A weight is
noisy by its last bit; the error of n steps grows as √n, while to the nearest small updates are lost altogether.
"""

import torch

from fira import Fira


class StochasticRounding(Fira):
    def new_state(self, p, group):
        return super().new_state(p, group) | {"seed": len(self.state)}  # another one for each parameter

    def update_matrix(self, p, group):
        self.rounded(super().update_matrix, p, group)

    def update_adamw(self, p, group):
        self.rounded(super().update_adamw, p, group)

    def rounded(self, update, p, group):
        if p.dtype != torch.bfloat16:
            return update(p, group)
        w, state = p.float(), self.state[p]
        w.grad, P = p.grad.float(), state.get("projection")
        self.state[w] = state if P is None else state | {"projection": P.float()}
        update(w, group)
        after = self.state.pop(w)
        state |= {"step": after["step"], "seed": state["seed"] + 1_000_003}  # a prime: no other parameter's turn
        if w in self.seen:
            self.seen[p] = self.seen.pop(w)
        generator = torch.Generator(p.device).manual_seed(state["seed"])
        bits = torch.randint(2**16, w.shape, generator=generator, device=w.device, dtype=torch.int32)
        p.copy_(bits.add_(w.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32))
