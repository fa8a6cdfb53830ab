"""The paper's claims (arXiv:2410.01623) beside our own numbers: trains what is missing, and prints the rows.

    python -m experiments.paper --plan              # the claims, the runs that each still needs, and their time
    python -m experiments.paper fair                # a claim: trains what is missing, two runs at a time, then its rows
    python -m experiments.paper T5 --seeds 0 1 2    # with other seeds than the claim's own
    python -m experiments.paper all                 # every claim, in the order of their worth
    python -m experiments.paper --write             # experiments/RESULTS.md, from the stored runs

Which runs there are says `claims.py`, which differences the claims are about `claims.txt`. A run is `python train.py`
with one thread, in out/paper/; its result is kept in experiments/results/runs/, and what is there is not trained again
(delete a file to train it again). An interrupted run goes on from its last checkpoint.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from experiments import patches, report, stored
from experiments.claims import CLAIMS, GRIDS, RUNS
from experiments.stored import chosen, code_hash, kept, load, summary

STEPS = 1500


def needed(name: str, seeds: list[int]) -> list[tuple[str, int]]:
    """The runs that a claim still lacks, those of its grid first."""
    grid = [(run, 0) for runs in GRIDS.get(name, {}).values() for run in runs]
    texts = [row[1] if row[0][0] == "!" else f"{row[1]} {row[2]}" for row in CLAIMS[name]["rows"]]
    runs = dict.fromkeys(word for text in texts for word in text.split() if word != "+")
    best = {run: chosen(name, run[5:]) for run in runs if run.startswith("best:")}
    rest = [(best.get(run, run), seed) for seed in seeds for run in runs if best.get(run, run)]
    return [job for job in dict.fromkeys(grid + rest) if not kept(*job)]


def split(flags: str) -> tuple[list[str], list[str]]:
    """The words of `patches.py` in front, and the flags of train.py."""
    words = flags.split()
    changes = [word for word in words if word.split("=")[0] in patches.CHANGES]
    return changes, words[len(changes) :]


def train(run: str, seed: int) -> None:
    """Train a run, and keep its result. Raises RuntimeError with the last line that it printed."""
    (changes, flags), folder = split(RUNS[run]), stored.OUT / f"{run}-seed{seed}"
    flags += ["--steps", str(STEPS)] * ("--steps" not in flags or STEPS < 500)
    flags += ["--eval_interval", str(STEPS)] * (STEPS < 500)
    flags += ["--seed", str(seed), "--name", str(folder), "--threads", "1", "--device", "cpu"]
    command = ["-m", "experiments.patches", *changes] if changes else ["train.py"]
    code, begun, stamp = code_hash(RUNS[run]), time.time(), folder / "code"
    same = stamp.exists() and stamp.read_text() == code
    if (folder / "ckpt.pt").exists() and same and not changes:
        flags.append("--resume")
    elif folder.exists():  # of other code; or a recorder or a generator of noise, which cannot go on in the middle
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text(code)
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command, *flags], check=False, **options)
    line = [f"exit status {done.returncode}", *(done.stderr.strip() or done.stdout.strip()).splitlines()][-1]
    if done.returncode and "not finite" not in line:
        raise RuntimeError(f"{folder.name}: {line}")
    stored.RESULTS.mkdir(parents=True, exist_ok=True)
    result = summary(folder) | {"run": run, "seed": seed, "flags": RUNS[run], "code": code}
    if done.returncode:  # it diverged, which is a result
        result["val_loss"] = math.inf
    result["minutes"] = round((time.time() - begun) / 60, 2)
    path = stored.RESULTS / f"{folder.name}.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    (folder / "ckpt.pt").unlink(missing_ok=True)  # 10 MB each


def campaign(jobs: list[tuple[str, int]]) -> None:
    """Train these runs, two at a time; one that fails is reported, and the others go on."""
    if any("finetune" in RUNS[run] for run, _ in jobs):
        patches.prepare_finetuning(stored.OUT, STEPS)
    bar = tqdm(total=len(jobs), unit="run", dynamic_ncols=True)
    with ThreadPoolExecutor(2) as pool:
        futures = {pool.submit(train, *job): job for job in jobs}
        try:
            for future in as_completed(futures):
                bar.update()
                run, seed = futures[future]
                if error := future.exception():
                    tqdm.write(f"failed: {error}")
                else:
                    tqdm.write(f"{run}, seed {seed}: validation loss {load(run, seed)['val_loss']:.4f}")
        except KeyboardInterrupt:  # the two at work save and stop by themselves
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped; the same command goes on")
    bar.close()


def plan() -> None:
    """What each claim still needs, and for how long, if the claims are run in this order."""
    runs, seen = [json.loads(path.read_text("utf-8")) for path in stored.RESULTS.glob("*.json")], set()
    minutes = statistics.median([run["minutes"] / run["config"]["steps"] for run in runs] or [0.003])  # of a step
    for name, claim in CLAIMS.items():
        jobs = [job for job in needed(name, claim["seeds"]) if job not in seen]
        seen.update(jobs)
        words = [split(RUNS[run])[1] for run, _ in jobs]
        steps = sum(int(w[w.index("--steps") + 1]) if "--steps" in w else STEPS for w in words)
        later = len(claim["seeds"]) * sum(chosen(name, method) is None for method in GRIDS.get(name, {}))
        chosen_later = f"+ {later} that seed 0 chooses" if later else ""
        print(f"{name:12} {len(jobs):3} runs {chosen_later:24} {steps * minutes / 2:4.0f} min  {claim['title']}")
    print(f"{len(seen)} runs in all")


def main() -> None:
    global STEPS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"all, or of {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the claim's own")
    parser.add_argument("--plan", action="store_true", help="only print what there is to run")
    parser.add_argument("--write", action="store_true", help="only write experiments/RESULTS.md")
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)  # to try this program
    args, failed = parser.parse_args(), []
    if hasattr(os, "nice"):
        os.nice(10)  # the runs, too, let other work go first
    if unknown := set(args.claims) - {"all", *CLAIMS}:
        sys.exit(f"error: no claim {', '.join(unknown)}; there are all, {', '.join(CLAIMS)}")
    if args.steps != STEPS:
        stored.OUT, STEPS = Path(f"out/paper-{args.steps}steps"), args.steps
        stored.RESULTS = stored.OUT / "results" / "runs"
    if args.plan:
        plan()
    for name in CLAIMS if "all" in args.claims else args.claims:
        seeds = args.seeds or CLAIMS[name]["seeds"]
        while jobs := needed(name, seeds):  # twice where seed 0 has to choose first
            campaign(jobs)
            if set(needed(name, seeds)) & set(jobs):
                failed.append(name)
                break
        print(report.section(name, seeds))
    if args.write:
        report.write(Path("experiments/RESULTS.md") if args.steps == 1500 else stored.OUT / "RESULTS.md")
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
