"""Typical wrong answers, each with a piece of the sentence that the check must say (tests/test_course.py).

A row of WRONG: exercise, what is wrong, the sentence, and the functions (those that are right stand beside it).
"""

import math
from types import SimpleNamespace

import torch


def svd(G):
    return torch.linalg.svd(G, full_matrices=False)


def both_sides(choose):
    """`project` with choose(G, r) -> P for a wide G."""

    def project(G, r):
        P = choose(G if len(G) <= G.shape[1] else G.T, r)
        return (P, P.T @ G) if len(G) <= G.shape[1] else (P, G @ P)

    return project


def galore(square=2, corrected=None, late_eps=False, factor=1.0):
    """`galore_step` with one thing changed."""

    def galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
        R, s = P.T @ G, corrected or t
        M, V = beta1 * M + (1 - beta1) * R, beta2 * V + (1 - beta2) * R.abs() ** square
        root = math.sqrt(1 - beta2**s)
        return (
            W - factor * lr * root / (1 - beta1**s) * alpha * P @ (M / (V.sqrt() + eps * (root if late_eps else 1))),
            M,
            V,
        )

    return galore_step


def moments_of_G(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
    M, V = beta1 * M.sum() + (1 - beta1) * G, beta2 * V.sum() + (1 - beta2) * G**2
    return W - lr * alpha * P @ (P.T @ (M / V.sqrt())), M, V


def uncorrected(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):
    new, M, V = galore()(0 * W, G, P, M, V, t, lr, alpha, beta1, beta2, eps)
    return W + new * (1 - beta1**t) / math.sqrt(1 - beta2**t), M, V


def forgets_at_ten(W, G, P, M, V, t, **options):
    return galore()(W, G, P, 0 * M if t == 11 else M, V, t, **options)


def fused(W, G, P, N, phi, lr, alpha):
    W.addmm_(P, alpha * N - phi * (P.T @ G), alpha=-lr).addcmul_(G, phi, value=-lr)


def as_written(W, G, P, N, phi, lr, alpha):
    W -= lr * (alpha * P @ N + phi * (G - P @ (P.T @ G)))


def large_temporary(W, G, P, N, phi, lr, alpha):
    W -= lr * (P @ (alpha * N - phi * (P.T @ G)) + phi * G)


def new_W(W, G, P, N, phi, lr, alpha):
    W = W - lr * (P @ (alpha * N - phi * (P.T @ G)) + phi * G)


def twice(W, G, P, N, phi, lr, alpha):
    W.addmm_(P, alpha * N, alpha=-lr).addcmul_(G, phi, value=-lr)


def alpha_for_all(W, G, P, N, phi, lr, alpha):
    fused(W, G, P, N, phi, lr * alpha, 1.0)


def writes_to_G(W, G, P, N, phi, lr, alpha):
    W.addmm_(P, alpha * N - phi * (P.T @ G), alpha=-lr).sub_(G.mul_(lr * phi))


def limiter(first=None, store_free=False, store_zero=False, fixed_gamma=False):
    """`limit` with one thing changed."""

    def limit(S, prev_norm, gamma=1.01):
        prev, norm, gamma = first if prev_norm is None else prev_norm, S.norm().item(), 1.01 if fixed_gamma else gamma
        if norm == 0 and not store_zero:
            return S, prev_norm
        factor = 1.0 if prev is None else gamma / max(norm / (prev + 1e-8), gamma)
        return S * factor, norm * (1 if store_free else factor)

    return limit


def always_grows(S, prev_norm, gamma=1.01):
    factor = 1 if prev_norm is None else gamma * prev_norm / S.norm().item()
    return S * factor, S.norm().item() * factor


def each_number(S, prev_norm, gamma=1.01):
    new = S if prev_norm is None or S.norm() <= gamma * prev_norm else S.sign() * gamma * prev_norm / S.numel() ** 0.5
    return new, new.norm().item()


def outside(G, P, factor):
    return P @ (P.T @ G) + factor * (G - P @ (P.T @ G))


def flips(P_new, P_old):
    return torch.where((P_new * P_old).sum(0) < 0, -P_new, P_new)


def codec(power=0.5, rounding=torch.ceil, whole=False, top=255):
    """`pack` and `unpack` with one thing changed."""

    def pack(V):
        size = V.numel() if whole else 256
        B = torch.nn.functional.pad(V.flatten(), (0, -V.numel() % size)).view(-1, size)
        scales = B.amax(1).float()
        codes = rounding((B / scales.clamp(min=1e-38)[:, None]) ** power * top).clamp(max=255)
        return codes.to(torch.uint8).flatten()[: V.numel()], scales.expand(-(-V.numel() // 256))

    def unpack(codes, scales, shape):
        padded = torch.nn.functional.pad(codes.float(), (0, -codes.numel() % 256)).view(-1, 256)
        return ((padded / top) ** (1 / power) * scales[:, None]).flatten()[: codes.numel()].view(shape)

    return {"pack": pack, "unpack": unpack}


def ranker(power=2, exact=True, count=0):
    def rank_for(G, q):
        total = (torch.linalg.svdvals(G) ** power).cumsum(0)
        return min(int((total / total[-1] < q - 1e-12 * exact).sum()) + 1 + count, min(G.shape))

    return rank_for


def within(overhead=1, step=0.001, refuse=True):
    """`ranks_within` that tries q in steps."""

    def ranks_within(Gs, budget):
        best = None if refuse else [1] * len(Gs)
        for k in range(1, round(1 / step) + 1):
            ranks = [ranker()(G, k * step) for G in Gs]
            if sum((min(G.shape) + 2 * max(G.shape)) * r + overhead for G, r in zip(Gs, ranks)) <= budget:
                best = ranks
        if best is None:
            raise ValueError("too small")
        return best

    return ranks_within


def correlate(a, b):
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def places(x):
    return x.argsort().argsort()


def level(low, full):
    return (low / full).median().item()


RIGHT = {"counterexample": lambda: (torch.full((2, 1), 0.5).sqrt(), torch.ones(1, 1), torch.tensor([1.0, 2.0]))}
RIGHT |= {"fused_step": fused, "limit": limiter(), "spike": outside, "align": flips, "rank_for": ranker()}
RIGHT |= {"state_numbers": lambda m, n, r: (min(m, n) * r if r < min(m, n) else 0) + 2 * r * max(m, n) + 1}

WRONG = [
    (1, "the smallest singular vectors", "Which vectors did you take?",
     {"project": both_sides(lambda G, r: svd(G)[0][:, -r:])}),
    (1, "the left side always", "which side is the short one?",
     {"project": lambda G, r: (svd(G)[0][:, :r], svd(G)[0][:, :r].T @ G)}),
    (1, "singular vectors times singular values", "are P's columns of length 1",
     {"project": both_sides(lambda G, r: (svd(G)[0] * svd(G)[1])[:, :r])}),
    (1, "an orthonormal basis of the first r columns", "50 random bases: at most",
     {"project": both_sides(lambda G, r: torch.linalg.qr(G[:, :r]).Q)}),
    (1, "R = Vᵀ, without σ", "where does your R come from?",
     {"project": lambda G, r: (svd(G)[0][:, :r], svd(G)[2][:r]) if len(G) < 8 else (svd(G)[2][:r].T, svd(G)[0])}),
    (2, "no bias correction", "the first step is 3.16 times as long", {"galore_step": uncorrected}),
    (2, "no α", "the first step is 4 times as long", {"galore_step": galore(factor=4)}),
    (2, "moments of G", "whose moments are they, G's or R's?", {"galore_step": moments_of_G}),
    (2, "the bias correction of step 1 for ever", "what must change with t?", {"galore_step": galore(corrected=1)}),
    (2, "ε after the bias correction", "is ε added before or after", {"galore_step": galore(late_eps=True)}),
    (2, "up the gradient", "should go down", {"galore_step": galore(factor=-1)}),
    (2, "V of |R|, not of R²", "which power of R?", {"galore_step": galore(square=1)}),
    (2, "M starts again with P", "is all of M and V kept", {"galore_step": forgets_at_ten}),
    (2, "α and ε are written out", "do you use `alpha` and `eps` as they come?",
     {"galore_step": lambda W, G, P, M, V, t, lr=0.01, **ignored: galore()(W, G, P, M, V, t, lr)}),
    (3, "the formula as it is written", "products were counted, should be 2", {"fused_step": as_written}),
    (3, "a temporary of W's size", "a new tensor of 96 numbers was made", {"fused_step": large_temporary}),
    (3, "a new tensor called W", "do you change W itself", {"fused_step": new_W}),
    (3, "φ∘G without − φ∘PR", "so what P sees counts twice", {"fused_step": twice}),
    (3, "α for S too", "α is before S too", {"fused_step": alpha_for_all}),
    (3, "G overwritten", "which operation with _ wrote to it?", {"fused_step": writes_to_G}),
    (3, "a counterexample that is none", "leave the span of P?",
     {"counterexample": lambda: (torch.eye(4)[:, :2], torch.ones(2, 3), torch.arange(4.0))}),
    (3, "+ for −", "has each term its place and sign?",
     {"fused_step": lambda W, G, P, N, phi, lr, alpha: fused(W, G, P, N, phi, -lr, alpha)}),
    (3, "a counterexample with a long vector", "what is PᵀP?",
     {"counterexample": lambda: (torch.ones(2, 1), torch.ones(1, 1), torch.tensor([1.0, 2.0]))}),
    (4, "norms of rows", "over which dimension",
     {"scaling": lambda N, R, eps=1e-8: N.norm(dim=1) / (R.norm(dim=1) + eps)}),
    (4, "upside down", "φ is upside down", {"scaling": lambda N, R, eps=1e-8: R.norm(dim=0) / (N.norm(dim=0) + eps)}),
    (4, "one for the matrix", "that is the paper's Fira-matrix",
     {"scaling": lambda N, R, eps=1e-8: N.norm() / (R.norm() + eps)}),
    (4, "elementwise", "is it elementwise?", {"scaling": lambda N, R, eps=1e-8: N / (R + eps)}),
    (4, "no ε", "columns of zeros got φ = nan", {"scaling": lambda N, R, eps=1e-8: N.norm(dim=0) / R.norm(dim=0)}),
    (4, "squared norms", "Is a root missing?",
     {"scaling": lambda N, R, eps=1e-8: (N**2).sum(0) / ((R**2).sum(0) + eps)}),
    (4, "sums of absolute values", "with the 2-norm?",
     {"scaling": lambda N, R, eps=1e-8: N.abs().sum(0) / (R.abs().sum(0) + eps)}),
    (4, "ε under the root", "where does ε stand?",
     {"scaling": lambda N, R, eps=1e-8: N.norm(dim=0) / ((R**2).sum(0) + eps**2).sqrt()}),
    (5, "the free norm is stored", "which norm did you store?", {"limit": limiter(store_free=True)}),
    (5, "a norm of zero is stored", "1,388 steps until ‖S‖ = 1 passes again", {"limit": limiter(store_zero=True)}),
    (5, "the norm before the first step is 0", "what is it compared with?", {"limit": limiter(first=0.0)}),
    (5, "γ is always 1.01", "do you use `gamma`?", {"limit": limiter(fixed_gamma=True)}),
    (5, "always as large as allowed", "what is the max for?", {"limit": always_grows}),
    (5, "no limit", "after the spike ‖S‖ grew by 57.3; the limiter allows 1.01",
     {"limit": lambda S, p, gamma=1.01: (S, S.norm().item())}),
    (5, "each number is limited", "multiplied by one factor?", {"limit": each_number}),
    (5, "clipping at 1", "what is it compared with?",
     {"limit": lambda S, p, gamma=1.01: (S / max(1, S.norm().item()), 1.0)}),
    (5, "nothing is kept in the first step", "for whom is it?",
     {"limit": lambda S, p, gamma=1.01: limiter()(S, p, gamma) if p else (S, None)}),
    (5, "0/0", "what is divided by what?",
     {"limit": lambda S, p, gamma=1.01: limiter()(S, p, gamma) if S.any() else (S / S.norm(), p)}),
    (5, "zeros make it forget", "what is the next spike compared with?",
     {"limit": lambda S, p, gamma=1.01: limiter()(S, p, gamma) if S.any() else (S, None)}),
    (5, "zeros in the first step are kept", "What may S be in the second?",
     {"limit": lambda S, p, gamma=1.01: limiter()(S, p, gamma) if p or S.any() else (S, 0.0)}),
    (5, "a spike of the rest beside G", "what is that part, in G and P?",
     {"spike": lambda G, P, factor: G + factor * (G - P @ (P.T @ G))}),
    (5, "the whole gradient spikes", "which part does P see?", {"spike": lambda G, P, factor: factor * G}),
    (6, "P is forgotten", "Which of these are yours?", {"state_numbers": lambda m, n, r: 2 * r * max(m, n) + 1}),
    (6, "m is always the short side", "40×24, rank 8",
     {"state_numbers": lambda m, n, r: m * r * (r < m) + 2 * r * n + 1}),
    (6, "the limiter's number is forgotten", "‖S_prev‖ 1",
     {"state_numbers": lambda m, n, r: RIGHT["state_numbers"](m, n, r) - 1}),
    (6, "one moment only", "on which side of the equation is r?", {"break_even": lambda m, n: 2 * m * n / (m + n)}),
    (7, "align by the largest entry", "vectors point against the old one",
     {"align": lambda new, old: new * new.gather(0, new.abs().argmax(0, keepdim=True)).sign()}),
    (7, "align by sign(0)", "what is sign(0)?", {"align": lambda new, old: new * (new * old).sum(0).sign()}),
    (7, "align to the old vectors", "align changed more than signs", {"align": lambda new, old: old}),
    (7, "M stays", "what is the nearest P_new X to a matrix?", {"rotate": lambda M, old, new: M}),
    (7, "rotate the wrong way", "what is the nearest P_new X to a matrix?",
     {"rotate": lambda M, old, new: old.T @ (new @ M)}),
    (8, "V linearly, to nearest", "of V became 0, an update grew", codec(power=1.0, rounding=torch.round)),
    (8, "√V to nearest", "What never rounds to 0?", codec(rounding=torch.round)),
    (8, "V linearly, rounded up", "in V or in √V?", codec(power=1.0)),
    (8, "one scale for all", "√V is off by", codec(whole=True)),
    (8, "codes are not bytes", "should be uint8",
     {"pack": lambda V: (V, V), "unpack": lambda codes, scales, shape: codes}),
    (8, "256 steps", "which way do you round?", codec(top=256)),
    (8, "the filling is kept", "what was filled with zeros?",
     codec() | {"pack": lambda V: codec()["pack"](torch.nn.functional.pad(V.flatten(), (0, -V.numel() % 256)))}),
    (8, "scales of 64 bits", "how many bytes is that?",
     codec() | {"pack": lambda V: (codec()["pack"](V)[0], codec()["pack"](V)[1].double())}),
    (8, "codes from 1 to 255", "what should its code be?", codec(rounding=lambda x: x.ceil().clamp(min=1))),
    (8, "0/0 in a block of zeros", "which block can have a scale of 0?",
     codec() | {"unpack": lambda c, s, shape: codec()["unpack"](c, s * s / s, shape)}),
    (9, "σ instead of σ²", "is the energy a sum of σ, or of σ²", {"rank_for": ranker(power=1)}),
    (9, "one too many", "should be 1", {"rank_for": ranker(count=1)}),
    (9, "the limiter's numbers are not counted", "is the limiter's one number of each counted?",
     {"ranks_within": within(overhead=0)}),
    (9, "q in steps of a tenth", "is your q the largest?", {"ranks_within": within(step=0.1)}),
    (9, "a budget that is too small is overrun", "who would notice?", {"ranks_within": within(refuse=False)}),
    (10, "Pearson", "do you correlate places in the order?",
     {"similarity": lambda a, b: (correlate(a, b), level(a, b))}),
    (10, "argsort once", "the place of each number or the number of each place?",
     {"similarity": lambda a, b: (correlate(a.argsort(), b.argsort()), level(a, b))}),
    (10, "full / low", "is it the median of low / full",
     {"similarity": lambda a, b: (correlate(places(a), places(b)), level(b, a))}),
    (10, "a mean", "is it the median of low / full",
     {"similarity": lambda a, b: (correlate(places(a), places(b)), (a / b).mean().item())}),
]  # fmt: skip


def answers() -> list[tuple[int, str, str, SimpleNamespace]]:
    return [
        (number, name, sentence, SimpleNamespace(**RIGHT | functions)) for number, name, sentence, functions in WRONG
    ]
