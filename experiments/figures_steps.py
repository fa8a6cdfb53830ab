"""The pictures of `figures.py` that show what goes on in a step."""

import json

import numpy as np
from matplotlib.figure import Figure

from experiments import stored
from experiments.memory import count
from experiments.reductions import REFERENCE, variance_ratios
from experiments.stored import load
from train import TRAINING

SEEDS = range(10)


def runs(name: str | None) -> list[dict]:
    return [result for seed in SEEDS if name and (result := load(name, seed)) and np.isfinite(result["val_loss"])]


def subspace():
    found = runs("fira")
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    for result in found[:1]:
        log = result["log"]
        x = log["step"][-len(log["energy_share"]) :]
        top.plot(x, log["energy_share"], "k.-")
        middle.plot(x, log["mean_phi"], "k.-")
        bottom.plot(x, log["S_norm"], "k.:", label="before the limiter")
        bottom.plot(x, log["S_limited"], "k-", label="after it")
    for ax, label in ((top, "energy in the subspace"), (middle, "mean φ"), (bottom, "‖S‖")):
        ax.set_ylabel(label)
    middle.set_yscale("log")
    bottom.set(yscale="log", xlabel="step (seed 0)")
    bottom.legend()
    return found and bottom


def phi():
    path = stored.RESULTS.with_name("similarity-seed0.json")
    if not path.exists():
        return None
    means = {run: np.array(f["phi of matrices"])[8:].mean(0) for run, f in json.loads(path.read_text()).items()}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    kinds = ("q", "k", "v", "out", "gate", "up", "down")  # the order in a block
    full = means["fira-r128"]
    for ax, r in zip(panels, (8, 32, 64)):
        for i, (kind, marker) in enumerate(zip(kinds, "os^Dv<>")):
            ax.plot(full[i::7], means[f"fira-svd-r{r}"][i::7], marker, fillstyle="none", label=kind)
        ax.plot([full.min(), full.max()], [full.min(), full.max()], "k:", linewidth=0.8, label="equal")
        ax.set(xscale="log", yscale="log", xlabel="φ at full rank (seed 0)", title=f"rank {r} of 128")
        ax.xaxis.set_minor_formatter("")
        ax.set_xticks([200, 500, 1000], ["200", "500", "1000"])
    panels[0].set_ylabel("φ in the subspace")
    ax.legend(fontsize=7, loc="lower right")
    return ax


def spikes():
    top, bottom = Figure(figsize=(7, 5), layout="constrained").subplots(2, sharex=True)
    reference, drawn = load(REFERENCE, 0), 0
    lines = {"without limiter": "no-limiter", "clipping at norm 1": "clipping", "with limiter": "fira"}
    for (label, name), line, shade in zip(lines.items(), (":", "--", "-"), ("0.6", "0.35", "0")):
        if (one := load(f"spike-lr0.03-{name}", 0)) and reference:
            log, n = one["log"], min(len(one["log"]["loss"]), len(reference["log"]["loss"]))
            above = np.array(log["loss"][:n]) - reference["log"]["loss"][:n]
            top.plot(log["step"][:n], above, line, color=shade, linewidth=0.9, label=label)
            bottom.plot(log["step"][: len(log["S_limited"])], log["S_limited"], line, color=shade, linewidth=0.9)
            drawn += 1
    for step in range(101, 750, 100):  # the first with a new P
        top.axvline(step, color="gray", linewidth=0.4)
    top.set(ylabel="loss − AdamW's, nats a byte", ylim=(-0.6, 0.1))
    top.legend(title="lr 0.03, rank 8")
    bottom.set(yscale="log", xlabel="step (seed 0)", ylabel="‖S‖ that is added")
    return drawn and bottom


def variance():
    ax = Figure(figsize=(7, 4.2), layout="constrained").add_subplot(xscale="log", yscale="log")
    ratios, x = variance_ratios(), np.arange(1, 101)
    ax.plot(x, 3 / (x + 2), "k-", label="3/(n+2)")
    ax.plot(list(ratios), list(ratios.values()), "ks", fillstyle="none", label="simulated")
    ax.set(xlabel="entries in a column, n", ylabel="Var[φ²] / Var[ψ²]")
    ax.legend()
    return ax


