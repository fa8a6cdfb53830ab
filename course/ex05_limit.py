"""Exercise 5: the limiter is not gradient clipping (25 minutes).

S = φ∘(G − P R) has no moments that would smooth it. When P is stale, S can grow suddenly, and the loss jumps. Fira
lets its norm grow by at most the factor γ = 1.01 in a step. It may shrink as it likes:

    S ← S · γ / max(‖S‖ / (‖S_prev‖ + 1e-8), γ)

‖S‖ is the root of the sum of all squares, `S.norm()`; ‖S_prev‖ is one number for each matrix, all the memory that the
limiter has. Decide, and the check will ask:

    - Which norm is kept for the next step: that of S before, or after it was limited?
    - There was no step before (`prev_norm` is None). What may S be?
    - A gradient of zeros: S = 0. What is kept, and what if it is the first? (From 0 to 1 the way is long, though
      1e-8 is added in every step. Hundreds of steps, or thousands?)

Then make the limiter work: `spike` multiplies what P cannot see of G by a factor, and leaves PᵀG as it is.

Predict: after 50 usual steps that part comes 50 times too large. By how much does ‖S‖ grow, free and limited? And by
how much, free, if the whole gradient is 50 times too large? (Look at φ: what happens to ‖N‖ / ‖R‖ then?) Clipping by
the gradient's norm treats both alike.
"""

import torch


# %% Write these
def limit(S, prev_norm, gamma=1.01):
    """S (m, n), limited, and the norm to compare with in the next step: its `prev_norm`, a number or None."""
    raise NotImplementedError


def spike(G, P, factor):
    """G (m, n) with the part that P (m, r) cannot see times the factor."""
    raise NotImplementedError


# %% Look at it: ten steps, a spike in the third, zeros in the seventh
if __name__ == "__main__":
    S, kept = torch.randn(8, 12), None
    for factor in (1, 1, 50, 1, 1, 1, 0, 1, 1, 1):
        limited, kept = limit(factor * S, kept)
        print(f"‖S‖ {factor * S.norm():8.3f}, limited {limited.norm():8.3f}, kept {kept}")
