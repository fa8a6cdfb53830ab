"""Small runs: --train, 150 steps with a student's function, and short ones for exercise 10 and the pictures."""

import math
import os
import sysconfig
from pathlib import Path

import torch

import train
from fira import Fira, oriented, param_groups
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent.parent


class GaLore(Fira):
    def update_matrix(self, p, group):  # exercise 2 is a whole step
        state, W, G = self.state[p], oriented(p, group["proj_type"]), oriented(p.grad, group["proj_type"])
        state["step"] += 1
        P, M, V = state["projection"], state["exp_avg"], state["exp_avg_sq"]
        options = group["lr"], group["alpha"], *group["betas"], group["eps"]
        for old, new in zip((W, M, V), self.its.galore_step(W, G, P, M, V, state["step"], *options)):
            old.copy_(new)


class ByTheBook(Fira):
    def update_matrix(self, p, group):  # S is written out, so that φ (exercise 4) and the limiter (5) can be yours
        state, W, G = self.state[p], oriented(p, group["proj_type"]), oriented(p.grad, group["proj_type"])
        state["step"] += 1
        P, prev_norm = state["projection"], state["prev_norm"].item()
        R = P.T @ G
        N, c_t = self.inner(R, state, group)
        phi = self.its.scaling(N, R) if hasattr(self.its, "scaling") else N.norm(dim=0) / (R.norm(dim=0) + 1e-8)
        S, prev = phi * (G - P @ R), prev_norm if prev_norm < math.inf else None
        S, norm = self.its.limit(S, prev, group["gamma"]) if hasattr(self.its, "limit") else self.limit(S, prev)
        state["prev_norm"].fill_(math.inf if norm is None else norm)
        W.sub_(group["lr"] * c_t * (group["alpha"] * P @ N + S))

    def limit(self, S, prev_norm):
        norm = S.norm().item()
        factor = 1 if prev_norm is None else min(1, 1.01 * (prev_norm + 1e-8) / (norm + 1e-30))
        return S * factor, norm * factor or prev_norm


class EightBit(Fira):
    def new_moments(self, R):
        return self.packed(torch.zeros_like(R), torch.zeros_like(R))

    def packed(self, M, V):
        return dict(zip(("M", "M_scales", "V", "V_scales"), (*self.its.pack_M(M), *self.its.pack(V))))

    def inner(self, R, state, group):  # M and V are whole in a step, and bytes between two (exercise 8)
        M = self.its.unpack_M(state["M"], state["M_scales"], R.shape)
        V = self.its.unpack(state["V"], state["V_scales"], R.shape)
        N, c_t = super().inner(R, state | {"exp_avg": M, "exp_avg_sq": V}, group)
        state.update(self.packed(M, V))
        return N, c_t


class RankEach(Fira):
    def update(self):  # each matrix has its rank from its first gradient (exercise 9)
        if not self.state:
            matrices = [(p, group["rank"]) for group in self.param_groups if group["rank"] for p in group["params"]]
            budget = sum(self.its.numbers(p.grad, rank) for p, rank in matrices)
            ranks = self.its.ranks_within([p.grad for p, _ in matrices], budget)
            self.ranks = {p: {"rank": rank} for (p, _), rank in zip(matrices, ranks)}
            print("ranks", *ranks)
        super().update()

    def new_state(self, p, group):
        return super().new_state(p, group | self.ranks.get(p, {}))

    def change_subspaces(self, due):
        super().change_subspaces([(p, group | self.ranks[p]) for p, group in due])


AFTER = {
    8: "Two curves? √V is rounded up in every step: where does that lead? (variants/eight_bit.py rounds by chance.)",
    9: "Two curves? Other ranks in as many numbers: which matrices got more?",
}
PLACES = {2: GaLore, 4: ByTheBook, 5: ByTheBook, 8: EightBit, 9: RankEach}  # of each exercise's functions


def train_with(number: int, its) -> None:
    """150 steps with the student's functions and 150 of ours, then the table and the picture."""
    yours, optimizer = type("Yours", (PLACES[number],), {"its": its}), "galore" if number == 2 else "fira"
    train.compare([run(optimizer), run(optimizer, 0, f"yours-{number}", yours)])
    print(AFTER.get(number, "Do you see one curve only? Then yours lies on ours."))


def run(optimizer: str, seed: int = 0, name: str | None = None, variant: type[Fira] | None = None) -> Path:
    """Train 150 steps, unless it is a run of ours that out/course has from another time. Returns the run's folder."""
    os.chdir(ROOT)  # data/ and out/ are there
    paper = {} if optimizer == "adamw" else {"lr": 0.01, "alpha": 0.25}
    options = {"steps": 150, "eval_interval": 50, "name": f"course/{name or f'ours-{optimizer}-{seed}'}"}
    config = train.Config(optimizer, seed=seed, **options, **paper).resolve()
    if variant or not (config.folder / "sample.txt").exists():
        train.Fira = variant or Fira
        train.train(config)
    return config.folder


class Shadowed(Fira):
    """Fira that also keeps Adam's moments of the full gradient: beside `phi`, `seen` then has their `phi_full`."""

    def update_matrix(self, p, group):
        G, state = oriented(p.grad, group["proj_type"]).clone(), self.state[p]
        super().update_matrix(p, group)
        shadow = state.setdefault("shadow", {"step": 0} | self.new_moments(G))
        shadow["step"] += 1
        N, _ = self.inner(G, shadow, group)
        self.seen[p]["phi_full"] = N.norm(dim=0) / (G.norm(dim=0) + 1e-8)


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


def phis(steps=(20, 21)):
    """Yield step, φ low and φ full, each a list with a vector for each matrix. The subspace changes after step 20."""
    for step, optimizer, _ in short_run(Shadowed, max(steps), update_proj_gap=20):
        if step in steps:
            yield step, *([seen[key] for seen in optimizer.seen.values()] for key in ("phi", "phi_full"))
