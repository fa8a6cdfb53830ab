"""Exercise 7: a basis is not a subspace (20 minutes).

Every T steps P is chosen anew. M and V were collected along the old P's vectors, and Adam works element by element:
what it does depends on the vectors themselves, not only on the space that they span.

An SVD does not even fix the vectors: −u serves as well as u, and which one you get depends on the library, its version
and the machine. If a vector flips, its row of R flips, but its row of M does not. Two remedies:

    align     flip the sign of each new vector that points against the one it replaces (dot product below 0);
              M and V stay as they are
    rotate    leave the vectors, and carry M over: P_old M is a matrix in the full space; find the M_new for
              which P_new M_new is as near to it as can be, min ‖P_new M_new − P_old M‖

V stays in both. (V holds squares, which have no direction to turn; what is right for it is an open question.)

Predict: the signs of every new P are flipped at random. How far apart are two runs with raw P's, with `align`, with
`rotate`? Then: what would `rotate` make of M if P_new spans a space with nothing in common with the old one?
"""

import torch


# %% Write these
def align(P_new, P_old):
    """P_new (m, r) with each column along the column of P_old (m, r) that it replaces."""
    raise NotImplementedError


def rotate(M, P_old, P_new):
    """M (r, n), which belongs to P_old (m, r), carried over to P_new (m, r)."""
    raise NotImplementedError


# %% Look at it: how much of M survives when P turns?
if __name__ == "__main__":
    P, other, M = torch.eye(8)[:, :3], torch.randn(8, 3), torch.randn(3, 12)
    for step in (0.0, 0.1, 0.3, 1.0, 10.0):
        P_new = align(torch.linalg.qr(P + step * other).Q, P)
        print(f"P + {step} × something: ‖M_new‖ / ‖M‖ = {rotate(M, P, P_new).norm() / M.norm():.3f}")
    print(f"nothing in common: {rotate(M, P, torch.eye(8)[:, 5:]).norm() / M.norm():.3f}")
