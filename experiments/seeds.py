"""The README's results: each method at the default size over three seeds, mean ± standard deviation.

    python -m experiments.seeds                        # the table; an hour and more on two cores
    python -m experiments.seeds fira fira-svd fira-random fira-keep fira-rotate    # how the subspace changes
    python -m experiments.seeds adamw-5e-4 adamw-1e-3 adamw-2e-3 adamw-3e-3 --seeds 0    # learning rates
    python -m experiments.seeds lora-1e-3 lora-3e-3 lora-1e-2 --seeds 0

A run is `python train.py --steps 1500` with a variant's flags below; finished runs are kept under
out/seeds. The seed decides the initial weights and the batches, the same for every variant, so the
differences from the first variant are paired: their mean ± their standard deviation.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

TABLE = {
    "fira": "",
    "fira-released": "--alpha_mode released",
    "fira-paper": "--alpha_mode paper",
    "adamw-2e-3": "--optimizer adamw --lr 2e-3",
    "lora-3e-3": "--optimizer lora --lr 3e-3",
    "galore": "--optimizer galore",
}
VARIANTS = TABLE | {
    "fira-svd": "--proj_method svd",
    "fira-random": "--proj_method random",
    "fira-keep": "--moments keep",
    "fira-rotate": "--moments rotate",
    "adamw-5e-4": "--optimizer adamw --lr 5e-4",
    "adamw-1e-3": "--optimizer adamw --lr 1e-3",
    "adamw-3e-3": "--optimizer adamw --lr 3e-3",
    "lora-1e-3": "--optimizer lora --lr 1e-3",
    "lora-1e-2": "--optimizer lora --lr 1e-2",
}


def result(variant: str, seed: int) -> dict:
    """A run's result.json; trains where there is none yet."""
    out = Path("out") / "seeds" / variant
    while not (found := list(out.glob(f"*-seed{seed}/result.json"))):
        command = [sys.executable, "train.py", "--steps", "1500", "--seed", str(seed), "--out", str(out)]
        subprocess.run(command + VARIANTS[variant].split(), check=True)
    return json.loads(found[0].read_text())


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        sys.exit(f"error: no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    runs = {variant: [result(variant, seed) for seed in args.seeds] for variant in args.variants or TABLE}
    base = next(iter(runs))
    seeds = " ".join(f"seed {seed}" for seed in args.seeds)
    print(f"{'variant':14} {'validation loss':18} {'minus ' + base:19} {'bits per byte':18} {seeds}")
    for variant, results in runs.items():
        losses = [r["val_loss"] for r in results]
        differences = [r["val_loss"] - b["val_loss"] for r, b in zip(results, runs[base])]
        bits = [r["bits_per_byte"] for r in results]
        each = " ".join(f"{loss:.4f}" for loss in losses)
        print(f"{variant:14} {spread(losses):18} {spread(differences):19} {spread(bits):18} {each}")


if __name__ == "__main__":
    main()