def heatmap():
    path = stored.RESULTS.with_name("similarity-seed0.json")
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    panels = Figure(figsize=(9, 4), layout="constrained").subplots(1, 3, sharey=True)
    phis = [np.log10(np.array(found[run]["phi of matrices"])).T for run in ("fira-svd-r8", "fira-svd-r32", "fira-r128")]
    low, high = min(map(np.min, phis)), max(map(np.max, phis))
    for ax, values, title in zip(panels, phis, ("rank 8", "rank 32", "full rank, 128")):
        edges = 20, 20 * values.shape[1], 27.5, -0.5
        image = ax.imshow(values, aspect="auto", cmap="gray", vmin=low, vmax=high, extent=edges)
        ax.set(title=title, xlabel="step (seed 0)")
    panels[0].set_ylabel("matrix (7 a block: q, k, v, out, gate, up, down)")
    ax.get_figure().colorbar(image, ax=panels, label="log₁₀ φ")
    return ax


def trend():
    path = stored.RESULTS.with_name("similarity-seed0.json")
    if not path.exists():
        return None
    panels = Figure(figsize=(8, 3.6), layout="constrained").subplots(1, 2, sharey=True)
    for ax, r in zip(panels, (8, 32)):
        for pair, style in (("R, full", "k-"), ("R, G", "k--"), ("R, X", "k:"), ("G, X", "k-.")):
            cosines = json.loads(path.read_text())[f"fira-svd-r{r}"][f"cosine {pair} by step"]
            ax.plot(20 * np.arange(1, 1 + len(cosines)), cosines, style, linewidth=0.9, label=f"φ of {pair}")
        ax.set(title=f"rank {r} of 128", xlabel="step (seed 0)")
    panels[0].set_ylabel("cosine over all columns")
    ax.legend(title="X = G − P R; full: the run of full rank", fontsize=7)
    return ax


def limiter():
    ax, drawn = Figure(figsize=(7, 4), layout="constrained").add_subplot(xlabel="step (seed 0)", ylim=(0, 1.05)), 0
    lines = {"1.1": "gamma1.1", "1.01": "fira", "1.001": "gamma1.001", "1": "gamma1"}
    for (gamma, name), (marker, size) in zip(lines.items(), (("o", 5), ("s", 5), ("^", 5), ("o", 11))):
        if one := load(name, 0):
            steps = len(one["log"]["step"]) // 10 * 10  # an entry for each ten
            limited = np.reshape(one["log"]["matrices_limited"][:steps], (-1, 10)).mean(1) / 28
            style = {"color": "black", "fillstyle": "none" if size > 5 else "full", "markersize": size}
            ax.plot(100 * np.arange(1, 1 + len(limited)), limited, marker + "-", label=f"γ = {gamma}", **style)
            drawn += 1
    ax.set_ylabel("share of the matrices whose S is cut")
    ax.legend()
    return drawn > 1 and ax


def memory():
    ax = Figure(figsize=(7, 4), layout="constrained").add_subplot()
    sizes = ("60m", "130m", "350m", "1b", "7b")
    adamw = {size: count(size, "AdamW")[2] for size in sizes}
    for i, (method, shade) in enumerate(zip(("LoRA", "GaLore", "Fira"), ("0.35", "0.65", "0.95"))):
        shares = [count(size, method)[2] / adamw[size] for size in sizes]
        ax.bar(np.arange(len(sizes)) + 0.25 * i - 0.25, shares, 0.25, color=shade, edgecolor="black", label=method)
    labels = [f"{size}, rank {TRAINING[size]['rank']}\n{adamw[size] / 1e9:.2f}e9 bytes" for size in sizes]
    ax.set_xticks(range(len(sizes)), labels)
    ax.set(ylabel="optimizer's state / AdamW's", xlabel="model and rank; bytes of AdamW's state")
    ax.legend()
    return ax
