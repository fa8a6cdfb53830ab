"""Memory of training: counted for the paper's sizes, and measured in a real step.

    python -m experiments.memory                     # 60m to 7b, counted without allocating anything
    python -m experiments.memory --measure 60m       # the peak of three training steps with each optimizer

Counted are weights, gradients and optimizer state, in the 16-bit weights of the paper's Table 3
(https://arxiv.org/abs/2410.01623), with its vocabulary of 32,000. "16-bit state" takes two bytes for
every number of the state, as the paper's column does; "ours" is what this code keeps: P in the weights'
dtype and Adam's moments in float32, because a bfloat16 V does not decay at β₂ = 0.999.
The paper's column differs further as it multiplies rounded counts (60M × 8 bytes), has GiB at 350m, and for Fira
and GaLore 0.12 G for all state at 60m, where the moments of embeddings and head alone take 0.13 G.
"""

import argparse
import subprocess
import sys

import torch

from fira import oriented, param_groups
from model import PRESETS, ModelConfig, Transformer, add_lora
from train import TRAINING, Config, build

PAPER = {  # Table 3, in G
    "AdamW": {"60m": 0.48, "130m": 1.01, "350m": 2.74, "1b": 10.40},
    "Fira": {"60m": 0.36, "130m": 0.77, "350m": 1.90, "1b": 6.98},
    "GaLore": {"60m": 0.36, "130m": 0.77, "350m": 1.90, "1b": 6.98},
    "LoRA": {"60m": 0.44, "130m": 0.99, "350m": 2.12, "1b": 7.36},
}
MEASURED = ("adamw", "galore", "fira", "fira --layerwise", "lora")


def state_bytes(groups: list[dict]) -> int:
    """Bytes of the state for groups of `param_groups`. For an (m, n) matrix with a rank (m the short side) that is P
    (m r), M and V (2 n r) and ‖S‖ (1), the paper's Table 2; for the others AdamW's 2 m n and the number of steps."""
    total = 0
    for group in groups:
        for p in group["params"]:
            moment, r = max(p.element_size(), 4), group["rank"]
            m, n = oriented(p, "std").shape if r else (p.numel(), 1)
            if r and r < m:
                total += m * r * p.element_size() + (2 * n * r + 1) * moment
            else:
                total += 2 * m * n * moment + 4
    return total


def count(size: str, method: str) -> tuple[int, int, int, int]:
    """Bytes of the 16-bit weights, of their gradients, of our state, and of a state of 16-bit numbers."""
    rank = TRAINING[size]["rank"]
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(size, 32_000, 256))
        if method == "LoRA":
            add_lora(model, rank)
    low_rank = rank if method in ("Fira", "GaLore") else None
    numbers = state_bytes(param_groups(model, low_rank)) // 4  # of float32 each
    model.bfloat16()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(p.nbytes for p in model.parameters()), gradients, state_bytes(param_groups(model, low_rank)), 2 * numbers


def table(*_) -> str:
    """What the paper says of the state's size, embeddings and head included, beside the count; for `report.py`."""

    def numbers(size: str, rank: int | None) -> int:
        with torch.device("meta"):
            return state_bytes(param_groups(Transformer(ModelConfig.preset(size, 32_000, 256)), rank)) // 4

    saved, times = 1 - numbers("1b", 512) / numbers("1b", None), numbers("7b", 1024) / numbers("7b", 128)
    lines = ["| claim | paper | counted | verdict |", "| --- | --- | --- | --- |"]
    for claim, paper, counted in (
        ("Fira's state at 1B, rank 512, is smaller than AdamW's by", "61.1 %", f"{100 * saved:.1f} %"),
        ("at 7B GaLore's state at rank 1024, over Fira's at rank 128", "8", f"{times:.1f}"),
    ):
        lines.append(f"| {claim} | {paper} | {counted} | {'confirmed' if counted == paper else '**contradicted**'} |")
    note = "The 8 holds for the projected matrices alone: embeddings and head keep AdamW's moments."
    return "\n".join(lines) + f"\n\n{note}"


def measure(size: str, method: str, device: str) -> int:
    """Peak bytes of three training steps on random tokens, a sequence each; of the whole process on a CPU."""
    optimizer, *layerwise = method.split(" --")  # the less for activations, the more is seen of the rest
    model, optimizer = build(Config(optimizer=optimizer, model=size, precision="fp32", device=device).resolve(), 32_000)

    def update(p):  # in which no other weight has a gradient
        optimizer.step()
        p.grad = None

    for p in model.parameters():
        if layerwise and p.requires_grad:
            p.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        tokens = torch.randint(32_000, (1, 257), device=device)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=PRESETS, metavar="MODEL", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--method", choices=MEASURED, help="only this one, and only its number")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.method:
        print(measure(args.measure, args.method, args.device))
    elif args.measure:
        print(f"peak memory of training {args.measure} in float32 on {args.device}, batch 1 × block_size tokens")
        for method in MEASURED:  # each in a process of its own
            command = [sys.executable, "-m", "experiments.memory", "--method", method, "--device", args.device]
            run = subprocess.run([*command, "--measure", args.measure], capture_output=True, text=True, check=True)
            print(f"{method:18} {int(run.stdout) / 1e6:8.0f} MB")
    else:
        print(f"{'G (1e9 bytes)':22} weights gradients  state: ours  16-bit   total: ours  16-bit   paper")
        for size in ("60m", "130m", "350m", "1b", "7b"):
            for method, paper in PAPER.items():
                weights, gradients, ours, short = (n / 1e9 for n in count(size, method))
                print(
                    f"{size:5} {method:6} rank {TRAINING[size]['rank']:<5} {weights:7.2f} {gradients:9.2f} "
                    f"{ours:12.2f} {short:7.2f} {weights + gradients + ours:13.2f} {weights + gradients + short:7.2f} "
                    f"{format(paper[size], '7.2f') if size in paper else '      -'}"
                )


if __name__ == "__main__":
    main()
