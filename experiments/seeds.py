"""The README's results: every method at the default size, three seeds, as mean ± standard deviation.

    python -m experiments.seeds                 # every variant below; finished runs are kept, an hour and more on two cores
    python -m experiments.seeds fira adamw-1e-3 # some of them

Each run is `python train.py --steps 1500` with the flags below. With the seed, the initial weights and
the batches are the same for every variant, so differences are paired: their mean, ± the standard
deviation of the differences.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "fira": "",
    "galore": "--optimizer galore",
    "adamw-5e-4": "--optimizer adamw --lr 5e-4",
    "adamw-1e-3": "--optimizer adamw --lr 1e-3",
    "adamw-2e-3": "--optimizer adamw --lr 2e-3",
    "adamw-3e-3": "--optimizer adamw --lr 3e-3",
    "adamw-5e-3": "--optimizer adamw --lr 5e-3",
    "lora-1e-3": "--optimizer lora --lr 1e-3",
    "lora-3e-3": "--optimizer lora --lr 3e-3",
    "lora-1e-2": "--optimizer lora --lr 1e-2",
    "fira-paper": "--alpha_mode paper",
    "fira-released": "--alpha_mode released",
}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):8.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "         ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        sys.exit(f"error: no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    losses = {}
    for seed in args.seeds:
        for name in args.variants or VARIANTS:
            out = Path("out") / "seeds" / name
            if not (results := list(out.glob(f"*-seed{seed}/result.json"))):
                command = [sys.executable, "train.py", "--steps", "1500", "--seed", str(seed), "--out", str(out)]
                subprocess.run(command + VARIANTS[name].split(), check=True)
                results = list(out.glob(f"*-seed{seed}/result.json"))
            losses.setdefault(name, {})[seed] = json.loads(results[0].read_text())["val_loss"]
    base = next(iter(losses))
    print(f"{'variant':14} validation loss   minus {base}       seeds {args.seeds}")
    for name, by_seed in losses.items():
        differences = [by_seed[seed] - losses[base][seed] for seed in args.seeds]
        print(f"{name:14} {spread(list(by_seed.values()))} {spread(differences)}   {[round(loss, 4) for loss in by_seed.values()]}")


if __name__ == "__main__":
    main()
