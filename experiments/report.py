"""From the stored runs of `paper.py` to the rows and the page: paired differences, their intervals, verdicts."""

import json
import math
import statistics
from pathlib import Path

from experiments import stored
from experiments.choices import choice, marks
from experiments.claims import CLAIMS, GRIDS
from experiments.reductions import REDUCTIONS
from experiments.stored import chosen, code_hash, interval, load

PAPER_GAP, INSENSITIVE = math.log(34.88 / 31.06), 0.01  # GaLore − Fira at 60M in log-perplexity; nats

HEAD = """# Results: the paper's claims beside our own numbers

This page is made by `python -m experiments.paper --write` from the files under `experiments/results/`; nothing here is
typed by hand. The paper (arXiv:2410.01623) has single runs of models of 60M parameters and more on C4. Here a run is
`python train.py` at its default size: a LLaMA of 0.9M parameters on the bytes of Python's own library, 1,500 steps,
rank 32 of 128, on CPUs. A row is the difference of the validation loss (nats a byte) of two runs, paired by seed, which
decides the initial weights and the batches: mean ± half the 95 % interval by Student's t, and the seeds.

**Expected here** is the paper's effect, as a difference of log-perplexities, times our GaLore − Fira over the paper's
({paper_gap:.4f}), as tokens, models and budgets differ: ours is {gap:.4f} ({source}).

**Verdict.** Confirmed: the whole interval lies on the paper's side of 0. Contradicted: it lies wholly on the other
side, or wholly below half of what is expected. Where the paper claims no difference: confirmed if the interval lies
within ±{insensitive} nats, contradicted if it lies outside. Else not decidable with these seeds.
"""


def expected(paper: str, gap: float) -> float | None:
    """What a row's ratio of the paper's perplexities would be here, in nats; None where it has no number."""
    if "/" not in paper:
        return None
    a, b = map(float, paper.split("/"))
    return math.log(a / b) * gap / PAPER_GAP


def verdict(mean: float, half: float, paper: str, effect: float | None) -> str:
    """By the rule in the page's head."""
    if paper == "?":
        return ""
    if math.isinf(half):
        return "not decidable: one seed"
    if paper == "=":
        inside, outside = abs(mean) + half <= INSENSITIVE, abs(mean) - half > INSENSITIVE
        return "confirmed" if inside else "contradicted" if outside else "not decidable here"
    sign = -1 if paper == "-" or (effect or 0) < 0 else 1
    low, high = sign * mean - half, sign * mean + half
    if low > 0:
        return "confirmed" if not effect or high >= abs(effect) / 2 else "confirmed in sign, under half the size"
    if high < 0:
        return "**contradicted**"
    return "**contradicted**: under half the size" if effect and high < abs(effect) / 2 else "not decidable here"


def losses(claim: str, term: str, seeds: list[int]) -> tuple[dict[int, float], list[dict]]:
    """The losses of a run, or the sum of several, by seed; and the stored runs they are from."""
    total, used = dict.fromkeys(seeds, 0.0), []
    for run in term.split(" + "):
        run = chosen(claim, run[5:]) if run.startswith("best:") else run
        results = {seed: run and load(run, seed) for seed in seeds}
        used += [result for result in results.values() if result]
        total = {seed: total[seed] + results[seed]["val_loss"] for seed in total if results[seed]}
    return total, used


def gap_here() -> tuple[float, str]:
    """Our own GaLore − Fira, which scales the paper's effects, and where it is from."""
    for claim, a, b, source in (
        ("fair", "best:galore", "best:fira", "both tuned"),
        ("T3", "galore", "fira", "defaults"),
    ):
        (x, _), (y, _) = (losses(claim, term, CLAIMS[claim]["seeds"]) for term in (a, b))
        both = x.keys() & y.keys()
        if both and (gap := statistics.mean(x[seed] - y[seed] for seed in both)) > 0:
            return gap, source
    return 0.0823, "an earlier version's, as there are no runs yet"


def row(claim: str, cells: list[str], seeds: list[int], gap: float) -> str:
    text, a, b, paper = cells
    (x, used_x), (y, used_y) = losses(claim, a, seeds), losses(claim, b, seeds)
    effect, both = expected(paper, gap), sorted(x.keys() & y.keys())
    claimed = f"{paper} | {'' if effect is None else f'{effect:+.4f}'}"
    if not both:
        return f"| {text} | {claimed} | not run | | | |"
    mean, half = interval([x[seed] - y[seed] for seed in both])
    ours = f"{mean:+.4f}" + (f" ± {half:.4f}" if math.isfinite(half) else "")
    means = f"{statistics.mean(x[s] for s in both):.4f}, {statistics.mean(y[s] for s in both):.4f}"
    judged = verdict(mean, half, paper, effect) if math.isfinite(mean) else "one of them diverged"
    return f"| {text} | {claimed} | {ours}{marks(used_x + used_y)} | {means} | {' '.join(map(str, both))} | {judged} |"


def section(name: str, seeds: list[int]) -> str:
    """A claim's part of the page."""
    claim, (gap, _) = CLAIMS[name], gap_here()
    parts = [f"## {name}: {claim['title']}", f"`python -m experiments.paper {name}`"]
    rows = [cells for cells in claim["rows"] if cells[0][0] != "!"]
    if rows:
        head = "| difference | paper | expected here | ours | losses | seeds | verdict |\n" + "| --- " * 7 + "|\n"
        parts.append(head + "\n".join(row(name, cells, seeds, gap) for cells in rows))
    parts += [choice(name, method) for method in GRIDS.get(name, {})]
    for kind, runs in (cells for cells in claim["rows"] if cells[0][0] == "!"):
        used = [result for run in runs.split() for seed in seeds if (result := load(run, seed))]
        parts.append(REDUCTIONS[kind[1:]](runs.split(), seeds) + marks(used))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def write(path: Path) -> None:
    """The whole page: the claims, then what the other programs here have printed into experiments/results/."""
    gap, source = gap_here()
    head = HEAD.format(gap=gap, source=source, paper_gap=PAPER_GAP, insensitive=INSENSITIVE)
    sections = [section(name, claim["seeds"]) for name, claim in CLAIMS.items()]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(stored.RESULTS.glob("*.json"))]
    kinds = sorted({f"Python {r['python']}, torch {r['torch']}, data {r['data']}" for r in runs})
    notes = [f"{len(runs)} runs: {'; '.join(kinds) or 'none'}. The arithmetic's hash is {code_hash()}."]
    notes.append(
        "† trained with an older version of the arithmetic; ‡ runs of different data, as Python's library differs."
    )
    for file in sorted(path.with_name("results").glob("*.txt")) + sorted(path.with_name("results").glob("*.md")):
        text = file.read_text(encoding="utf-8").rstrip()
        sections.append(f"## {file.stem}\n\n" + (text if file.suffix == ".md" else f"```text\n{text}\n```") + "\n")
    pictures = [f"![{picture.stem}](../assets/{picture.name})" for picture in sorted(Path("assets").glob("*.png"))]
    sections.append("## Pictures\n\n`python -m experiments.figures`\n\n" + "\n\n".join(pictures) + "\n")
    path.write_text("\n".join([head, "\n\n".join(notes) + "\n", *sections]), encoding="utf-8")
    print(f"wrote {path}")
