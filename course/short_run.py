"""A short run of a small model on your own Python's sources, looked into: for exercise 10 and the pictures."""

import sysconfig
from pathlib import Path

import torch

from fira import Fira, oriented, param_groups
from model import ModelConfig, Transformer


class Shadowed(Fira):
    """Fira that also keeps Adam's moments of the full gradient, for φ alone: `pairs` is [(φ low, φ full)] by matrix."""

    def update(self):
        self.pairs = []
        super().update()

    def update_matrix(self, p, group):
        G, state = oriented(p.grad, group["proj_type"]).clone(), self.state[p]
        super().update_matrix(p, group)
        shadow = state.setdefault("shadow", {"step": 0} | self.new_moments(G))
        shadow["step"] += 1
        N, _ = self.inner(G, shadow, group)
        self.pairs.append((self.seen[p]["phi"], N.norm(dim=0) / (G.norm(dim=0) + 1e-8)))


def short_run(optimizer_class=Fira, last=60, before_step=lambda step, optimizer: None, **options):
    """Train a nano model and yield (step, optimizer, model) after each step, its gradients still there."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)[: 2**20]), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model, generator = Transformer(ModelConfig.preset("nano", 257, 64)), torch.Generator().manual_seed(0)
    optimizer = optimizer_class(param_groups(model, rank=32, **options))
    for step in range(1, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, step / 10)
        w = text[torch.randint(len(text) - 65, (16, 1), generator=generator) + torch.arange(65)]  # (16, 65)
        optimizer.zero_grad()
        model(w[:, :-1], w[:, 1:]).backward()
        before_step(step, optimizer)
        optimizer.step()
        yield step, optimizer, model


def phis(steps=(20, 21)) -> dict[int, list]:
    """By step, a pair (φ low, φ full) for each matrix; the subspace changes after steps 20, 40, ..."""
    return {step: run.pairs for step, run, _ in short_run(Shadowed, max(steps), update_proj_gap=20) if step in steps}
