"""Exercise 6: memory by hand (12 minutes).

Count numbers, not bytes (times 4 for float32). For a weight of m×n, Adam keeps two numbers for each of the m·n. Fira
projects the short side, whichever it is; with m ≤ n and r < m it keeps

    P (m×r),    M and V (each r×n),    ‖S_prev‖ (one number)

At r = m nothing would lie outside the subspace: P = I and is not stored, so there are M, V and the one number.

Write the count for any m, n and r. Then: from which rank on does Fira's state no longer save anything against Adam's?
Set both equal, without the one number, and solve for r. It need not be whole.

Before you write: for a square matrix, is that rank a quarter, a half, or two thirds of the side?

    python course/check.py 6
    python course/ex06_memory.py        then predict how the peak grows, and measure it
"""

import subprocess
import sys
from pathlib import Path

import torch

# %% Write these


def state_numbers(m: int, n: int, r: int) -> int:
    """How many numbers Fira keeps for a weight (m, n) at rank r; m may be larger than n."""
    raise NotImplementedError


def break_even(m: int, n: int) -> float:
    """The rank at which Fira keeps as many numbers as Adam, the one of the limiter not counted."""
    raise NotImplementedError


# %% Measure it: three steps for 24 matrices of 1024×1024 at rank 64, by each optimizer in a process of its own


def peak_mb() -> float:
    """The largest memory that this process has held, in 10⁶ bytes; nan on Windows: look at the Task Manager there."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    if sys.platform != "darwin":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def three_steps(rank: int | None) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from fira import Fira

    weights = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(24)]
    optimizer = Fira([{"params": weights, "rank": rank}])
    for w in weights:
        w.grad = torch.randn(1024, 1024)
    before = peak_mb()
    for _ in range(3):
        optimizer.step()
    print(f"rank {rank}: peak {before:.0f} MB before the steps, {peak_mb():.0f} MB after")


if __name__ == "__main__":
    if sys.argv[1:]:
        three_steps(int(sys.argv[1]) or None)
    else:
        for rank, numbers in ((0, 2 * 1024**2), (64, state_numbers(1024, 1024, 64))):
            print(
                f"by hand: {24 * 4 * numbers / 1e6:.0f} MB of state. If more is measured: what is it for?", flush=True
            )
            subprocess.run([sys.executable, __file__, str(rank)], check=True)
