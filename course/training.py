"""--train: a student's function in a real run of 150 steps, its loss drawn over ours."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch

import fira
import prepare_data
import train
from fira import Fira, oriented
from prepare_data import InputError

ROOT, OUT = Path(__file__).resolve().parent.parent, "out/course"


def galore(its) -> type[Fira]:
    class Variant(Fira):  # exercise 2 in the place of a whole step
        def update_matrix(self, p, group):
            state = self.state[p]
            state["step"] += 1
            W, G = oriented(p, group["proj_type"]), oriented(p.grad, group["proj_type"])
            M, V, (beta1, beta2) = state["exp_avg"], state["exp_avg_sq"], group["betas"]
            options = {"lr": group["lr"], "alpha": group["alpha"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
            W_new, M_new, V_new = its.galore_step(W, G, state["projection"], M, V, state["step"], **options)
            W.copy_(W_new), M.copy_(M_new), V.copy_(V_new)

    return Variant


def by_the_book(scaling, limit) -> type[Fira]:
    """Fira with S written out, so that φ and the limiter can be anybody's."""

    def update(W, G, P, R, N, prev_norm, step_size, **options):
        S = scaling(N, R) * (G - P @ R)
        S, kept = limit(S, prev_norm.item() if prev_norm.isfinite() else None, options["gamma"])
        prev_norm.fill_(math.inf if kept is None else kept)
        W.sub_(step_size * (options["alpha"] * P @ N + S))
        return {}

    class Variant(Fira):
        def update_matrix(self, p, group):
            ours, fira.fira_update = fira.fira_update, update
            super().update_matrix(p, group)
            fira.fira_update = ours

    return Variant


def usual_scaling(N, R):
    return N.norm(dim=0) / (R.norm(dim=0) + 1e-8)


def usual_limit(S, prev_norm, gamma):
    norm = S.norm().item()
    factor = 1 if prev_norm is None else min(1, gamma * (prev_norm + 1e-8) / (norm + 1e-30))
    return S * factor, norm * factor or prev_norm


def eight_bits(its) -> type[Fira]:
    class Variant(Fira):  # exercise 8: between two steps M and V are bytes
        def new_moments(self, R):
            (m, m_scales), (v, v_scales) = its.pack_M(torch.zeros_like(R)), its.pack(torch.zeros_like(R))
            return {"m": m, "m_scales": m_scales, "v": v, "v_scales": v_scales}

        def inner(self, R, state, group):
            M = its.unpack_M(state["m"], state["m_scales"], R.shape)
            V = its.unpack(state["v"], state["v_scales"], R.shape)
            N, c_t = super().inner(R, state | {"exp_avg": M, "exp_avg_sq": V}, group)
            (state["m"], state["m_scales"]), (state["v"], state["v_scales"]) = its.pack_M(M), its.pack(V)
            return N, c_t

    return Variant


def adaptive(its) -> type[Fira]:
    class Variant(Fira):  # exercise 9: a rank for each matrix, from the first gradients
        ranks = None

        def ranked(self, p, group):
            if self.ranks is None:
                ps = [q for g in self.param_groups if g["rank"] for q in g["params"]]
                Gs = [q.grad for q in ps]
                budget = sum(its.numbers(G, group["rank"]) for G in Gs)
                self.ranks = dict(zip(ps, its.ranks_within(Gs, budget)))
                print("ranks", *self.ranks.values())
            return group | {"rank": self.ranks[p]} if group["rank"] else group

        def new_state(self, p, group):
            return super().new_state(p, self.ranked(p, group))

        def change_subspaces(self, due):
            super().change_subspaces([(p, self.ranked(p, group)) for p, group in due])

    return Variant


VARIANTS = {  # of each exercise: what its function is compared with, and the optimizer it is put into
    2: ("galore", galore),
    4: ("fira", lambda its: by_the_book(its.scaling, usual_limit)),
    5: ("fira", lambda its: by_the_book(usual_scaling, its.limit)),
    8: ("fira", eight_bits),
    9: ("fira", adaptive),
}


def train_with(number: int, its) -> None:
    """150 steps with the student's function, and the baseline, unless this machine has it already; then the picture."""
    if number not in VARIANTS:
        raise InputError(f"there is nothing to train in exercise {number}; --train is for 2, 4, 5, 8 and 9")
    optimizer, variant = VARIANTS[number]
    ours, yours = run(optimizer), run(optimizer, name=f"ex{number:02}", variant=variant(its))
    curves = {f"ours: {optimizer}": ours, f"yours: exercise {number}": yours}
    for label, log in curves.items():
        print(f"{label:24} validation loss after 150 steps: {log[-1]['val_loss']:.4f}")
    draw(curves, Path(OUT) / f"ex{number:02}.png")


def run(optimizer: str, seed: int = 0, name: str | None = None, variant: type[Fira] | None = None) -> list[dict]:
    """The log of 150 steps; a run without a variant that this machine has finished is not made again."""
    os.chdir(ROOT)  # data/ and out/ are there
    name, data = name or optimizer + f"-seed{seed}" * (seed > 0), prepare_data.ensure("stdlib")
    options = {"data": data, "steps": 150, "eval_interval": 50, "seed": seed, "out": OUT, "name": name}
    config = train.Config(optimizer, variant=variant and name, **options).resolve()
    if variant or not finished(config):
        train.load_variant = lambda _: variant
        train.train(config, [], None)
    return [json.loads(line) for line in (config.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def finished(config: train.Config) -> bool:
    """Is there a run with this very configuration that came to its end?"""
    try:
        stored = json.loads((config.folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    return stored == json.loads(json.dumps(asdict(config))) and (config.folder / "result.json").exists()


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture without matplotlib: pip install matplotlib")
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).add_subplot(
        xlabel="step", ylabel="loss, nats a byte"
    )
    for (label, log), style in zip(curves.items(), ("C7-", "C1--")):
        axes.plot([e["step"] for e in log], [e["loss"] for e in log], style, alpha=0.35)
        seen = [e for e in log if "val_loss" in e]
        axes.plot([e["step"] for e in seen], [e["val_loss"] for e in seen], style, marker=".", label=label)
    axes.legend(title="validation (pale: training)")
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
