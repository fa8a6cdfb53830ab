"""The pictures in assets/, drawn from the stored runs; readable in black and white.

python -m experiments.figures                # all that the stored runs allow
python -m experiments.figures ablations      # one of them

losses      the validation loss of the methods, each at its own best setting, mean and range over the seeds
ablations   the differences to Fira with their intervals, and what the paper's would be here
ranks       the loss by rank
subspace    the share of the gradient's energy in the subspace, mean φ, and what the limiter does, over the steps
limiter     how many matrices are limited, by γ
phi         φ of each matrix, in the subspace and at full rank
level       how large φ is beside Adam's own, of the whole gradient and of the rest, and what chance would make of it
heatmap     the same over the steps, matrix by matrix
trend       over the steps, how alike φ of R is to φ of the whole gradient, of the rest, and of the run at full rank
spikes      the training loss above AdamW's on the same batches, with and without the limiter
variance    the variance of φ² by the columns' length
memory      the state's bytes by model and method beside AdamW's, counted
"""

import json
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import report, stored
from experiments.claims import CLAIMS
from experiments.figures_steps import heatmap, limiter, memory, phi, runs, spikes, subspace, trend, variance
from experiments.stored import chosen

ASSETS, STYLES = Path("assets"), [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (6, 1, 1, 1)), "v")]


def axes(**labels):
    return Figure(figsize=(7, 4.2), layout="constrained").add_subplot(**labels)


def losses():
    ax, drawn = axes(xlabel="step", ylabel="validation loss, nats a byte"), 0
    names = {
        "Fira": runs("default"),
        "Fira, Algorithm 1": runs(chosen("fair", "algorithm1")),
        **{m: runs(chosen("fair", m.lower())) or runs(m.lower()) for m in ("AdamW", "GaLore", "LoRA")},
    }
    for i, (name, found) in enumerate(names.items()):
        if found:
            most = max(len(result["evaluations"]) for result in found)
            found = [result for result in found if len(result["evaluations"]) == most]
            steps = [step for step, _ in found[0]["evaluations"]]
            values = np.array([[loss for _, loss in result["evaluations"]] for result in found])
            setting = {key: found[0]["config"][key] for key in ("lr", "alpha")[: 1 if name in ("AdamW", "LoRA") else 2]}
            label = ", ".join([name, *(f"{'α' if k == 'alpha' else k} {v:g}" for k, v in setting.items())])
            line, marker = STYLES[i]
            ax.plot(steps, values.mean(0), color=f"C{i}", linestyle=line, marker=marker, label=label)
            ax.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.2)
            drawn += 1
    ax.legend(title=f"mean and range, at least {min(map(len, names.values()))} seeds")
    ax.set_ylim(top=2.0)
    return drawn > 1 and ax


def ablations():
    gap, rows, drawn = report.gap_here(), [], []
    for claim in ("T5", "T15", "T3", "T11"):
        for text, a, b, paper in (cells for cells in CLAIMS[claim]["rows"] if cells[0][0] != "!"):
            (x, _), (y, _) = (report.losses(claim, term, CLAIMS[claim]["seeds"]) for term in (a, b))
            both = [seed for seed in x if seed in y]
            if len(both) > 1 and b == "fira" and a not in drawn:
                drawn.append(a)
                scaled = gap and report.expected(paper, gap[0])
                rows.append((text, *report.interval([x[s] - y[s] for s in both]), scaled))
    ax = axes(xlabel="minus Fira (α 1/4, lr 0.01), nats a byte, 95 % interval")
    for i, (_, mean, half, expected) in enumerate(rows):
        ax.errorbar(mean, -i, xerr=half, fmt="o", color="black", capsize=3, label=None if i else "here")
        if expected is not None:
            label = None if i else "the paper's, scaled"
            ax.plot(expected, -i, "D", color="gray", fillstyle="none", zorder=3, markersize=9, label=label)
    ax.set_yticks([-i for i in range(len(rows))], [row[0].removesuffix(" − Fira") for row in rows], fontsize=8)
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.locator_params(axis="x", nbins=5)
    ax.get_figure().legend(loc="outside lower center", ncols=2, fontsize=8)
    return rows and ax


