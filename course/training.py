"""--train: a student's function in a real run of 150 steps, its loss drawn over ours."""

import math
import os
from pathlib import Path

import torch

import train
from fira import Fira, oriented

ROOT, OUT = Path(__file__).resolve().parent.parent, "out/course"


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
        S = getattr(self.its, "scaling", usual_scaling)(N, R) * (G - P @ R)
        S, norm = getattr(self.its, "limit", usual_limit)(
            S, prev_norm if prev_norm < math.inf else None, group["gamma"]
        )
        state["prev_norm"].fill_(math.inf if norm is None else norm)
        W.sub_(group["lr"] * c_t * (group["alpha"] * P @ N + S))


def usual_scaling(N, R):
    return N.norm(dim=0) / (R.norm(dim=0) + 1e-8)


def usual_limit(S, prev_norm, gamma):
    factor = 1 if prev_norm is None else min(1, gamma * (prev_norm + 1e-8) / (S.norm().item() + 1e-30))
    return S * factor, S.norm().item() * factor or prev_norm


class EightBit(Fira):
    def new_moments(self, R):
        return {"M": self.its.pack_M(torch.zeros_like(R)), "V": self.its.pack(torch.zeros_like(R))}

    def inner(self, R, state, group):  # M and V are whole in a step, and bytes between two (exercise 8)
        M, V = self.its.unpack_M(*state["M"], R.shape), self.its.unpack(*state["V"], R.shape)
        N, c_t = super().inner(R, state | {"exp_avg": M, "exp_avg_sq": V}, group)
        state.update(M=self.its.pack_M(M), V=self.its.pack(V))
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


PLACES = {2: GaLore, 4: ByTheBook, 5: ByTheBook, 8: EightBit, 9: RankEach}  # of each exercise's functions


def train_with(number: int, its) -> None:
    """150 steps with the student's functions and 150 of ours, then the table and the picture."""
    yours, optimizer = type("Yours", (PLACES[number],), {"its": its}), "galore" if number == 2 else "fira"
    names = [run(optimizer), run(optimizer, 0, f"exercise-{number}", yours)]
    train.compare(names, OUT, Path(OUT) / f"exercise-{number}.png")
    print("Do you see one curve only? Then yours lies on ours.")


def run(optimizer: str, seed: int = 0, name: str | None = None, variant: type[Fira] | None = None) -> str:
    """Train 150 steps, unless it is a run of ours that out/course has from another time. Returns the run's name."""
    os.chdir(ROOT)  # data/ and out/ are there
    options = {"steps": 150, "eval_interval": 50, "seed": seed, "out": OUT, "name": name or f"{optimizer}-{seed}"}
    config = train.Config(optimizer, variant=variant and name, **options).resolve()
    if variant or not (config.folder / "result.json").exists():
        train.load_variant = lambda _: variant
        train.train(config, [], None)
    return config.name
