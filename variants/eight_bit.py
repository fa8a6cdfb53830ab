"""M, V and P in 8 bits: a quarter of the state.

Sources: 8-bit Adam (Dettmers et al., arXiv:2110.02861), which gives each block of the moments a scale; 8-bit GaLore
(arXiv:2403.03507). In each block of 256 neighbours along a row of R (one direction, so entries of like size):

    code = ± L √(|x| / max|x|),   x = ± max|x| (code / L)²,   of an x of M (L = 127) and of √V (L = 255)

- An entry of V that becomes 0 where M is not makes N explode. So the code of a √V above 0 is at least 2, as large as
  M's code 1: (2 / 255)² = (1 / 127)², nearly.
- β₂ = 0.999 changes √V by less than one code in a step. Rounded up it only grows, to 6 times its size in 3,000 steps;
  to nearest, it cannot shrink alone. So it goes up or down by chance, x on average. The step seeds the draws.
- P needs no scale: P = code / ‖code‖, as its columns have norm 1.

Costs: bytes: m r + 2 n r, and 4 for each block, instead of 4 m r + 8 n r. Work on P, M and V in each step, and a noise
of some 10 % in √V. Groups without a rank keep their moments in float32.
"""

import torch
import torch.nn.functional as F

from fira import Fira


class EightBit(Fira):
    def new_state(self, p, group):
        state = super().new_state(p, group)
        return state | {k: x.to(torch.int8) for k, x in state.items() if k == "projection"}

    def new_moments(self, R):
        codes, largest = R.new_zeros(-(-R.numel() // 256), 256), R.new_zeros(-(-R.numel() // 256), 1)
        names = {"exp_avg": codes.to(torch.int8), "exp_avg_sq": codes.to(torch.uint8)}
        return names | {f"{name}_max": largest.clone() for name in names}

    def inner(self, R, state, group):
        generator, full = torch.Generator(R.device).manual_seed(state["step"]), {"step": state["step"]}
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            code = state[name].to(R.dtype) / torch.iinfo(state[name].dtype).max
            full[name] = (code * code.abs() * state[f"{name}_max"]).pow(power).flatten()[: R.numel()].view(R.shape)
        N, c_t = super().inner(R, full, group)
        for name, X in (("exp_avg", full["exp_avg"]), ("exp_avg_sq", full["exp_avg_sq"].sqrt())):
            blocks = F.pad(X.flatten(), (0, state[name].numel() - X.numel())).view_as(state[name])
            largest = state[f"{name}_max"].copy_(blocks.abs().amax(1, keepdim=True)).clamp_min(1e-30)
            x = (blocks.abs() / largest).sqrt() * torch.iinfo(state[name].dtype).max
            code, chance = x.floor(), torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            code += chance * (2 * code + 1) < x.square() - code.square()  # code² or (code + 1)²: x² on average
            state[name].copy_((code.clamp_min(2) * (x > 0) if name == "exp_avg_sq" else code) * blocks.sign())
        return N, c_t

    def change_subspace(self, state, P, group):  # the codes of the old P have its signs
        super().change_subspace(state, P, group)
        largest = state["projection"].abs().amax(0).clamp_min(1e-30)
        state["projection"] = (state["projection"] / largest * 127).round().to(torch.int8)

    def update_matrix(self, p, group):
        state, codes = self.state[p], self.state[p].get("projection")
        if codes is not None:
            state["projection"] = F.normalize(codes.to(state["prev_norm"].dtype), dim=0).to(p.dtype)
        super().update_matrix(p, group)
        if codes is not None:
            state["projection"] = codes
