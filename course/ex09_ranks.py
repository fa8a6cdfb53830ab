"""Exercise 9: which rank for which layer? (45 minutes)

One rank for all matrices is a guess. Some gradients have a few large singular values, others many. Look at the energy
that the first r of them hold, (σ₁² + … + σᵣ²) / (σ₁² + … + σₘ²), and take what is needed:

    rank_for(G, q)               the smallest r whose energy is at least q of all; q = 1 means all that is not 0
    ranks_within(Gs, budget)     one q for all, and rank_for(G, q) for each G: those of the largest q whose ranks
                                 together cost, by `numbers` below, no more than the budget

The second is a search: a larger q costs more. (The energies at which any rank jumps are finitely many; or halve an
interval often enough.) If not even rank 1 everywhere fits the budget, raise ValueError.

By hand, before you write: the singular values are 4, 3, 2, 1, 0.5, 0.25. Which r for q = 0.5, 0.9 and 0.99?

Rounding will want its share: a sum of squares divided by itself may come out as 0.9999999. Do you ever return m + 1?
"""

import torch


def numbers(G, r):
    """The numbers of Fira's state for a matrix of G's shape: P, M and V, and one."""
    return min(G.shape) * r + 2 * max(G.shape) * r + 1


# %% Write these
def rank_for(G, q):
    """The smallest rank, 1 at least, that holds the share q of G's energy: an int."""
    raise NotImplementedError


def ranks_within(Gs, budget):
    """A list, a rank for each G, from the largest q whose ranks need at most this many numbers of state."""
    raise NotImplementedError


# %% Look at it: noise, and a matrix of rank two in noise, together at the memory of rank 8 for both
if __name__ == "__main__":
    noise, signal = torch.randn(32, 48), 10 * torch.randn(32, 2) @ torch.randn(2, 48)
    print(ranks_within([noise, signal + noise], 2 * numbers(noise, 8)))
