"""From the stored runs of `paper.py` to the rows and the page: paired differences, their intervals, verdicts."""

import json
import math
import statistics
from pathlib import Path

from experiments import stored
from experiments.choices import choice, marks
from experiments.claims import CLAIMS, GRIDS, RUNS
from experiments.reductions import REDUCTIONS
from experiments.stored import chosen, interval, load

PAPER_GAP, INSENSITIVE = math.log(34.88 / 31.06), 0.01  # GaLore − Fira at 60M in log-perplexity; nats
OVERVIEW = {  # the columns of the first table, and what marks a row of each
    "confirmed": " confirmed",
    "contradicted": "**contradicted**",
    "not seen": "not seen",
    "between": "above chance, below",
    "not decidable": "not decidable",
    "not run": "not run |",
}


def effect(paper: str) -> float | None:
    """The paper's difference in log-perplexity, from a cell such as 31.52/31.06; None where it has only a sign."""
    if paper[0] in "+-=?":
        return None
    a, b = map(float, paper.split("/"))
    return math.log(a / b)


def expected(paper: str, gap: float) -> float | None:
    """What the paper's difference would be here, in nats, where GaLore − Fira is `gap`; None where it has no number."""
    here = effect(paper)
    return None if here is None else here * gap / PAPER_GAP


def gap_here() -> tuple[float, float] | None:
    """Our own GaLore − Fira at the paper's settings, which scales its effects, with half its interval."""
    pairs = [(load("galore", seed), load("fira", seed)) for seed in range(10)]
    differences = [a["val_loss"] - b["val_loss"] for a, b in pairs if a and b]
    return interval(differences) if differences else None


def verdict(mean: float, half: float, paper: str, least: float = 0.0) -> str:
    """By the rule in the page's head; `least` is half of what is expected, by the lower end of the scale."""
    if paper[0] == "?":
        return ""
    if math.isinf(half):
        return "not decidable: one seed"
    if paper[0] == "=":
        inside, outside = abs(mean) + half <= INSENSITIVE, abs(mean) - half > INSENSITIVE
        return "confirmed" if inside else "**contradicted**" if outside else "not decidable here"
    sign = -1 if paper[0] == "-" or (effect(paper) or 0) < 0 else 1
    low, high = sign * mean - half, sign * mean + half
    if low > 0:
        return "confirmed" if high >= least else "confirmed, but under half the size"
    if high < 0:
        return "**contradicted**"
    return "not seen: under half the size" if high < least else "not decidable here"


def losses(claim: str, term: str, seeds: list[int]) -> tuple[dict[int, float], list[dict]]:
    """The losses of a run, or the sum of several, by seed; and the stored runs they are from."""
    total, used = dict.fromkeys(seeds, 0.0), []
    for run in term.split(" + "):
        run = chosen(claim, run[5:]) if run.startswith("best:") else run
        results = {seed: run and load(run, seed) for seed in seeds}
        used += [result for result in results.values() if result]
        total = {seed: total[seed] + results[seed]["val_loss"] for seed in total if results[seed]}
    return total, used


def row(claim: str, cells: list[str], seeds: list[int], gap: tuple[float, float] | None) -> str:
    text, a, b, paper = cells
    (x, used_x), (y, used_y) = losses(claim, a, seeds), losses(claim, b, seeds)
    here, both = gap and expected(paper, gap[0]), sorted(x.keys() & y.keys())
    least = abs(gap and expected(paper, max(0.0, gap[0] - gap[1])) or 0.0) / 2
    claimed = f"{paper} | {'' if here is None else f'{here:+.4f}'}"
    if not both:
        return f"| {text} | {claimed} | not run | | | |"
    diverged = [f"{which} diverged with seed {s}" for s in both for which, z in ((a, x), (b, y)) if math.isinf(z[s])]
    both = [seed for seed in both if math.isfinite(x[seed] + y[seed])]
    if not both:
        return f"| {text} | {claimed} | | | | {'; '.join(diverged)} |"
    mean, half = interval([x[seed] - y[seed] for seed in both])
    ours = f"{mean:+.4f}" + (f" ± {half:.4f}" if math.isfinite(half) else "")
    means = ", ".join(f"{statistics.mean(z[s] for s in both):.4f}" for z in (x, y) if "+" not in a)  # not sums of runs
    judged = "; ".join([verdict(mean, half, paper, least), *diverged])
    return f"| {text} | {claimed} | {ours}{marks(used_x + used_y)} | {means} | {' '.join(map(str, both))} | {judged} |"


