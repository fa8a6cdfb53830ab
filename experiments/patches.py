"""Changes of `train.py` for one experiment each; nothing of it stays. The words go before the flags:

python -m experiments.patches noise=0.1 --optimizer adamw --steps 750 --name noisy
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import torch

import fira
import train
from experiments.recorder import Recorder
from fira import Fira
from variants.inner import Inner


def every_step() -> None:
    """Log every step, not the mean of ten."""
    train.LOG_INTERVAL = 1


def record() -> None:
    """Keep the scaling factors, for `similarity.py`, beside the run's log."""
    recorder, original = Recorder(), train.train
    fira.fira_update = recorder.update

    def recording(config, *rest):
        original(config, *rest)
        recorder.save(config.folder / "record.npz")

    train.train = recording


def before_each_step(change) -> None:
    """Call `change(parameter groups, step)` before each step of the optimizer, whose first group holds the matrices."""
    build, steps = train.build, itertools.count(1)

    def changed(*args):
        model, optimizer = build(*args)
        optimizer.register_step_pre_hook(lambda optimizer, *_: change(optimizer.param_groups, next(steps)))
        return model, optimizer

    train.build = changed


def noise(size: str, blocks: bool = False) -> None:
    """Add Gaussian noise to each gradient: `size` of the RMS over all gradients in the first step."""
    generator, sigma = torch.Generator().manual_seed(0), 0.0

    def add_noise(groups, step):
        nonlocal sigma
        gradients = [p.grad for group in groups[: 1 if blocks else None] for p in group["params"]]
        if step == 1:
            sigma = float(size) * torch.cat([g.flatten() for g in gradients]).square().mean().sqrt().item()
            print(f"noise      {sigma:.3g}")
        for g in gradients:
            g.add_(torch.randn(g.shape, generator=generator), alpha=sigma)

    before_each_step(add_noise)


def noise_blocks(size: str) -> None:
    """The same on the matrices of the blocks only: embeddings and head are AdamW with every method."""
    noise(size, blocks=True)


def inside(kind: str, factor: str) -> None:
    """An optimizer of `variants/inner.py` inside the subspace; the matrices' learning rate times `factor`."""

    class Scaled(Inner):
        def __init__(self, params, lr, **options):
            params[0]["lr"] = lr * float(factor)
            super().__init__(params, lr, kind=kind, **options)

    train.Fira = Scaled


def spike(when: str) -> None:
    """Multiply the gradients of the matrices by 1,000 in that step."""

    def plant(groups, step):
        for p in groups[0]["params"]:
            p.grad.mul_(1000 if step == int(when) else 1)

    before_each_step(plant)


def sgd() -> None:
    """Plain SGD for all weights."""

    class SGD(Fira):
        def update_adamw(self, p, group):
            p.add_(p.grad, alpha=-group["lr"])

    train.Fira = SGD


def shrink(mu: str) -> None:
    """Instead of the limiter, gradient shrink: S ← S (μ ‖S‖ + (1 − μ) ‖S_prev‖) / ‖S‖."""
    original, mu = fira.fira_update, float(mu)

    def shrunk(W, G, P, R, N, prev_norm, step_size, scaling, gamma, alpha, b, k):
        phi = fira.column_norms(N) / (fira.column_norms(R) + 1e-8)
        norm = (phi * fira.column_norms(G - P @ R)).norm()  # ‖S‖
        s = mu + (1 - mu) * prev_norm / (norm + 1e-8) if prev_norm.isfinite() else torch.ones(())
        seen = original(W, G, P, R, N, prev_norm, step_size, scaling, math.inf, alpha, b * s, k)
        prev_norm.copy_(s * norm)
        return seen | {"limited": s * norm}

    fira.fira_update = shrunk


def finetune() -> None:
    """From a model of Python sources to C++ headers, both prepared by `prepare_finetuning`."""
    run = Path(sys.argv[sys.argv.index("--name") + 1])
    sys.argv += ["--init_from", str(run.parent / "base"), "--data", "native"]


def prepare_finetuning(out: Path, steps: int) -> None:
    """An AdamW-trained model of the default data, in out/base, and some of torch's C++ headers as another text."""
    headers, run, commands = Path(torch.__file__).parent / "include" / "ATen" / "native", out / "base-run", []
    if not Path("data/native/meta.json").exists():
        commands.append(["prepare_data.py", str(headers), "--glob", "*.h"])
    if not (run / "sample.txt").exists():
        again = ["--resume"] if (run / "ckpt.pt").exists() else ["--optimizer", "adamw", "--steps", str(steps)]
        commands.append(["train.py", "--name", str(run), "--threads", "1", "--device", "cpu", *again])
    if not (out / "base").exists():
        commands.append(["train.py", "--name", str(run), "--export", str(out / "base")])
    for command in commands:
        print(f"for fine-tuning: python {' '.join(command)}")
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


CHANGES = {f.__name__: f for f in (every_step, record, noise, noise_blocks, inside, spike, sgd, shrink, finetune)}


def main() -> None:
    while len(sys.argv) > 1 and (name := (word := sys.argv[1]).split("=")[0]) in CHANGES:
        CHANGES[name](*word.partition("=")[2].split(",")) if "=" in word else CHANGES[name]()
        del sys.argv[1]
    train.main()


if __name__ == "__main__":
    main()
