"""Exercise 6: memory by hand (15 minutes).

Count numbers, not bytes (times 4 for float32). For a weight of m×n, Adam keeps two numbers for each of the m·n. Fira
projects the short side, whichever it is; with m ≤ n and r < m it keeps

    P (m×r),    M and V (each r×n),    ‖S_prev‖ (one number)

At r = m nothing would lie outside the subspace: P = I and is not stored, so there are M, V and the one number.

Write the count for any m, n and r; a rank above the short side counts as the short side. Then: at which rank does Fira
keep as many numbers as Adam? Set both equal, without the one number, and solve for r. Return that rank unrounded, 40.6
and not 40: the whole ranks below it save memory, the whole ranks above it do not.

Before you write: for a square matrix, is that rank a quarter, a half, or two thirds of the side?

    python -m course.ex06_memory        how much the peak memory grows with Adam, 24 matrices of 1024×1024
    python -m course.ex06_memory 64     predict the growth for Fira at rank 64, then run this
"""

import sys

import torch


# %% Write these
def state_numbers(m, n, r):
    """How many numbers Fira keeps for a weight (m, n) at rank r; m may be larger than n."""
    raise NotImplementedError


def break_even(m, n):
    """The rank, not rounded, at which Fira keeps as many numbers as Adam, the one of the limiter not counted."""
    raise NotImplementedError


# %% Measure it: Fira's peak at a rank, or Adam's
if __name__ == "__main__":
    try:
        import resource
    except ImportError:
        sys.exit("Windows does not tell a process its peak: look at the Task Manager")

    from fira import Fira

    rank, peaks = int(sys.argv[-1]) if sys.argv[-1].isdigit() else None, []
    unit = 1 if sys.platform == "darwin" else 1024
    weights = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(24)]
    for w in weights:
        w.grad = torch.randn(1024, 1024)
    optimizer = Fira([{"params": weights, "rank": rank}])
    for _ in range(4):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)
        optimizer.step()
    who = f"Fira, rank {rank}" if rank else "Adam"
    held = [x.numel() * 4 / 1e6 for w in weights for x in optimizer.state[w].values() if isinstance(x, torch.Tensor)]
    print(f"{who}: in three steps the peak grew by {peaks[3] - peaks[0]:.0f} MB, from {peaks[0]:.0f} MB")
    print(f"the state holds {sum(held):.0f} MB: if the peak grew by more, what else was there for a moment?")
    # (Fira's first step also makes Gram matrices and their eigenvectors, to choose P.)
