"""Exercise 8: eight bits for V (40 minutes).

M and V can be kept in one byte a number. Take blocks of 256 numbers; keep for each block its largest absolute value as
a float32, the scale, and for each number a code, a whole number. For M that is easy, and written below: -127 to 127,
M/scale × 127 rounded to nearest. For V it is 0 to 255.

V is another matter. Adam divides by √V + ε. Done to V like to M, more than a tenth of V becomes 0: what does the
update M / (√V + ε) become there, with ε = 1e-8? It is not enough that V is near: √V must be, and never below the true
one.

Write `pack` and `unpack` for V (no number is negative) so that

    - V comes back with √V off by at most √scale / 255,
    - it never comes back smaller than it was (but for a scale's own rounding), so that no update grows,
    - zeros, also blocks of nothing but zeros, come back as zeros,
    - codes are uint8, as many as V has numbers (unlike pack_M, cut off what `blocks` adds to the last block, and add it
      again in unpack), and scales float32, one for each block.

Rounding up just above a whole number is where this can go wrong: what is 255 × 1.0000001, rounded up, in a byte? (A
float32 scale can lie just below the float64 that it was.)
"""

import torch


def blocks(X):
    """X as rows of 256 numbers, (number of blocks, 256), the last one filled with zeros."""
    return torch.nn.functional.pad(X.flatten(), (0, -X.numel() % 256)).view(-1, 256)


def pack_M(M):
    scales = blocks(M).abs().amax(dim=1).float()
    codes = blocks(M) / scales.clamp(min=1e-38)[:, None] * 127  # the clamp: 0/1e-38 and not 0/0
    return codes.round().to(torch.int8), scales


def unpack_M(codes, scales, shape):
    return (codes / 127 * scales[:, None]).flatten()[: shape.numel()].view(shape)


# %% Write these
def pack(V):
    """codes (as many as V has numbers, uint8) and scales (one for each block of 256, float32)."""
    raise NotImplementedError


def unpack(codes, scales, shape):
    """V of this shape."""
    raise NotImplementedError


# %% Look at it
if __name__ == "__main__":
    V = torch.tensor([4.0, 1.0, 0.04, 1e-4, 1e-12, 0.0])
    print("V:   ", V, "\nback:", unpack(*pack(V), V.shape))
