"""P by a randomized SVD: from random vectors instead of from the old P.

Source: Halko, Martinsson and Tropp (arXiv:0909.4061); AdaRankGrad (arXiv:2410.17881) chooses its subspaces so. With Ω a
Gaussian of m × (r + oversample):

    Q = qr(G Gᵀ Ω), as often as `iterations` says;   P = Q · the r leading left singular vectors of QᵀG

It is Fira's own step of subspace iteration, begun somewhere else, so this file only makes Ω. The step seeds the draws,
so that a resumed run, and each process of several, makes the same. (`torch.svd_lowrank` does the same work, but
draws from the global generator, in which the matrices of a change, one to a thread here, would race.)

Fira's old P is the better Ω as long as the gradient's subspace moves slowly: it needs no oversampling and one product.
This one owes nothing to the past, which helps where the subspace jumps, and makes the first choice cheap, which in Fira
is exact (`eigh`). The energy ‖PᵀG‖² is never above the exact one.

Costs: `iterations` × 4 m n (r + oversample) operations at a change, for Fira's 4 m n r; no state is added.
"""

import torch

from fira import Fira


class Randomized(Fira):
    def __init__(self, params, *args, oversample: int = 8, iterations: int = 2, **options):
        if oversample < 0 or iterations < 1:
            raise ValueError(f"oversample={oversample} must be at least 0, and iterations={iterations} at least 1")
        super().__init__(params, *args, **options)
        self.defaults |= {"oversample": oversample, "iterations": iterations}  # attributes: lost by a deepcopy

    def find_projection(self, G, P, step, group):
        shape = (len(G), min(len(G), group["rank"] + self.defaults["oversample"]))
        generator = torch.Generator().manual_seed(step)
        Q = torch.randn(shape, dtype=G.dtype, device="cpu", generator=generator).to(G)
        for _ in range(self.defaults["iterations"] - 1):
            Q = torch.linalg.qr(G @ (G.T @ Q)).Q
        return super().find_projection(G, Q, step, group | {"proj_method": "subspace"})
