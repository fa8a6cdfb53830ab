"""Changes of `train.py` for one experiment each; nothing of it stays. The words go before the flags:

python -m experiments.patches noise=0.1 --optimizer adamw --steps 750 --name noisy
"""

import math
import subprocess
import sys
from pathlib import Path

import torch

import fira
import train
from experiments.similarity import Recorder
from fira import Fira


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


def noise(size: str, blocks: bool = False) -> None:
    """Add Gaussian noise to each gradient: `size` of the RMS over all gradients in the first step."""

    class Noisy(Fira):
        def step(self, closure=None):
            groups = self.param_groups[:1] if blocks else self.param_groups
            gradients = [p.grad for group in groups for p in group["params"]]
            if not hasattr(self, "generator"):
                self.generator = torch.Generator().manual_seed(0)
                rms = torch.cat([g.flatten() for g in gradients]).square().mean().sqrt().item()
                self.sigma = float(size) * rms
                print(f"noise      {self.sigma:.3g}")
            for g in gradients:
                g.add_(torch.randn(g.shape, generator=self.generator), alpha=self.sigma)
            return super().step(closure)

    train.Fira = Noisy


def noise_blocks(size: str) -> None:
    """The same on the matrices of the blocks only: embeddings and head are AdamW with every method."""
    noise(size, blocks=True)


def adagrad(factor: str) -> None:
    """Adagrad inside the subspace, V = Σ R² and N = R / √V; the matrices' learning rate times `factor`."""

    class Adagrad(Fira):
        def __init__(self, params, lr, **options):
            params[0]["lr"] = lr * float(factor)
            super().__init__(params, lr, **options)

        def inner(self, R, state, group):
            state["sum_sq"].addcmul_(R, R)
            return R / state["sum_sq"].sqrt().add_(group["eps"]), 1.0

        def new_moments(self, R):
            return {"sum_sq": torch.zeros_like(R)}

    train.Fira = Adagrad


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


CHANGES = {f.__name__: f for f in (every_step, record, noise, noise_blocks, adagrad, sgd, shrink, finetune)}


def main() -> None:
    while len(sys.argv) > 1 and (name := (word := sys.argv[1]).split("=")[0]) in CHANGES:
        CHANGES[name](*word.split("=")[1:])
        del sys.argv[1]
    train.main()


if __name__ == "__main__":
    main()
