"""Each variant against a naive float64 version of its own, its resume, the bytes of its state, and what it claims."""

import importlib.util
import io
import math
from pathlib import Path

import pytest
import torch

from fira import Fira

FOLDER = Path(__file__).resolve().parents[1] / "variants"
RANK, GAP, STEPS = 4, 3, 9  # the subspace changes before steps 1, 4 and 7
SHAPES = pytest.mark.parametrize("shape", [(8, 70), (70, 8)], ids=["wide", "tall"])


def variant(name):
    """The one subclass of Fira in variants/NAME.py, loaded by its path as train.py loads it."""
    name = name if (FOLDER / f"{name}.py").exists() else "inner"
    spec = importlib.util.spec_from_file_location(f"variant_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (cls,) = {c for c in vars(module).values() if isinstance(c, type) and c.__module__ == spec.name}
    return cls


def matrix(sizes, shape, seed=0):
    """A matrix with these singular values; the vectors depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, len(sizes), generator=generator, dtype=torch.float64)).Q for n in shape)
    return U * torch.as_tensor(sizes, dtype=torch.float64) @ V.T


def gradients(shape, steps=STEPS):
    """Gradients that resemble each other, whose energy lies in about 4, 2 and 3 directions at the three changes."""
    spectra = [(0.8, 0.5, 0.7)[t // GAP % 3] ** torch.arange(8) for t in range(steps)]
    noise = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [matrix(sizes, shape) + 0.02 * noise[t] for t, sizes in enumerate(spectra)]


def weight(shape, dtype=torch.float64):
    return torch.nn.Parameter(
        torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    )


def options(**more):
    return {"lr": 0.02, "rank": RANK, "update_proj_gap": GAP, "proj_method": "svd"} | more


def train(optimizer, p, grads):
    for G in grads:
        p.grad = G.to(p.dtype)
        optimizer.step()
    return p.detach().clone()


class Naive:
    """Fira by the book, with matrices of full size, in float64; a subclass overrides what its variant changes."""

    lr, eps, alpha, gamma, beta1, beta2, turn = 0.02, 1e-8, 0.25, 1.01, 0.9, 0.999, 0

    def __init__(self, shape):
        self.t, self.prev, self.tall = 0, math.inf, shape[0] >= shape[1]
        self.M, self.V, self.P = (torch.zeros(s, dtype=torch.float64) for s in [(RANK, max(shape))] * 2 + [(8, RANK)])

    def find(self, G):
        return torch.linalg.svd(G).U[:, :RANK]

    def change(self, P):
        self.P = P

    def inner(self, R, t=None):
        t = t or self.t
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R**2
        return self.M / (self.V.sqrt() + self.eps), math.sqrt(1 - self.beta2**t) / (1 - self.beta1**t)

    def rest(self, G, R, N):
        S = torch.linalg.norm(N, dim=0) / (torch.linalg.norm(R, dim=0) + 1e-8) * (G - self.P @ R)
        S *= min(1, self.gamma * (self.prev + 1e-8) / torch.linalg.norm(S))
        self.prev = torch.linalg.norm(S)
        return S

    def step(self, G):
        """What is added to the weight."""
        G = G.double().T if self.tall else G.double()
        if self.t == 0 or self.t % GAP == self.turn:
            P = self.find(G)
            for j in range(min(P.shape[1], self.P.shape[1])):
                P[:, j] *= -1 if P[:, j] @ self.P[:, j] < 0 else 1
            self.change(P)
        self.t += 1
        R = self.P.T @ G
        N, c = self.inner(R)
        change = -self.lr * c * (self.alpha * self.P @ N + self.rest(G, R, N))
        return change.T if self.tall else change


class Inner(Naive):
    def inner(self, R):
        M = self.M  # the one moment it keeps, M or V
        decayed = self.beta2 * M + (1 - self.beta2) * (R if self.kind == "lion" else R**2)
        self.M = {"momentum": self.beta1 * M + R, "adagrad": M + R**2}.get(self.kind, decayed)
        if self.kind == "momentum":
            return self.M, 1
        if self.kind == "lion":
            return torch.sign(self.beta1 * M + (1 - self.beta1) * R), 1
        return R / (self.M.sqrt() + self.eps), 1 if self.kind == "adagrad" else math.sqrt(1 - self.beta2**self.t)


class Rotate(Naive):
    def change(self, P):
        cosines = torch.tensor([[P[:, i] @ self.P[:, j] for j in range(RANK)] for i in range(RANK)])
        self.P, self.M, self.V = P, cosines @ self.M, cosines**2 @ self.V


class TwoSided(Naive):
    def change(self, P):
        self.P, self.due = P, True

    def inner(self, R):
        if self.due:
            new = torch.linalg.svd(R).Vh[:RANK].T
            self.right = new * (new * getattr(self, "right", new)).sum(0).sign()
            self.M, self.V, self.due = self.M[:, :RANK], self.V[:, :RANK], False
        N, c = super().inner(R @ self.right)
        return N @ self.right.T, c

    rest = lambda self, G, R, N: 0 * G


class AdaptiveRank(Naive):
    def find(self, G):
        U, sizes, _ = torch.linalg.svd(G)
        return U[:, : next(r for r in range(1, 9) if (sizes[:r] ** 2).sum() >= self.energy * (sizes**2).sum())]

    def change(self, P):
        old, r = self.P.shape[1], P.shape[1]
        self.M = torch.stack([self.M[j] if j < old else torch.zeros_like(self.M[0]) for j in range(r)])
        self.V = torch.stack([self.V[min(j, old - 1)] for j in range(r)])
        self.P = P


class Randomized(Naive):
    def find(self, G):
        Q = torch.randn(8, RANK + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(self.t))
        Q = torch.linalg.svd(G @ G.T @ G @ G.T @ Q, full_matrices=False).U
        return Q @ torch.linalg.svd(Q.T @ G).U[:, :RANK]


class EightBit(Naive):
    def change(self, P):
        codes = torch.round(127 * P / P.abs().max(0).values)
        self.P = codes / torch.linalg.norm(codes, dim=0)

    def inner(self, R):
        N, c = super().inner(R)
        draws = torch.Generator().manual_seed(self.t)
        self.M = self.stored(self.M, 127, 0, draws)
        self.V = self.stored(self.V.sqrt(), 255, 2, draws) ** 2
        return N, c

    def stored(self, X, levels, least, draws):
        x, chance = X.flatten().clone(), torch.rand(2, 256, dtype=torch.float64, generator=draws).flatten()
        for i in range(len(x)):
            largest = X.flatten()[i // 256 * 256 :][:256].abs().max()
            exact = levels**2 * abs(x[i]) / largest
            low = math.floor(math.sqrt(exact))
            code = low + (chance[i] < (exact - low**2) / ((low + 1) ** 2 - low**2))
            x[i] = torch.sign(x[i]) * largest * (max(code, least) / levels) ** 2
        return x.view(X.shape)


class Spam(Naive):
    gamma, v = 1, 0

    def inner(self, R):
        since = (self.t - 1) % self.reset
        if since == 0:
            self.M, self.V = torch.zeros_like(R), torch.zeros_like(R)
        else:
            R = torch.where(R**2 > self.threshold * self.V, torch.sign(R) * torch.sqrt(self.threshold * self.V), R)
        N, c = super().inner(R, since + 1)
        rising = self.t > self.reset and since < self.warmup
        return N, c * (math.sin(math.pi / 2 * (since + 1) / self.warmup) ** 2 if rising else 1)

    def rest(self, G, R, N):
        self.prev = math.sqrt(self.outside * self.v / (1 - self.beta2 ** (self.t - 1))) if self.t > 1 else math.inf
        S = super().rest(G, R, N)
        self.v = self.beta2 * self.v + (1 - self.beta2) * (S**2).sum()
        return S


FIRA = lambda m, n, r: m * r + 2 * n * r + 1
HALF = lambda m, n, r: m * r + n * r + 1
CASES = {  # the variant's options, its naive version, and the numbers of 8 bytes in its state
    **{kind: ({"kind": kind}, Inner, HALF) for kind in ("momentum", "adagrad", "rmsprop", "lion")},
    "rotate": ({}, Rotate, FIRA),
    "two_sided": ({}, TwoSided, lambda m, n, r: (m + n) * r + 2 * r * r + 1),
    "adaptive_rank": ({"energy": 0.8, "rank": 6, "proj_method": "subspace"}, AdaptiveRank, FIRA),
    "randomized": ({"oversample": 2}, Randomized, FIRA),
    "eight_bit": ({"gamma": math.inf}, EightBit, lambda m, n, r: m * r / 8 + 2 * 2 * (256 / 8 + 1) + 1),
    "spam": ({"threshold": 400, "outside": 1.1, "reset": 5, "warmup": 3}, Spam, lambda *mnr: FIRA(*mnr) + 1),
}


@SHAPES
@pytest.mark.parametrize("case", CASES)
def test_against_a_naive_version(case, shape):
    extra, naive, numbers = CASES[case]
    p, naive = weight(shape), naive(shape)
    vars(naive).update(extra)
    optimizer, W = variant(case)([p], **options(**extra)), p.detach().clone()
    for G in gradients(shape):
        W += naive.step(G)
        torch.testing.assert_close(train(optimizer, p, [G]), W, rtol=1e-8, atol=1e-8)
        tensors = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        assert sum(x.numel() * x.element_size() for x in tensors) == 8 * numbers(8, 70, naive.P.shape[1])


@pytest.mark.parametrize("case", [*CASES, "spread", "stochastic_rounding"])
def test_resume(case):
    """Stopped after each step, loaded with weights_only=True into new objects: the same bits."""
    extra = CASES[case][0] if case in CASES else {}
    dtype = torch.bfloat16 if case == "stochastic_rounding" else torch.float32
    make = lambda ps: variant(case)([{"params": ps[:2]}, {"params": ps[2:], "rank": None}], **options(**extra))
    straight, stopped = ([weight(s, dtype) for s in ((8, 70), (70, 8), (70,))] for _ in range(2))
    one, two = make(straight), make(stopped)
    for G in gradients((8, 70)):
        for p, q, g in zip(straight, stopped, (G, G.T, G[0])):
            p.grad = q.grad = g.to(dtype)
        one.step()
        two.step()
        torch.save((two.state_dict(), stopped), file := io.BytesIO())
        saved, stopped = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        two = make(stopped)
        two.load_state_dict(saved)
    assert all(torch.equal(p, q) for p, q in zip(straight, stopped))


def test_inner_which_phi_is_trivial():
    G, p, q = gradients((8, 70)), *(weight((8, 70)) for _ in range(2))
    sgd = variant("inner")([p], kind="momentum", betas=(0.0, 0.9), **options(alpha=1.0, gamma=None))
    torch.testing.assert_close(train(sgd, p, G), train(torch.optim.SGD([q], lr=0.02), q, G), rtol=0, atol=1e-7)
    lion = variant("inner")([p], kind="lion", **options())
    train(lion, p, G)
    assert (lion.seen[p]["phi"] * lion.seen[p]["R"] - RANK**0.5).abs().max() < 1e-5


@pytest.mark.parametrize("energy, r", [(0.5, 1), (0.9, 3), (0.99, 5), (1.0, 7)])  # 7 is the cap
def test_adaptive_rank_keeps_the_share(energy, r):
    p = weight((8, 70))
    optimizer = variant("adaptive_rank")([p], energy=energy, **options(rank=7))
    train(optimizer, p, [matrix([4, 3, 2, 1, 0.5, 0.25, 1e-6, 1e-6], p.shape)])
    assert optimizer.state[p]["projection"].shape == (8, r)
    if r > 2:
        with pytest.raises(ValueError, match="must have"):
            variant("adaptive_rank")([p], **options(rank=2)).load_state_dict(optimizer.state_dict())


def test_randomized_energy():
    """A flat spectrum, the worst case: the share of the exact energy that P holds."""
    G = matrix([1 / (j + 1) ** 0.5 for j in range(60)], (60, 90))
    exact, share = torch.linalg.svdvals(G)[:16].square().sum(), []
    for iterations in (1, 2, 4):
        optimizer = variant("randomized")([weight(G.shape)], iterations=iterations, **options(rank=16))
        P = optimizer.find_projection(G, None, 0, optimizer.param_groups[0])
        share.append(float((P.T @ G).square().sum() / exact))
    assert 0.85 < share[0] < share[1] < share[2] < 1 and share[1] > 0.95, share


def test_spread_one_matrix_after_the_other():
    ps, naives = zip(*((weight(shape), Naive(shape)) for shape in [(8, 70), (70, 8), (8, 60)]))
    optimizer, Ws = variant("spread")(ps, **options()), [p.detach().clone() for p in ps]
    for G in zip(*(gradients(p.shape) for p in ps)):
        for i, p in enumerate(ps):
            p.grad, naives[i].turn = G[i], i * GAP // 3
            Ws[i] += naives[i].step(G[i])
        optimizer.step()
        torch.testing.assert_close(list(ps), Ws, rtol=1e-8, atol=1e-8)


def test_eight_bit_moments_neither_vanish_nor_drift():
    """N stays near Adam's for hundreds of steps, where entries differ a thousandfold and then shrink."""
    shape, Ns, sizes = (8, 512), {}, torch.logspace(-3, 0, 512)
    sizes[::64] = 1e-7
    for name, cls in (("8", variant("eight_bit")), ("32", Fira)):
        p = weight(shape, torch.float32)
        optimizer, generator = cls([p], **options()), torch.Generator().manual_seed(0)
        state = optimizer.new_state(p, optimizer.param_groups[0])
        for t in range(1200):
            R = torch.randn(RANK, 512, generator=generator) * (sizes if t < 400 else sizes.flip(0))
            state["step"] += 1
            Ns[name] = optimizer.inner(R, state, optimizer.param_groups[0])[0]
            assert Ns[name].abs().max() < 15 and (state["exp_avg_sq"] > 0).all()  # Adam's own bound is 7.3
    assert 0.95 < Ns["8"].norm() / Ns["32"].norm() < 1.1 and torch.dist(Ns["8"], Ns["32"]) < 0.3 * Ns["32"].norm()


def test_spam_against_a_spike():
    """A gradient 10,000 times too large at step 20: the step it makes, and the last ones of the 40 after it."""
    grads, moved = gradients((8, 70), 60), {}
    for where in ("nowhere", "inside", "outside"):
        for name, cls, gamma in (("spam", variant("spam"), 1.01), ("no limiter", Fira, None), ("limiter", Fira, 1.01)):
            p = weight((8, 70))
            optimizer = cls([p], **options(update_proj_gap=100, gamma=gamma))
            start, P = train(optimizer, p, grads[:20]), optimizer.state[p]["projection"]
            rest = grads[20] - P @ P.T @ grads[20]
            spike = grads[20] + 1e4 * {"nowhere": 0, "inside": grads[20] - rest, "outside": rest}[where]
            then, late = train(optimizer, p, [spike]), train(optimizer, p, grads[21:50])
            end = train(optimizer, p, grads[50:])
            moved[where, name] = [float(torch.dist(*two)) for two in ((start, then), (late, end))]
    calm = moved["nowhere", "no limiter"]
    assert moved["nowhere", "spam"] == pytest.approx(calm, rel=0.01)
    assert moved["outside", "no limiter"][0] > 1000 * calm[0]
    assert moved["inside", "limiter"][1] < calm[1] / 20  # the limiter does not help here: V remembers
    for where in ("inside", "outside"):
        assert moved[where, "spam"][0] < 5 * calm[0] and moved[where, "spam"][1] > calm[1] / 2, moved


@SHAPES
def test_stochastic_rounding(shape):
    """Each step of a bfloat16 weight ends on one of the two neighbours of the exact result, which it is on average."""
    p, naive, off = weight(shape, torch.bfloat16), Naive(shape), []
    optimizer = variant("stochastic_rounding")([p], **options(lr=0.001, gamma=None))
    vars(naive).update(lr=0.001, gamma=math.inf, change=lambda P: setattr(naive, "P", P.bfloat16().double()))
    for G in gradients(shape, 30):
        exact = p.detach().double() + naive.step(G.bfloat16())
        after = train(optimizer, p, [G]).double()
        gap = 2.0 ** (torch.maximum(exact.abs(), after.abs()).log2().floor() - 7)  # to the next bfloat16
        off.append((after - exact) / gap)
    off = torch.cat(off)
    assert 0.9 < off.abs().max() < 1.01
    assert off.mean().abs() < 4 * off.std() / off.numel() ** 0.5 and 0.2 < off.std() < 0.5
    assert optimizer.state[p]["step"] == 30 and optimizer.seen[p] and len(optimizer.state) == 1


def test_stochastic_rounding_loses_no_small_updates():
    """200 steps of 1e-4 from 1, where bfloat16s are 0.004 apart; without a rank."""
    for cls, mean in ((variant("stochastic_rounding"), 0.98), (Fira, 1.0)):
        ps = [torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = cls(ps, lr=1e-4)
        ps[0].grad = ps[1].grad = torch.ones_like(ps[0])
        for _ in range(200):
            optimizer.step()
        assert ps[0].double().mean().item() == pytest.approx(mean, abs=5e-4)
        assert torch.equal(*ps) == (cls is Fira)  # each has draws of its own