def flags_of(name: str) -> str:
    """The runs of a claim and their flags, folded away."""
    words = " ".join(" ".join(cells[1:3]) if cells[0][0] != "!" else cells[1] for cells in CLAIMS[name]["rows"]).split()
    runs = [chosen(name, word[5:]) if word.startswith("best:") else word for word in words if word not in "+?"]
    lines = [f"    {run:28} {RUNS[run]}" for run in dict.fromkeys(runs) if run in RUNS]
    return "\n".join(["<details><summary>The runs</summary>\n", *lines, "\n</details>"]) if lines else ""


def section(name: str, seeds: list[int]) -> str:
    """A claim's part of the page."""
    claim, gap = CLAIMS[name], gap_here()
    parts = [f"## {name}: {claim['title']}", f"`python -m experiments.paper {name}`"]
    rows = [cells for cells in claim["rows"] if cells[0][0] != "!"]
    if rows:
        head = "| difference | paper | expected here | ours | losses | seeds | verdict |\n" + "| --- " * 7 + "|\n"
        parts.append(head + "\n".join(row(name, cells, seeds, gap) for cells in rows))
    parts += [choice(name, method) for method in GRIDS.get(name, {})]
    for kind, runs in (cells for cells in claim["rows"] if cells[0][0] == "!"):
        used = [result for run in runs.split() for seed in seeds if (result := load(run, seed))]
        parts += [REDUCTIONS[kind[1:]](runs.split(), seeds), marks(used)]
    parts.append(flags_of(name))
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def overview(sections: dict[str, str]) -> str:
    """How many rows of each claim came out how."""
    lines = ["| claim | | " + " | ".join(OVERVIEW) + " |", "| --- " * (len(OVERVIEW) + 2) + "|"]
    for name, text in sections.items():
        counts = [sum(mark in line for line in text.splitlines()) for mark in OVERVIEW.values()]
        if "Not run." in text:
            counts[-1] = "all"
        lines.append(
            f"| [{name}](#{name.lower()}) | {CLAIMS[name]['title']} | {' | '.join(str(n or '') for n in counts)} |"
        )
    return "\n".join(lines)


def write(path: Path) -> None:
    """The whole page: the claims, then what the other programs here have printed into experiments/results/."""
    gap, runs = gap_here(), [json.loads(file.read_text("utf-8")) for file in sorted(stored.RESULTS.glob("*.json"))]
    ours = f"{gap[0]:.4f} ± {gap[1]:.4f}" if gap else "not run yet"
    head = Path(__file__).with_name("head.md").read_text(encoding="utf-8")
    head = head.format(gap=ours, paper_gap=PAPER_GAP, insensitive=INSENSITIVE)
    sections = {name: section(name, claim["seeds"]) for name, claim in CLAIMS.items()}
    kinds = sorted({f"Python {r['python']}, torch {r['torch']}, {r['config']['data']} {r['data']}" for r in runs})
    notes = f"{len(runs)} runs: {'; '.join(kinds) or 'none'}. † marks what was trained with an older version of the "
    notes += "arithmetic, ‡ runs of different data, as Python's library differs.\n"
    parts = [head, notes, overview(sections) + "\n"]
    parts += [f'<a id="{name.lower()}"></a>\n\n{text}' for name, text in sections.items()]
    others = stored.RESULTS.parent
    for file in sorted(others.glob("*.txt")) + sorted(others.glob("*.md")):
        text = file.read_text(encoding="utf-8").rstrip()
        parts.append(f"## {file.stem}\n\n" + (text if file.suffix == ".md" else f"```text\n{text}\n```") + "\n")
    pictures = [f"![{picture.stem}](../assets/{picture.name})" for picture in sorted(Path("assets").glob("*.png"))]
    parts.append("## Pictures\n\n`python -m experiments.figures`\n\n" + "\n\n".join(pictures) + "\n")
    path.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {path}")
