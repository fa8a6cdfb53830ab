"""Draw the pictures of the course from the stored runs in figures/: `python course/figures.py`."""

import json
import sys
from pathlib import Path

import numpy as np

FIGURES = Path(__file__).resolve().parent / "figures"
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


def gradient(figure, data):
    axes, G, PR = figure.subplots(1, 3), data["G"], data["PR"]
    share, size = (PR**2).sum() / (G**2).sum(), np.quantile(abs(G), 0.99)
    titles = "G", f"P R, r = 4: {share:.0%} of the energy", "G − P R, the rest"
    for ax, X, title in zip(axes, (G, PR, G - PR), titles):
        image = ax.imshow(X, cmap="RdBu", vmin=-size, vmax=size)
        ax.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, shrink=0.7)


def spectra(figure, data):
    ax = figure.subplots(subplot_kw={"yscale": "log", "ylim": (1e-3, 1.2)})
    for name, s in data.items():
        if name.startswith("sigma"):
            share = (s[:32] ** 2).sum() / (s**2).sum()
            ax.plot(np.arange(1, len(s) + 1), s / s[0], label=f"block {name[6:]}: r holds {share:.2%}")
    ax.axvline(32, color="grey", linestyle=":", label="r = 32 of 128")
    ax.set(xlabel="i", ylabel="σᵢ / σ₁", title="Singular values of five gradients")
    ax.legend()


def phi(figure, data):
    axes = figure.subplots(1, 2, sharex=True, sharey=True, subplot_kw={"xscale": "log", "yscale": "log"})
    for ax, step, when in zip(axes, (20, 21), ("before", "after")):
        low, full = data[f"low {step}"], data[f"full {step}"]
        ax.scatter(full, low, s=2, alpha=0.4)
        ax.axline((1e3, 1e3), (1e4, 1e4), color="grey")
        ax.set(title=f"{when} the subspace changes: level {np.median(low / full):.2f}", xlabel="φ of the full gradient")
    axes[0].set_ylabel("φ of rank 32, one dot a column")


def spike(figure, data):
    ax = figure.subplots(subplot_kw={"yscale": "log"})
    for name, label in (("free", "no limiter"), ("limited", "γ = 1.01")):
        ax.plot(range(1, 61), data[name], label=label)
    ax.axvline(30, color="grey", linestyle=":", label="what P cannot see, × 50")
    ax.set(xlabel="step", ylabel="‖S‖ of all matrices")
    ax.legend(loc="upper right")


def loss(figure, curves):
    ax = figure.subplots()
    for i, name in enumerate(("fira", "galore", "adamw")):
        runs = np.array([curves[f"{name} {seed}"] for seed in range(3)], dtype=float)  # (3, evaluations, 3)
        steps, losses = runs[0, :, 0], runs[:, :, 1]
        label = f"{name}: validation {runs[:, -1, 2].mean():.2f} after 150 steps"
        ax.plot(steps, losses.mean(0), color=f"C{i}", label=label)
        ax.fill_between(steps, losses.min(0), losses.max(0), color=f"C{i}", alpha=0.3)
    ax.set(xlabel="step", ylabel="training loss, nats a byte")
    ax.legend(title="mean and range of three seeds")


def memory(figure, data):
    ax, places = figure.subplots(), np.arange(len(data))
    by_hand = [24 * 4 * (3 * 1024 * int(rank) + 1 if int(rank) else 2 * 1024**2) / 1e6 for rank in data]
    ax.bar(places - 0.2, by_hand, 0.4, label="the state, by hand")
    ax.bar(places + 0.2, list(data.values()), 0.4, label="measured: growth of the peak in three steps")
    ax.set_xticks(places, [f"Fira, rank {rank}" if int(rank) else "AdamW" for rank in data])
    ax.set_ylabel("MB, 24 matrices of 1024×1024")
    ax.legend()


def family(figure, _):
    figure.suptitle("One line, eight settings:  α P N + φ∘(G − P R)")
    figure.text(0.02, 0.45, FAMILY, family="monospace", fontsize=8, va="center")


if __name__ == "__main__":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('error: the pictures need matplotlib: pip install -e ".[plot]"')
    stored = {gradient: "gradients.npz", spectra: "gradients.npz", phi: "similarity.npz", spike: "spike.npz"}
    stored |= {loss: "curves.json", memory: "memory.json", family: "memory.json"}
    for draw, name in stored.items():
        path, figure = FIGURES / name, Figure(figsize=(7, 3.6), layout="constrained")
        draw(figure, np.load(path) if path.suffix == ".npz" else json.loads(path.read_text(encoding="utf-8")))
        figure.savefig(FIGURES / f"{draw.__name__}.png", dpi=110)
        print(f"wrote {FIGURES / draw.__name__}.png")
