"""What a step of an optimizer costs, on the matrices of a LLaMA's blocks, with random gradients.

    python -m experiments.benchmark                              # 60m, float32, CPU
    python -m experiments.benchmark --model 130m --device cuda --dtype bfloat16 --compile
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
import importlib.util
import logging
import os
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from itertools import accumulate

import torch

import fira
from fira import Fira, oriented, param_groups
from model import PRESETS, ModelConfig, Transformer
from train import TRAINING


def contenders(rank: int, gap: int) -> dict:
    """name: function from parameters to an optimizer."""
    rows = {
        "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
        "AdamW, foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    }
    family = {
        "Fira, svd": {"proj_method": "svd"},
        "Fira, subspace": {"proj_method": "subspace"},
        "Fira, subspace, spread": {"proj_method": "subspace", "spread": True},
        "Fira, random": {"proj_method": "random"},
        "Fira-matrix": {"scaling": "matrix"},
        "GaLore": {"scaling": None, "proj_method": "svd"},
        "APOLLO": {"only_scaling": True, "proj_method": "random"},
    }
    for name, options in family.items():
        rows[name] = lambda params, o=options: Fira(params, rank=rank, update_proj_gap=gap, **o)
    try:  # the release's module has our module's name, so it is loaded by path under another
        path = distribution("fira").locate_file("fira/__init__.py")
        spec = importlib.util.spec_from_file_location(
            "fira_release", path, submodule_search_locations=[str(path.parent)]
        )
        release = sys.modules["fira_release"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(release)
        import apollo_torch
        import galore_torch
        import pytorch_optimizer
    except (PackageNotFoundError, ImportError) as error:
        print(f'without the peers ({error}): pip install -e ".[peers]"')
        return rows
    group = {"rank": rank, "update_proj_gap": gap, "proj_type": "std"}
    peers = {
        "fira's release": (release.FiraAdamW, {"alpha": 0.25}),
        "galore-torch": (galore_torch.GaLoreAdamW, {"scale": 0.25}),
        "apollo-torch": (apollo_torch.APOLLOAdamW, {"scale": 1.0, "scale_type": "channel", "proj": "random"}),
        "pytorch_optimizer": (pytorch_optimizer.Fira, {"scale": 0.25, "projection_type": "std"}),
    }
    for name, (make, options) in peers.items():
        rows[name] = lambda params, make=make, options=options: make([{"params": params} | group | options])
    return rows


def state_tensors(x):
    """All tensors in an optimizer's state, also those inside of objects."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from state_tensors(value)
    elif hasattr(x, "__dict__"):
        yield from state_tensors(vars(x))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="60m", choices=PRESETS)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="also Fira with torch.compile(fira_update)")
    parser.add_argument("--gap", type=int, default=10, help="steps between subspace changes (default 10)")
    parser.add_argument("--windows", type=int, default=3, help="subspace changes to measure (default 3)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would print lines of its own
    torch.manual_seed(0)
    rank, dtype = TRAINING[args.model]["rank"], getattr(torch, args.dtype)
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset(args.model, 32_000, 256))
    shapes = [p.shape for p in param_groups(model, rank)[0]["params"]]
    gradients = [torch.randn(shape, device=args.device, dtype=dtype) for shape in shapes]

    def weights():
        params = [torch.nn.Parameter(torch.zeros_like(G)) for G in gradients]
        for p, G in zip(params, gradients):
            p.grad = G
        return params

    optimizers = {name: make(weights()) for name, make in contenders(rank, args.gap).items()}
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    if args.compile:
        plain, compiled = fira.fira_update, torch.compile(fira.fira_update, fullgraph=True, dynamic=False)
        optimizers["Fira, compiled"] = Fira(weights(), rank=rank, update_proj_gap=args.gap, proj_method="subspace")

        def compiled_step():
            fira.fira_update = compiled
            optimizers["Fira, compiled"].step()
            fira.fira_update = plain

        steps["Fira, compiled"] = compiled_step
    P = [torch.linalg.qr(torch.randn(min(G.shape), rank, device=args.device))[0].to(dtype) for G in gradients]
    W = weights()

    @torch.no_grad()
    def two_gemms():
        for w, G, p in zip(W, gradients, P):
            oriented(w, "std").addmm_(p, (oriented(G, "std").T @ p).T, alpha=1e-9)

    steps["two GEMMs"] = two_gemms
    sums = [G.float().sum() for G in gradients]
    times = {name: [] for name in steps}
    for _ in range(1 + args.windows * args.gap):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    assert all(G.float().sum() == s for G, s in zip(gradients, sums)), "an optimizer changed the gradients"

    hardware = f"{torch.get_num_threads()} CPU threads"
    if args.device.type == "cuda":
        hardware = torch.cuda.get_device_name(args.device)
    extra = {
        name: min(extra_bytes(step, args.device) for _ in range(2)) for name, step in steps.items()
    }  # one no change
    numbers = f"{len(shapes)} matrices, {sum(s.numel() for s in shapes) / 1e6:.1f}M weights, rank {rank}, {args.dtype}"
    print(f"{args.model}: {numbers}; {hardware}, torch {torch.__version__}")
    print(f"{'':24}  step ms  /AdamW  /GEMMs  change ms  longest ms  state MB  extra MB")
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    for name, t in times.items():
        windows = [t[1 + i * args.gap :][: args.gap] for i in range(args.windows)]  # each has one change
        change = statistics.median(max(w) - statistics.median(w) for w in windows)
        changes = "AdamW" not in name and "GEMM" not in name and "spread" not in name
        state = sum(x.nbytes for x in state_tensors(getattr(optimizers.get(name), "state", {})))
        print(
            f"{name:24} {median[name]:8.1f} {median[name] / median['AdamW, fused']:7.2f} "
            f"{median[name] / median['two GEMMs']:7.2f} {format(change, '10.0f') if changes else '         -'} "
            f"{max(t[1:]):11.0f} {state / 1e6:9.1f} {extra[name] / 1e6:9.2f}"
        )


if __name__ == "__main__":
    main()