def ranks():
    ax, drawn = axes(xlabel="rank (of 128)", ylabel="validation loss, nats a byte", xscale="log"), 0
    lines = {"Fira": "fira-svd-r{}", "GaLore": "galore-r{}", "only scaling": "only-r{}"}
    x, seeds = (2, 4, 8, 32, 64, 128), CLAIMS["F5"]["seeds"]
    for (label, name), (line, marker) in zip(lines.items(), STYLES):
        found = {r: runs(name.format(r) if (label, r) != ("GaLore", 32) else "galore") for r in x}
        found = {r: [one["val_loss"] for one in some if one["seed"] in seeds] for r, some in found.items()}
        points = {r: losses for r, losses in found.items() if len(losses) == len(seeds)}
        if len(points) > 1:
            low, high, mean = ([f(losses) for losses in points.values()] for f in (min, max, statistics.mean))
            ax.plot(points.keys(), mean, color="black", linestyle=line, marker=marker, label=label)
            ax.fill_between(points.keys(), low, high, color="gray", alpha=0.3)
            drawn += 1
    if losses := [one["val_loss"] for one in runs("adamw") if one["seed"] in seeds]:
        ax.axhline(statistics.mean(losses), color="gray", linewidth=3, alpha=0.5, label="AdamW")
    ax.set_xticks(x, x)
    ax.legend(title=f"mean and range, {len(seeds)} seeds")
    return drawn and ax


def level():
    paths, x = sorted(stored.RESULTS.parent.glob("similarity-seed*.json")), (8, 32, 64)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    ax = axes(xlabel="rank (of 128)", ylabel="φ of R / Adam's own φ, geometric mean", ylim=(0, 1.1))
    for key, name, (line, marker), shade in zip(("R/G", "R/X"), ("whole gradient", "rest"), STYLES, ("0", "0.5")):
        if found:
            values = np.array([[f[f"fira-svd-r{r}"][f"level {key}"] for r in x] for f in found])
            chance = [found[0][f"fira-svd-r{r}"][f"level {key} chance"] for r in x]
            random = statistics.mean(f["fira-random-r32"][f"level {key}"] for f in found)
            ends = np.abs(np.stack([values.min(0), values.max(0)]) - values.mean(0))
            label = f"leading singular vectors, Adam of the {name}"
            ax.errorbar(x, values.mean(0), ends, color=shade, linestyle=line, marker=marker, capsize=3, label=label)
            ax.plot(
                32, random, marker, color=shade, fillstyle="none", markersize=9, label=f"random P, Adam of the {name}"
            )
            ax.plot(x, chance, color=shade, linestyle=":", label=f"by chance, {name}")
    ax.set_xticks(x)
    ax.legend(fontsize=7, ncols=2, loc="lower right")
    return found and ax


def main() -> None:
    drawings = (losses, ablations, ranks, subspace, limiter, phi, level, heatmap, trend, spikes, variance, memory)
    wanted = sys.argv[1:] or [f.__name__ for f in drawings]
    if unknown := set(wanted) - {f.__name__ for f in drawings}:
        sys.exit(f"error: no figure {', '.join(unknown)}; there are {', '.join(f.__name__ for f in drawings)}")
    warnings.filterwarnings("ignore", "No artists with labels")  # a picture that has no runs yet
    ASSETS.mkdir(exist_ok=True)
    for draw in drawings:
        if draw.__name__ in wanted:
            ax = draw()
            for dpi in (110, 80, 60) if ax else ():  # below 120 kB
                ax.get_figure().savefig(path := ASSETS / f"{draw.__name__}.png", dpi=dpi)
                if path.stat().st_size < 120_000:
                    break
            print(f"{draw.__name__}: {'wrote' if ax else 'no runs yet for'} {ASSETS / draw.__name__}.png")


if __name__ == "__main__":
    main()
