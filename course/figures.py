"""Draw the pictures of the course from the runs that record.py has stored: `python course/figures.py`."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

FIGURES = Path(__file__).resolve().parent / "figures"
FAMILY = (  # method, φ, the update, P
    ("AdamW", "", "M / (√V + ε) of G itself", "none"),
    ("GaLore", "0", "α P N", "SVD"),
    ("GaLore-add", "1", "α P N + (G − P R), no limiter", "SVD"),
    ("Fira-matrix", "one for the matrix", "α P N + φ (G − P R)", "subspace iteration"),
    ("Fira", "one for each column", "α P N + φ∘(G − P R)", "subspace iteration"),
    ("Fira-only-scaling", "one for each column", "α φ∘G", "subspace iteration"),
    ("APOLLO", "one for each column", "α φ∘G", "random"),
    ("APOLLO-Mini", "one for the matrix", "α φ G", "random, r = 1"),
)


def picture(columns: int = 1, width: float = 7, height: float = 3.6, **labels):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, subplot_kw=labels)


def gradient(data):
    figure, axes = picture(3, 9, 3.3)
    G, PR = data["G"], data["PR"]
    share = (PR**2).sum() / (G**2).sum()
    size = np.quantile(abs(G), 0.99)
    titles = "G", f"P R, r = 4: {share:.0%} of the energy", "G − P R, the rest"
    for ax, X, title in zip(axes, (G, PR, G - PR), titles):
        image = ax.imshow(X, cmap="RdBu", vmin=-size, vmax=size)
        ax.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def spectra(data):
    figure, ax = picture(xlabel="index / short side", ylabel="σᵢ / σ₁", yscale="log", ylim=(1e-3, 1.2))
    for name in data.files:
        if name.startswith("sigma"):
            s = data[name]
            share = (s[:32] ** 2).sum() / (s**2).sum()
            ax.plot(np.arange(1, len(s) + 1) / len(s), s / s[0], label=f"block {name[6:]}: r holds {share:.2%}")
    ax.axvline(32 / 128, color="grey", linestyle=":", label="r = 32 of 128")
    ax.legend()
    return figure


def phi(data):
    labels = {"xlabel": "φ of the full gradient", "xscale": "log", "yscale": "log"}
    figure, axes = picture(2, 8, 4, **labels)
    for ax, step, when in zip(axes, (20, 21), ("before", "after")):
        low, full = data[f"low {step}"], data[f"full {step}"]
        ax.scatter(full, low, s=2, alpha=0.4)
        ends = [full.min(), full.max()]
        ax.plot(ends, ends, color="grey")
        ax.set(title=f"{when} the subspace changes: level {np.median(low / full):.2f}")
    axes[0].set(ylabel="φ of rank 32, one dot for each column")
    return figure


def spike(data):
    figure, ax = picture(xlabel="step", ylabel="‖S‖ of all matrices", yscale="log")
    for name, label in (("free", "no limiter"), ("limited", "γ = 1.01")):
        ax.plot(range(1, 61), data[name], label=label)
    ax.axvline(30, color="grey", linestyle=":", label="what P cannot see, 50 times too large")
    ax.legend()
    return figure


def loss(curves):
    figure, ax = picture(xlabel="step", ylabel="training loss, nats a byte")
    for i, name in enumerate(("fira", "galore", "adamw")):
        logs = [np.array([row[:2] for row in curves[f"{name} {seed}"]]).T for seed in range(3)]
        steps, losses = logs[0][0], np.array([log[1] for log in logs])
        final = np.mean([curves[f"{name} {seed}"][-1][2] for seed in range(3)])
        ax.plot(steps, losses.mean(0), color=f"C{i}", label=f"{name}: validation {final:.2f} after 150 steps")
        ax.fill_between(steps, losses.min(0), losses.max(0), color=f"C{i}", alpha=0.3)
    ax.legend(title="mean and range of three seeds")
    return figure


def memory(data):
    figure, ax = picture(ylabel="10⁶ bytes, 24 matrices of 1024×1024")
    by_hand = [24 * 4 * (2 * 1024**2 if not int(r) else 3 * 1024 * int(r) + 1) / 1e6 for r in data]
    places = np.arange(len(data))
    ax.bar(places - 0.2, by_hand, 0.4, label="the state, by hand")
    ax.bar(places + 0.2, list(data.values()), 0.4, label="measured: growth of the peak in three steps")
    ax.set_xticks(places, ["AdamW" if r == "0" else f"Fira, rank {r}" for r in data])
    ax.legend()
    return figure


def family(_):
    figure, ax = picture(height=3)
    ax.axis("off")
    table = ax.table(FAMILY, colLabels=("", "φ", "W ← W − η c_t ( … )", "P"), cellLoc="left", loc="center")
    table.auto_set_column_width(range(4))
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.5)
    ax.set_title("One line, eight settings:  α P N + φ∘(G − P R)")
    return figure


PICTURES = {gradient: "gradients.npz", spectra: "gradients.npz", phi: "similarity.npz", spike: "spike.npz"}
PICTURES |= {loss: "curves.json", memory: "memory.json", family: None}


def main() -> None:
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("error: the pictures need matplotlib: pip install matplotlib")
    for draw, name in PICTURES.items():
        path = FIGURES / (name or "")
        if not path.exists():
            print(f"left out {draw.__name__}: there is no {path}; python course/record.py makes it")
            continue
        data = np.load(path) if path.suffix == ".npz" else json.loads(path.read_text("utf-8")) if name else None
        draw(data).savefig(FIGURES / f"{draw.__name__}.png", dpi=90)
        print(f"wrote {FIGURES / draw.__name__}.png")


if __name__ == "__main__":
    main()
