"""The stored runs, and what decides a run's numbers as one hash: the code's syntax trees without comments, docstrings
and annotations. The loop in train.py, `train`, is not in it: mind the order of its steps."""

import ast
import functools
import hashlib
import json
import math
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

import prepare_data
from experiments.claims import GRIDS, RUNS

RESULTS, OUT = Path("experiments/results/runs"), Path("out/paper")

# It counts, of fira.py and model.py all but these, of train.py only these.
WITHOUT = {
    "restored",
    "load_state_dict",
    "check_group",
    "name_of",
    "load_pretrained",
    "export",
    "pairs",
    "hugging_face",
}
ONLY = {"batch", "build", "schedule", "evaluate", "METHODS", "PAPER", "SMALL", "RANKS", "TRAINING", "EVAL_TOKENS"}
ONLY |= {"GROUP_FLAGS"}


class Arithmetic(ast.NodeTransformer):
    """A syntax tree without what computes nothing: docstrings, annotations, texts of errors."""

    def visit_FunctionDef(self, node):
        if node.name in WITHOUT:
            return None
        node.returns = None
        return self.generic_visit(node)

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_Raise(self, node):
        return ast.Pass()


def names(node: ast.stmt) -> set[str]:
    """What a statement defines or changes: `f` of a function, A and B of `A, B = 1, 2`, C of `C |= 3`."""
    targets = getattr(node, "targets", [getattr(node, "target", node)])
    return {getattr(x, "name", getattr(x, "id", "")) for t in targets for x in getattr(t, "elts", [t])}


@functools.cache  # the page asks for some hundreds of hashes
def arithmetic(name: str, text: str) -> str:
    """The text of a file of this name without what computes nothing."""
    tree = ast.parse(text)
    if name == "train.py":
        tree.body = [node for node in tree.body if names(node) & ONLY]
    return ast.unparse(ast.fix_missing_locations(Arithmetic().visit(tree)))


def code_hash(flags: str = "") -> str:
    """The hash of the arithmetic of fira.py, model.py and train.py, and of the changes that the flags name."""
    words, files = flags.split(), ["fira.py", "model.py", "train.py"]
    patches = {word.split("=")[0] for word in words if word[0] != "-"} - {"record", "every_step"}  # which only look
    if "--variant" in words or "inside" in patches:
        files.append(words[words.index("--variant") + 1] if "--variant" in words else "variants/inner.py")
    changes = ast.parse((Path(__file__).parent / "patches.py").read_text(encoding="utf-8"))
    used = patches | {"before_each_step"} if patches & {"noise", "noise_blocks", "spike"} else patches
    changes.body = [n for n in changes.body if any(word.startswith(getattr(n, "name", "-")) for word in used)]
    parts = [arithmetic(file, Path(file).read_text(encoding="utf-8")) for file in files]
    parts.append(ast.unparse(ast.fix_missing_locations(Arithmetic().visit(changes))))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def interval(differences: list[float]) -> tuple[float, float]:
    """The mean of paired differences, and half the width of its 95 % interval by Student's t: inf for a single one, or
    where one diverged."""
    if len(differences) < 2 or not math.isfinite(sum(differences)):
        return statistics.mean(differences), math.inf
    n, t_975 = len(differences), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return statistics.mean(differences), t_975[n - 2] * statistics.stdev(differences) / math.sqrt(n)


def load(run: str, seed: int) -> dict | None:
    """A stored run; None if there is none, or if its name stands for other flags by now."""
    path = RESULTS / f"{run}-seed{seed}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("flags") == RUNS.get(run, "") else None


def kept(run: str, seed: int) -> bool:
    """Whether a run is stored, and of one with the recorder the record too, or what `similarity.py` made of it."""
    records = OUT / f"{run}-seed{seed}" / "record.npz", RESULTS.with_name(f"similarity-seed{seed}.json")
    recorded = not RUNS[run].startswith("record ") or any(path.exists() for path in records)
    return recorded and load(run, seed) is not None


def chosen(claim: str, method: str) -> str | None:
    """The run that seed 0 found best in a claim's grid, or None while one is missing."""
    results = {run: load(run, 0) for run in GRIDS[claim][method]}
    return None if None in results.values() else min(results, key=lambda run: results[run]["val_loss"])


def summary(folder: Path) -> dict:
    """What is kept of a finished run: its last evaluation, all evaluations, the log (some 30 entries of it
    for other seeds than 0), its configuration, and what it ran on."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    meta = prepare_data.load(config["data"])[0]
    log = [entry for entry in log if entry["step"] <= config["steps"]]
    every, kept = 10, ("step", "loss", "energy_share", "mean_phi", "S_norm", "S_limited", "matrices_limited")
    if log and log[0]["step"] == 1:  # `every_step` was at work
        every, kept = 1, ("step", "loss", "S_limited") if config["seed"] == 0 else ("step", "loss")
    elif config["seed"]:
        every = 10 * max(1, config["steps"] // 300)
    thinned = [entry for entry in log if entry["step"] % every == 0]
    end = log[-1] if log else {}  # empty where it diverged at once
    last = {k: end.get(k) for k in ("val_loss", "bits_per_byte", "state_bytes")}
    return last | {
        "ms_per_step": round(statistics.median([entry["ms_per_step"] for entry in log] or [math.nan]), 2),
        "evaluations": [[entry["step"], round(entry["val_loss"], 5)] for entry in log if "val_loss" in entry],
        "log": {k: [float(f"{entry[k]:.4g}") for entry in thinned if k in entry] for k in kept},
        "config": {k: v for k, v in config.items() if k not in ("name", "device", "threads")},
        "data": meta["sha256"][:12],
        "python": platform.python_version(),
        "torch": version("torch"),
    }
