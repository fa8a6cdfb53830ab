"""What a step of an optimizer costs, on the matrices of a LLaMA's blocks, with random gradients.

    python -m experiments.benchmark                              # 60m, float32, CPU
    python -m experiments.benchmark --model 130m --device cuda --dtype bfloat16 --compile
    python -m experiments.benchmark --old ../before/fira.py      # another fira.py in the same run
    pip install -e ".[peers]"                                    # adds the releases of Fira, GaLore, APOLLO
                                                                 # and pytorch_optimizer's Fira to the table

All optimizers take a step in turn, so that a slow minute of the machine is everybody's. Of these times
    step     is the median,
    change   what a step that changes all subspaces takes beyond that,
    longest  the longest step after the first,
    extra    the most memory that a step without a change allocates, above weights, gradients and state.
"two GEMMs" multiplies by Pᵀ and by P: what every low-rank step has to do.
"""

import argparse
import logging
import os
import statistics
import time
from functools import partial
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would print lines of its own

import torch

import fira
from experiments.contenders import contenders
from fira import Fira, oriented, param_groups
from model import PRESETS, ModelConfig, Transformer
from train import TRAINING


def state_tensors(x):
    """All tensors in an optimizer's state, also those inside of objects."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict) or hasattr(x, "__dict__"):
        for value in (x if isinstance(x, dict) else vars(x)).values():
            yield from state_tensors(value)


def extra_bytes(step, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # every allocation and release, in order
    return max(accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0))


def table(model="60m", device="cpu", dtype="float32", compile=False, gap=10, windows=3, old=None) -> str:
    """The table, as text."""
    device, dtype, rank = torch.device(device), getattr(torch, dtype), TRAINING[model]["rank"]
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = [p.shape for p in param_groups(Transformer(ModelConfig.preset(model, 32_000, 256)), rank)[0]["params"]]
    gradients = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]

    def weights():
        params = [torch.nn.Parameter(torch.zeros_like(G)) for G in gradients]
        for p, G in zip(params, gradients):
            p.grad = G
        return params

    makers = contenders(rank, gap, old)
    if compile:
        makers["Fira, compiled"] = partial(Fira, rank=rank, update_proj_gap=gap)
    optimizers = {name: make(weights()) for name, make in makers.items()}
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    plain, compiled = fira.fira_update, torch.compile(fira.fira_update, fullgraph=True, dynamic=False)

    def compiled_step():
        fira.fira_update = compiled
        optimizers["Fira, compiled"].step()
        fira.fira_update = plain

    if compile:
        steps["Fira, compiled"] = compiled_step
    P, W = [torch.linalg.qr(torch.randn(min(G.shape), rank, device=device))[0].to(dtype) for G in gradients], weights()

    @torch.no_grad()
    def two_gemms():
        for w, G, p in zip(W, gradients, P):
            oriented(w, "std").addmm_(p, (oriented(G, "std").T @ p).T, alpha=1e-9)

    steps["two GEMMs"] = two_gemms
    sums, times = [G.float().sum() for G in gradients], {name: [] for name in steps}
    for _ in range(1 + windows * gap):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    assert all(G.float().sum() == s for G, s in zip(gradients, sums)), "an optimizer changed the gradients"
    extra = {
        name: min(extra_bytes(step, device) for _ in range(2)) for name, step in steps.items()
    }  # one has no change

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    numbers = f"{len(shapes)} matrices, {sum(s.numel() for s in shapes) / 1e6:.1f}M weights, rank {rank}, {dtype}"
    lines = [f"{model}: {numbers.replace('torch.', '')}; {hardware}, torch {torch.__version__}"]
    lines.append(f"{'':24}  step ms  /AdamW  /GEMMs  change ms  longest ms  state MB  extra MB")
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    for name, t in times.items():
        change = "-"
        if "AdamW" not in name and "GEMM" not in name:
            each = [t[1 + i * gap :][:gap] for i in range(windows)]  # with one change in each
            change = f"{statistics.median(max(w) - statistics.median(w) for w in each):.0f}"
        state = sum(x.nbytes for x in state_tensors(getattr(optimizers.get(name), "state", {})))
        line = f"{name:24} {median[name]:8.1f} {median[name] / median['AdamW, fused']:7.2f}"
        line += f" {median[name] / median['two GEMMs']:7.2f} {change:>10} {max(t[1:]):11.0f}"
        lines.append(line + f" {state / 1e6:9.1f} {extra[name] / 1e6:9.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="60m", choices=PRESETS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="also Fira with torch.compile(fira_update)")
    parser.add_argument("--gap", type=int, default=10, help="steps between subspace changes (default 10)")
    parser.add_argument("--windows", type=int, default=3, help="subspace changes to measure (default 3)")
    parser.add_argument("--old", type=Path, metavar="FILE", help="another fira.py, in the same turns")
    logging.disable(logging.WARNING)
    print(table(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
