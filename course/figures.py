"""Draw the pictures of the course from the stored runs in figures/: `python course/figures.py`.

Runs whose .npz is not there are made again: steps.npz takes a minute, curves.npz ten.
"""

import json
import sys
from pathlib import Path

import numpy as np

FIGURES = Path(__file__).resolve().parent / "figures"
sys.path.insert(0, str(FIGURES.parent.parent))
NAMES = ("0.attention.q", "1.attention.v", "1.mlp.gate", "2.mlp.down", "3.attention.out")  # in blocks
MEMORY = {"AdamW": (201, 204), "Fira, rank 256": (75, 173), "Fira, rank 64": (19, 120)}  # MB, see exercise 6
FAMILY = """
method              φ                     W ← W − η c_t ( … )             P
──────────────────────────────────────────────────────────────────────────────────────────
AdamW               –                     M / (√V + ε), of G itself       none
GaLore              0                     α P N                           SVD
GaLore-add          1                     α P N + (G − P R), no limiter   SVD
Fira-matrix         one for the matrix    α P N + φ (G − P R)             subspace iteration
Fira                one for each column   α P N + φ∘(G − P R)             subspace iteration
Fira-only-scaling   one for each column   α φ∘G                           subspace iteration
APOLLO              one for each column   α φ∘G                           random
APOLLO-Mini         one for the matrix    α φ G                           random, r = 1
"""


def make_steps():
    """60 steps with and without the limiter, from which φ, ‖S‖ and gradients are kept; step 30 has a spike."""
    from course.training import Shadowed, short_run
    from fira import oriented, singular_vectors

    def stretch(step, optimizer):
        for p in (p for p, state in optimizer.state.items() if step == 30 and "projection" in state):
            G, P = oriented(p.grad, "std"), optimizer.state[p]["projection"]
            G.copy_(50 * G - 49 * P @ (P.T @ G))

    found = {"free": [], "limited": []}
    for name, gamma in (("free", None), ("limited", 1.01)):
        for step, optimizer, model in short_run(Shadowed, 60, stretch, update_proj_gap=20, gamma=gamma):
            found[name].append(np.linalg.norm([seen["limited"] for seen in optimizer.seen.values()]))
            if step in (20, 21):
                phis = ([seen[key] for seen in optimizer.seen.values()] for key in ("phi", "phi_full"))
                found[f"phi {step}"] = [np.concatenate(phi)[::4] for phi in phis]
    Gs = [model.get_parameter(f"blocks.{name}.weight").grad for name in NAMES]
    P = singular_vectors(Gs[0], 4)
    return found | {"G": Gs[0], "PR": P @ (P.T @ Gs[0])} | {name: G.svd().S for name, G in zip(NAMES, Gs)}


def make_curves():
    """(seed, evaluation, (step, loss, validation loss)) of 150 steps with three optimizers."""
    from course.training import run

    def log(folder):
        with open(folder / "log.jsonl", encoding="utf-8") as lines:
            return [[e["step"], e["loss"], e.get("val_loss", np.nan)] for e in map(json.loads, lines)]

    return {name: [log(run(name, seed)) for seed in range(3)] for name in ("fira", "galore", "adamw")}


def stored(make) -> dict:
    path = FIGURES / f"{make.__name__[5:]}.npz"
    if not path.exists():
        np.savez_compressed(path, **{name: np.asarray(X, dtype="f4") for name, X in make().items()})
    return np.load(path)


def gradients(figure):
    data, upper, lower = stored(make_steps), *figure.subfigures(2, 1)
    axes, G, PR = upper.subplots(1, 3), data["G"], data["PR"]
    share, size = (PR**2).sum() / (G**2).sum(), np.quantile(abs(G), 0.99)
    for ax, X, title in zip(axes, (G, PR, G - PR), ("G", f"P R, r = 4: energy {share:.0%}", "G − P R, the rest")):
        image = ax.imshow(X, cmap="RdBu", vmin=-size, vmax=size)
        ax.set(title=title, xticks=[], yticks=[])
    upper.colorbar(image, ax=axes, shrink=0.9)
    ax = lower.subplots()
    for name in NAMES:
        share = (data[name][:32] ** 2).sum() / (data[name] ** 2).sum()
        ax.plot(range(1, 129), data[name] / data[name][0], label=f"block {name}: r holds {share:.2%}")
    ax.axvline(32, color="grey", linestyle=":", label="r = 32 of 128")
    ax.set(xlabel="i", ylabel="σᵢ / σ₁", yscale="log", ylim=(1e-3, 1.2), title="Singular values of five gradients")
    ax.legend()


def phi(figure):
    data, axes = stored(make_steps), figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, step, when in zip(axes, (20, 21), ("before", "after")):
        low, full = data[f"phi {step}"]
        ax.loglog(full, low, ".", markersize=2, alpha=0.5)
        ax.axline((1e3, 1e3), (1e4, 1e4), color="grey")
        ax.set(title=f"{when} the subspace changes: level {np.median(low / full):.2f}", xlabel="φ of the full gradient")
    axes[0].set_ylabel("φ of rank 32, one dot a column")


def spike(figure):
    data, ax = stored(make_steps), figure.subplots()
    for name, label in (("free", "no limiter"), ("limited", "γ = 1.01")):
        ax.semilogy(range(1, 61), data[name], label=label)
    ax.axvline(30, color="grey", linestyle=":", label="what P cannot see, × 50")
    ax.set(xlabel="step (the subspace changes after 20 and 40)", ylabel="‖S‖ of all matrices")
    ax.legend(loc="upper right")


def loss(figure):
    data, ax = stored(make_curves), figure.subplots()
    for name, color in zip(data, ("C0", "C1", "C2")):
        steps, losses, validation = data[name].transpose(2, 0, 1)  # each (seeds, evaluations)
        label = f"{name}: validation {validation[:, -1].mean():.2f} after 150 steps"
        ax.plot(steps[0], losses.mean(0), color=color, label=label)
        ax.fill_between(steps[0], losses.min(0), losses.max(0), color=color, alpha=0.3)
    ax.set(xlabel="step", ylabel="training loss, nats a byte")
    ax.legend(title="mean and range of three seeds")


def memory(figure):
    ax, places, (by_hand, measured) = figure.subplots(), np.arange(3), zip(*MEMORY.values())
    ax.bar(places - 0.2, by_hand, 0.4, label="the state, by hand")
    ax.bar(places + 0.2, measured, 0.4, label="measured: growth of the peak in three steps")
    ax.set_xticks(places, MEMORY)
    ax.set(ylabel="MB, 24 matrices of 1024×1024")
    ax.legend()


def family(figure):
    figure.suptitle("One line, eight settings:  α P N + φ∘(G − P R)")
    figure.text(0.02, 0.45, FAMILY, family="monospace", fontsize=9, linespacing=1.7, va="center")


if __name__ == "__main__":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('error: the pictures need matplotlib: pip install -e ".[plot]"')
    for draw in (gradients, phi, spike, loss, memory, family):
        draw(figure := Figure(figsize=(7.8, 7.2 if draw is gradients else 3.6), layout="constrained"))
        figure.savefig(FIGURES / f"{draw.__name__}.png", dpi=110)
        print(f"wrote {FIGURES / draw.__name__}.png")
