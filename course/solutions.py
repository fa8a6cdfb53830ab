"""One solution of each exercise, with why. No check reads this file: a teacher may delete it."""

import torch

from course.ex08_pack import blocks
from course.ex09_ranks import numbers


# 1. The rank-r matrix nearest to G is made of its r leading singular vectors (Eckart and Young); any other basis of the
#    same space keeps the same energy. The short side is projected because P has short·r numbers.
def project(G, r):
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    if G.shape[0] > G.shape[1]:
        return Vt[:r].T, G @ Vt[:r].T
    return U[:, :r], U[:, :r].T @ G


# 2. Nothing here is larger than W but W: the moments are R's. At r = m a P that turns the axes makes another optimizer,
#    because Adam divides element by element, and elements depend on the axes.
def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
    R = P.T @ G
    M = beta1 * M + (1 - beta1) * R
    V = beta2 * V + (1 - beta2) * R**2
    N = M / (V.sqrt() + eps)
    c_t = (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    return W - lr * c_t * alpha * P @ N, M, V


# 3. α P N + φ∘(G − P R) = P (α N − φ∘R) + φ∘G. The columns of P X always lie in the span of P; a factor for each row
#    takes them out of it, a factor for each column cannot.
def fused_step(W, G, P, N, phi, lr, alpha):
    R = P.T @ G
    W.addmm_(P, alpha * N - phi * R, alpha=-lr)
    W.addcmul_(G, phi, value=-lr)


def counterexample():
    return torch.full((2, 1), 0.5).sqrt(), torch.ones(1, 1), torch.tensor([1.0, 2.0])


# 4. SGD has N = R, so φ = 1 and the parts add up to G again. Momentum's N is a sum over steps and the rest of the
#    gradient is this step's alone: φ gives it the right length, not the right direction.
def scaling(N, R, eps=1e-8):
    return N.norm(dim=0) / (R.norm(dim=0) + eps)


# 5. The limited norm is kept, or a spike would pass in its second step; a zero is not, or S is held down for long.
#    If all of G is 50 times too large, R is too, Adam's ‖N‖ hardly grows, and φ falls: only the rest needs a limit.
def limit(S, prev_norm, gamma=1.01):
    norm = S.norm().item()
    if norm == 0:
        return S, prev_norm
    if prev_norm is not None:
        factor = gamma / max(norm / (prev_norm + 1e-8), gamma)
        S, norm = S * factor, norm * factor
    return S, norm


def spike(G, P, factor):
    inside = P @ (P.T @ G)
    return inside + factor * (G - inside)


# 6. With 2mn = mr + 2rn it is r* = 2mn / (m + 2n): two thirds of the side of a square, because P, M and V are three.
def state_numbers(m, n, r):
    m, n = min(m, n), max(m, n)
    return (m * r if r < m else 0) + 2 * min(r, m) * n + 1


def break_even(m, n):
    return 2 * m * n / (min(m, n) + 2 * max(m, n))


# 7. A flip of u is undone by a flip of its row of M (rotate), or by not flipping it (align). P_newᵀ is the left inverse
#    of P_new, so P_newᵀ P_old M solves the least squares. What lies outside the new space is lost.
def align(P_new, P_old):
    dots = (P_new * P_old).sum(0)
    return torch.where(dots < 0, -P_new, P_new)


def rotate(M, P_old, P_new):
    return P_new.T @ (P_old @ M)


# 8. An update is divided by √V, so √V gets the equal steps; rounded up, it divides by more and never by 0. V's error
#    makes an update smaller, which costs a little speed; the other way it would cost the run.
def pack(V):
    B = blocks(V)
    scales = B.amax(dim=1).float()  # float32 may round a scale down: hence the clamp of the codes
    codes = (B / scales.clamp(min=1e-38)[:, None]).sqrt().mul(255).ceil().clamp(max=255)
    return codes.to(torch.uint8).flatten()[: V.numel()], scales


def unpack(codes, scales, shape):
    root = blocks(codes.float()) / 255
    return (root**2 * scales[:, None]).flatten()[: codes.numel()].view(shape)


# 9. A matrix of few large singular values needs few vectors. The cost grows with q, so halving an interval finds the
#    largest q; the first q tried is 1. The 1e-12 is for a sum that rounds to 0.9999999 of itself.
def rank_for(G, q):
    energies = torch.linalg.svdvals(G.double()).square().cumsum(0)
    return min(int((energies < (q - 1e-12) * energies[-1]).sum()) + 1, min(G.shape))


def ranks_within(Gs, budget):
    q, low, high, best = 1.0, 0.0, 1.0, None
    for _ in range(60):
        ranks = [rank_for(G, q) for G in Gs]
        fits = sum(numbers(G, r) for G, r in zip(Gs, ranks)) <= budget
        low, high, best = (q, high, ranks) if fits else (low, q, best)
        q = (low + high) / 2
    if best is None:
        raise ValueError("not even rank 1 everywhere fits")
    return best


# 10. argsort twice is the place in the order. A leading singular vector has more of G than others: ‖R‖ is larger than
#     its share of the rows, N is not, so φ low is below φ full while P is fresh. Order survives that, level does not.
def similarity(low, full):
    places = torch.stack([x.argsort().argsort().double() for x in (low, full)])
    return torch.corrcoef(places)[0, 1].item(), (low / full).median().item()


# The exit question of the first lab: AdamW's learning rate is the best for 1,500 steps, not for 150 (try a larger one);
# and it was one seed, one model, one text.
