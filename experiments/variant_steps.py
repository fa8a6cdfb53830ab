"""The time of a step of each file in variants/, beside Fira in the same process: `python -m experiments.variant_steps`.

The weights are the default model's with random gradients, one thread, rank 32, T 100. The optimizers take turns of
ten steps, 210 each; a ratio is of their medians by turn. `mean` is over all steps, with the changes of the subspace.
Then, at the gradients of step 101 of a short training, four ways to choose the 28 P's: the energy that they hold, of
the best that rank 32 can (the mean and the least of the matrices), and the time, the median of nine.
"""

import runpy
import statistics
import time
from pathlib import Path

import torch

from course.training import short_run
from fira import Fira, oriented, param_groups
from model import ModelConfig, Transformer


def classes() -> dict[str, type[Fira]]:
    found = {"Fira": Fira}
    for path in sorted(Path("variants").glob("*.py")):
        values = [x for x in runpy.run_path(str(path), run_name="variant").values() if isinstance(x, type)]
        found[path.name] = next(x for x in values if issubclass(x, Fira) and x.__module__ == "variant")
    return found


def energies(step: int, optimizer: Fira) -> None:
    """Before step 101, in which the subspaces change."""
    if step != 101:
        return
    matrices = optimizer.param_groups[0]["params"]
    old, Gs = ([optimizer.state[p]["projection"] for p in matrices], [oriented(p.grad, "std") for p in matrices])
    Gs = [G / G.abs().max() for G in Gs]
    best = torch.stack([torch.linalg.svdvals(G)[:32].square().sum() for G in Gs])
    randomized = classes()["randomized.py"]
    ways = {"svd": (Fira, {"proj_method": "svd"}), "subspace iteration": (Fira, {"proj_method": "subspace"})}
    ways |= {f"randomized.py, {k} iterations": (randomized, {"iterations": k}) for k in (1, 2)}
    print(f"\n{'':28} {'energy':>7} {'least':>7} {'ms':>6}")
    for name, (cls, options) in ways.items():
        made, taken = cls([torch.nn.Parameter(G) for G in Gs], rank=32, **options), []
        for _ in range(9):
            begun = time.perf_counter()
            Ps = [made.find_projection(G, P, 100, made.param_groups[0]) for G, P in zip(Gs, old)]
            taken.append(1000 * (time.perf_counter() - begun))
        shares = torch.stack([(P.T @ G).square().sum() for P, G in zip(Ps, Gs)]) / best
        print(f"{name:28} {shares.mean():7.4f} {shares.min():7.4f} {statistics.median(taken):6.1f}")


def main() -> None:
    torch.set_num_threads(1)
    optimizers, times = {}, {}
    for name, cls in classes().items():
        torch.manual_seed(0)
        model = Transformer(ModelConfig.preset("nano", 257, 128))
        if name == "stochastic_rounding.py":
            model.to(torch.bfloat16)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        scaling = None if name == "two_sided.py" else "column"
        options = {"rank": 32, "update_proj_gap": 100, "scaling": scaling}
        optimizers[name], times[name] = cls(param_groups(model, **options), lr=1e-4), []
    for _ in range(21):
        for name, optimizer in optimizers.items():
            begun = time.perf_counter()
            for _ in range(10):
                optimizer.step()
            times[name].append((time.perf_counter() - begun) / 10)
    print(f"{'':24} {'ms':>6} {'of Fira':>8} {'mean':>8} {'of Fira':>8}")
    for name, taken in times.items():
        del taken[0]  # the first choice of the subspaces
        row = [f(taken) / f(times["Fira"]) for f in (statistics.median, statistics.mean)]
        median, mean = 1000 * statistics.median(taken), 1000 * statistics.mean(taken)
        print(f"{name:24} {median:6.1f} {row[0]:8.2f} {mean:8.1f} {row[1]:8.2f}")
    list(short_run(last=101, before_step=energies, update_proj_gap=100))


if __name__ == "__main__":
    main()
