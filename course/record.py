"""Make the runs that the pictures are drawn from, and store what they need: `python course/record.py`.

Some ten minutes on one core. The stored files are part of the repository, so figures.py alone takes seconds.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from course.short_run import phis, short_run  # noqa: E402
from course.training import run  # noqa: E402
from fira import oriented, singular_vectors  # noqa: E402

NAMES = ("0.attention.q", "1.attention.v", "1.mlp.gate", "2.mlp.down", "3.attention.out")  # in blocks


def gradients() -> dict[str, np.ndarray]:
    """Of step 60: one gradient whole, what P of rank 4 sees of it, and the singular values of five."""
    *_, (_, _, model) = short_run(last=60, rank=32)
    Gs = {name: model.get_parameter(f"blocks.{name}.weight").grad for name in NAMES}
    G = Gs[NAMES[0]]
    P = singular_vectors(G, 4)
    values = {f"sigma {name}": torch.linalg.svdvals(G).numpy() for name, G in Gs.items()}
    return {"G": G.numpy(), "PR": (P @ (P.T @ G)).numpy(), **values}


def spike() -> dict[str, np.ndarray]:
    """‖S‖ over all matrices in 60 steps; in step 30 what P cannot see is 50 times as large."""

    def stretch(step, optimizer):
        for p, state in optimizer.state.items() if step == 30 else ():
            if "projection" in state:
                G, P = oriented(p.grad, "std"), state["projection"]
                G.copy_(50 * G - 49 * P @ (P.T @ G))

    found = {}
    for name, gamma in (("limited", 1.01), ("free", None)):
        seen = [list(o.seen.values()) for _, o, _ in short_run(last=60, before_step=stretch, rank=32, gamma=gamma)]
        found[name] = np.array([torch.stack([s["limited"] for s in step if s]).norm().item() for step in seen])
    return found


def similarity() -> dict[str, np.ndarray]:
    """φ of every column at steps 20 and 21, before and after a change of the subspace."""
    found = {}
    for step, pairs in phis((20, 21)).items():
        low, full = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        found |= {f"low {step}": low[::4].numpy(), f"full {step}": full[::4].numpy()}
    return found


def memory() -> dict[str, float]:
    """The growth of the peak in three steps for 24 matrices of 1024×1024, in a process for each rank."""
    code = "import sys; sys.argv = ['', '{0}']; from course import ex06_memory as e; e.three_steps({0} or None)"
    found = {}
    for rank in (0, 256, 64):
        out = subprocess.run([sys.executable, "-c", code.format(rank)], capture_output=True, text=True, cwd=HERE.parent)
        before, after = (float(word) for word in out.stdout.split() if word.replace(".", "").isdigit())
        found[str(rank)] = after - before
    return found


def curves() -> dict[str, list]:
    """(step, validation loss) of 150 steps with three optimizers and three seeds."""
    logs = {f"{name} {seed}": run(name, seed) for seed in range(3) for name in ("fira", "galore", "adamw")}
    return {key: [(e["step"], e["loss"], e.get("val_loss")) for e in log] for key, log in logs.items()}


def main() -> None:
    (HERE / "figures").mkdir(exist_ok=True)
    for make in (gradients, spike, similarity):
        np.savez_compressed(HERE / "figures" / f"{make.__name__}.npz", **{k: v.astype("f4") for k, v in make().items()})
        print(f"stored {make.__name__}")
    for make in (memory, curves):
        text = json.dumps(make(), indent=1)
        (HERE / "figures" / f"{make.__name__}.json").write_text(text, encoding="utf-8")
        print(f"stored {make.__name__}")


if __name__ == "__main__":
    main()
