"""Runs looked into, for exercise 10 and the pictures. `python course/runs.py` stores what figures.py draws: 10 minutes.

figures/memory.json alone is made by hand: the growth that `python course/ex06_memory.py RANK` prints.
"""

import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fira import Fira, oriented, param_groups, singular_vectors  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

NAMES = ("0.attention.q", "1.attention.v", "1.mlp.gate", "2.mlp.down", "3.attention.out")  # in blocks


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
        self.pairs.append((self.seen[p]["phi"].clone(), N.norm(dim=0) / (G.norm(dim=0) + 1e-8)))


def short_run(optimizer_class=Fira, last=60, before_step=lambda step, optimizer: None, **options):
    """Train a nano model on your Python's own sources and yield (step, optimizer, model) after each step, with .grad."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)[: 2**20]), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model, generator = Transformer(ModelConfig.preset("nano", 257, 64)), torch.Generator().manual_seed(0)
    optimizer = optimizer_class(param_groups(model, **options))
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
    run = short_run(Shadowed, max(steps), rank=32, update_proj_gap=20)
    return {step: optimizer.pairs for step, optimizer, _ in run if step in steps}


def gradients() -> dict:
    """Of step 60: one gradient whole, what P of rank 4 sees of it, and the singular values of five."""
    *_, (_, _, model) = short_run(rank=32)
    Gs = [model.get_parameter(f"blocks.{name}.weight").grad for name in NAMES]
    P = singular_vectors(Gs[0], 4)
    values = {f"sigma {name}": torch.linalg.svdvals(G) for name, G in zip(NAMES, Gs)}
    return {"G": Gs[0], "PR": P @ (P.T @ Gs[0]), **values}


def similarity() -> dict:
    """φ of every fourth column at steps 20 and 21, before and after a change of the subspace."""
    columns = {step: [torch.cat(phi)[::4] for phi in zip(*pairs)] for step, pairs in phis().items()}
    return {f"{name} {step}": columns[step][i] for step in columns for i, name in enumerate(("low", "full"))}


def spike() -> dict:
    """‖S‖ over all matrices in 60 steps; in step 30 what P cannot see is 50 times as large."""

    def stretch(step, optimizer):
        for p, state in optimizer.state.items() if step == 30 else ():
            if "projection" in state:
                G, P = oriented(p.grad, "std"), state["projection"]
                G.copy_(50 * G - 49 * P @ (P.T @ G))

    def norms(gamma):
        for _, optimizer, _ in short_run(before_step=stretch, rank=32, gamma=gamma):
            yield torch.stack([seen["limited"] for seen in optimizer.seen.values() if seen]).norm()

    return {name: torch.stack(list(norms(gamma))) for name, gamma in (("limited", 1.01), ("free", None))}


def curves() -> dict:
    """(step, loss, validation loss) of 150 steps with three optimizers and three seeds."""
    from course import training

    logs = {f"{name} {seed}": training.run(name, seed) for seed in range(3) for name in ("fira", "galore", "adamw")}
    for key, name in logs.items():
        log = map(json.loads, (Path(training.OUT) / name / "log.jsonl").read_text(encoding="utf-8").splitlines())
        logs[key] = [(e["step"], e["loss"], e.get("val_loss")) for e in log]
    return logs


if __name__ == "__main__":
    for make in (gradients, spike, similarity):
        found = {key: X.numpy().astype("f4") for key, X in make().items()}
        np.savez_compressed(HERE / "figures" / f"{make.__name__}.npz", **found)
        print(f"stored {make.__name__}")
    (HERE / "figures/curves.json").write_text(json.dumps(curves(), indent=1), encoding="utf-8")
