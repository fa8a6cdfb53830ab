"""The pictures of `figures.py` that show what goes on in a step."""

import json

import numpy as np
from matplotlib.figure import Figure

from experiments import stored
from experiments.reductions import REFERENCE, variance_ratios
from experiments.stored import load

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
    bottom.set(yscale="log", xlabel="step")
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
        ax.plot([full.min(), full.max()], [full.min(), full.max()], "k:", linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="φ at full rank", title=f"rank {r} of 128")
    panels[0].set_ylabel("φ in the subspace")
    panels[0].legend(fontsize=7)
    return ax


def spikes():
    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    reference, drawn = load(REFERENCE, 0), 0
    for (name, line), shade in zip((("no-limiter", ":"), ("clipping", "--"), ("fira", "-")), ("0.6", "0.35", "0")):
        if (one := load(f"spike-lr0.03-{name}", 0)) and reference:
            log, n = one["log"], min(len(one["log"]["loss"]), len(reference["log"]["loss"]))
            above = np.array(log["loss"][:n]) - reference["log"]["loss"][:n]
            top.plot(log["step"][:n], above, line, color=shade, linewidth=0.9, label=name)
            bottom.plot(log["step"][: len(log["S_limited"])], log["S_limited"], line, color=shade, linewidth=0.9)
            drawn += 1
    for step in range(101, 750, 100):
        top.axvline(step, color="gray", linewidth=0.4)
    top.set(ylabel="loss above AdamW's, nats a byte")
    top.legend(title="lr 0.03, rank 8")
    bottom.set(yscale="log", xlabel="step", ylabel="‖S‖ after the limiter")
    return drawn and bottom


def variance():
    ax = Figure(figsize=(7, 4.2), layout="constrained").add_subplot(xscale="log", yscale="log")
    ratios, x = variance_ratios(), np.arange(1, 101)
    ax.plot(x, 3 / (x + 2), "k-", label="3/(n+2)")
    ax.plot(list(ratios), list(ratios.values()), "ks", fillstyle="none", label="simulated")
    ax.set(xlabel="entries in a column, n", ylabel="Var[φ²] / Var[ψ²]")
    ax.legend()
    return ax
