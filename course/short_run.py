"""A short run of a small model on the sources of your own Python, looked into: for exercise 10 and the pictures."""

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
        N, _ = Fira.inner(self, G, shadow, group)
        self.pairs.append((self.seen[p]["phi"].clone(), N.norm(dim=0) / (G.norm(dim=0) + 1e-8)))


def own_sources(size: int = 2**20) -> torch.Tensor:
    """The first bytes of this Python's standard library, in alphabetical order."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) > size:
            break
    return torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8).long()


def short_run(optimizer_class=Fira, last: int = 60, seed: int = 0, before_step=None, **options):
    """Train a nano model and yield (step, optimizer, model) after each step, its gradients still there."""
    torch.manual_seed(seed)
    model, text = Transformer(ModelConfig.preset("nano", 257, 64)), own_sources()
    optimizer, generator = optimizer_class(param_groups(model, **options)), torch.Generator().manual_seed(seed)
    for step in range(1, last + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, step / 10)
        w = text[torch.randint(len(text) - 65, (16, 1), generator=generator) + torch.arange(65)]  # (16, 65)
        optimizer.zero_grad()
        model(w[:, :-1], w[:, 1:]).backward()
        if before_step:
            before_step(step, optimizer)
        optimizer.step()
        yield step, optimizer, model


def phis(steps=(20, 21), gap: int = 20) -> dict[int, list]:
    """By step, a pair (φ low, φ full) for each matrix."""
    run = short_run(Shadowed, max(steps), rank=32, update_proj_gap=gap)
    return {step: optimizer.pairs for step, optimizer, _ in run if step in steps}
