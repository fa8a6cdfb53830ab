"""One report, in Markdown, on what this GPU makes of Fira; within ten minutes.

    python -m experiments.gpu > experiments/results/gpu.md
    python -m experiments.gpu --device cpu --quick        # a stand-in: the small model, two steps

Nothing is read from disk: the models train on random tokens, with the paper's batch of 512 sequences of 256 tokens.
What would begin after --minutes is left out, and the report says so.
"""

import argparse
import platform
import statistics
import time

import torch

import fira
from experiments import benchmark
from experiments.on_device import suite, ten_steps
from train import Config, build

VOCABULARY = 32_000
COMPARED = ("adamw", "fira", "galore", "lora")  # AdamW first: its speed is the measure
BEGIN = time.perf_counter()


def hardware(device: torch.device) -> str:
    lines = [f"- torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"]
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        lines.append(f"- {p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    return "\n".join(lines)


def training_step(model, forward, optimizer, batch: int, accumulate: int, device: torch.device) -> None:
    for _ in range(accumulate):
        tokens = torch.randint(VOCABULARY, (batch, 257), device=device)
        (forward(tokens[:, :-1], tokens[:, 1:]) / accumulate).backward()
    optimizer.step()
    optimizer.zero_grad()


def throughput(sizes: list[str], device, batch: int, accumulate: int, seconds: float, deadline: float) -> str:
    """Thousands of tokens per second and peak memory, of each method plain and compiled."""
    lines = ["| model | method | compiled | ms a step | AdamW's speed | 1,000 tokens/s | peak GB |", "| --- " * 7 + "|"]
    plan, adamw = {"device": str(device), "precision": "bf16"}, 0.0
    plain, wait = fira.fira_update, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for size, compiled, method in ((s, c, m) for s in sizes for c in (False, True) for m in COMPARED):
        if time.perf_counter() - BEGIN > deadline:
            lines.append(f"| {size} | {method} | {compiled} | left out: the time was over | | | |")
            continue
        model = optimizer = forward = None  # or two would be in memory
        model, optimizer = build(Config(method, model=size, update_proj_gap=10_000, **plan).resolve(), VOCABULARY)
        forward = torch.compile(model) if compiled else model
        fira.fira_update = torch.compile(plain, dynamic=False) if compiled else plain
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        while len(times) < 5 or sum(times[2:]) < seconds:
            wait()
            start = time.perf_counter()
            training_step(model, forward, optimizer, batch, accumulate, device)
            wait()
            times.append(time.perf_counter() - start)
        fira.fira_update = plain
        ms = 1000 * statistics.median(times[2:])  # the first two choose the subspaces, and compile
        adamw = ms if method == "adamw" else adamw
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if device.type == "cuda" else "-"
        row = (size, method, compiled, f"{ms:.1f}", f"{100 * adamw / ms:.1f} %")
        lines.append(f"| {' | '.join(map(str, row))} | {256 * batch * accumulate / ms:.1f} | {peak} |")
    return "\n".join(lines)


def largest_batch(sizes: list[str], device: torch.device, most: int, deadline: float) -> str:
    """By doubling: the most sequences of 256 tokens in a forward and backward pass that do not run out of memory."""
    lines = ["| model | method | largest batch of a power of two |", "| --- | --- | --- |"]
    plan = {"device": str(device), "precision": "bf16"}
    for size in sizes:
        for method in ("fira", "galore", "adamw"):
            batch, model, optimizer = 0, *build(Config(method, model=size, **plan).resolve(), VOCABULARY)
            try:
                while (next_one := 2 * batch or 1) <= most and time.perf_counter() - BEGIN < deadline:
                    training_step(model, model, optimizer, next_one, 1, device)
                    batch = next_one
            except torch.OutOfMemoryError:
                pass
            model = optimizer = None
            torch.cuda.empty_cache()  # which does nothing without one
            lines.append(f"| {size} | {method} | {batch}{'' if batch < most else ' (no more tried)'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest models and two steps, to try this program")
    parser.add_argument("--minutes", type=float, default=9)
    args = parser.parse_args()
    device, deadline = torch.device(args.device), 60 * args.minutes
    sizes, batch, accumulate, seconds = (["9m"], 1, 2, 0) if args.quick else (["60m", "130m"], 64, 8, 5)
    model, most = ("nano", 2) if args.quick else ("60m", 4096)
    for title, make in {
        "Hardware": lambda: hardware(device),
        "Right, and without waiting": lambda: ten_steps(device),
        "Tests of fira.py": lambda: suite(device, 0.25 * deadline),
        "Steps": lambda: f"```text\n{benchmark.table(model, device, 'bfloat16', not args.quick)}\n```",
        "Training": lambda: throughput(sizes, device, batch, accumulate, seconds, 0.8 * deadline),
        "Memory": lambda: largest_batch(sizes, device, most, deadline),
    }.items():
        print(f"## {title}\n\n{make()}\n", flush=True)
    print(f"{(time.perf_counter() - BEGIN) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
