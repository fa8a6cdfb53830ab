"""Each variant against a naive float64 version of its own, its resume, the bytes of its state, and what it claims."""

import copy
import importlib.util
import io
import math
from pathlib import Path

import pytest
import torch

import fira
from fira import Fira, oriented

FOLDER = Path(__file__).resolve().parents[1] / "variants"
SHAPES = {"wide": (8, 20), "tall": (20, 8)}
RANK, GAP, STEPS = 4, 3, 8  # the subspace changes before steps 1, 4 and 7


def variant(name):
    """The one subclass of Fira in variants/NAME.py, loaded by its path as train.py loads it."""
    spec = importlib.util.spec_from_file_location(f"variant_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (cls,) = {c for c in vars(module).values() if isinstance(c, type) and c.__module__ == spec.name}
    assert issubclass(cls, Fira)
    return cls


def gradients(shape, steps=STEPS, seed=0, dtype=torch.float64):
    """Gradients that resemble each other, with singular values far apart, so that the subspaces are well defined."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    U, V = torch.linalg.qr(draw(shape[0], 8)).Q, torch.linalg.qr(draw(shape[1], 8)).Q
    sizes = 2.0 ** -torch.arange(8)
    return [(U * sizes @ V.T + 0.05 * draw(*shape)).to(dtype) for _ in range(steps)]


def train(optimizer, p, grads):
    for G in grads:
        p.grad = G.to(p.dtype).clone()
        optimizer.step()
    return p.detach().clone()


def options(**more):
    return {"lr": 0.02, "rank": RANK, "update_proj_gap": GAP, "proj_method": "svd"} | more


def weight(shape, dtype=torch.float64):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=dtype))


class Naive:
    """Fira by the book, with matrices of full size, in float64; a subclass overrides what its variant changes."""

    lr, eps, alpha, gamma, beta1, beta2 = 0.02, 1e-8, 0.25, 1.01, 0.9, 0.999

    def __init__(self, shape):
        self.t, self.P, self.prev, self.tall = 0, None, math.inf, shape[0] >= shape[1]
        self.M = self.V = torch.zeros(RANK, max(shape), dtype=torch.float64)

    def find(self, G):
        return torch.linalg.svd(G).U[:, :RANK]

    def change(self, P):
        """`P` has the new vectors, each with the sign that fits the one it replaces."""
        self.P = P

    def adam(self, R):
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R**2
        return self.M / (self.V.sqrt() + self.eps), math.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)

    inner = adam

    def outside(self, G, R, N):
        S = torch.linalg.norm(N, dim=0) / (torch.linalg.norm(R, dim=0) + 1e-8) * (G - self.P @ R)
        ratio = torch.linalg.norm(S) / (self.prev + 1e-8)
        S = S * self.gamma / max(ratio, self.gamma)
        self.prev = torch.linalg.norm(S)
        return S

    def step(self, G):
        """What is added to the weight."""
        G = G.double().T if self.tall else G.double()
        if self.t % GAP == 0:
            P = self.find(G)
            if self.P is not None:
                shared = min(P.shape[1], self.P.shape[1])
                signs = (P[:, :shared] * self.P[:, :shared]).sum(0)
                P = torch.cat([P[:, :shared] * torch.where(signs < 0, -1.0, 1.0), P[:, shared:]], 1)
            self.change(P)
        self.t += 1
        R = self.P.T @ G
        N, c = self.inner(R)
        change = -self.lr * c * (self.alpha * self.P @ N + self.outside(G, R, N))
        return change.T if self.tall else change


def agrees(naive, optimizer, p, grads, tolerance=1e-9):
    """Both take the same steps; the weights must agree after each. Signs of new vectors follow the optimizer's."""
    W = p.detach().double().clone()
    for G in grads:
        if naive.t == 0:  # an SVD's first signs are arbitrary: take those of the optimizer
            first = naive.find

            def find(G, first=first):
                P = first(G)
                theirs = optimizer.state[p]["projection"].double()
                return P * (P * theirs[:, : P.shape[1]]).sum(0).sign()

            naive.find = find
        train(optimizer, p, [G])
        before = W.clone()
        W = W + naive.step(G)
        naive.__dict__.pop("find", None)
        assert (W - before).norm() > 1e-3
        torch.testing.assert_close(p.detach().double(), W, rtol=tolerance, atol=tolerance)


def resumes(cls, shape=(20, 8), dtype=torch.float32, grads=None, **more):
    """Stop after each step, save, load with weights_only=True into new objects, go on: the same bits."""
    grads = grads or gradients(shape, dtype=dtype)
    p, b = weight(shape, dtype), torch.nn.Parameter(torch.ones(shape[0], dtype=dtype))
    make = lambda p, b: cls([{"params": [p], **options(**more)}, {"params": [b], "lr": 0.01}])  # noqa: E731
    straight, optimizer = (copy.deepcopy((p, b)) for _ in range(2)), None
    (p, b), (q, c) = straight
    through, optimizer = make(p, b), make(q, c)
    for G in grads:
        b.grad, c.grad = G[:, 0].clone(), G[:, 0].clone()
        train(through, p, [G])
        train(optimizer, q, [G])
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "q": q.data, "c": c.data}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        q, c = torch.nn.Parameter(saved["q"]), torch.nn.Parameter(saved["c"])
        optimizer = make(q, c)
        optimizer.load_state_dict(saved["optimizer"])
    assert torch.equal(p, q) and torch.equal(b, c)


def state_bytes(optimizer, p):
    return sum(x.numel() * x.element_size() for x in optimizer.state[p].values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_naive_version_is_fira(shape):
    p = weight(shape)
    agrees(Naive(shape), Fira([p], **options()), p, gradients(shape))


# inner


class NaiveInner(Naive):
    kind = ""

    def inner(self, R):
        if self.kind == "momentum":
            self.M = self.beta1 * self.M + R
            return self.M, 1
        if self.kind == "adagrad":
            self.V = self.V + R**2
            return R / (self.V.sqrt() + self.eps), 1
        if self.kind == "rmsprop":
            self.V = self.beta2 * self.V + (1 - self.beta2) * R**2
            return R / (self.V.sqrt() + self.eps), math.sqrt(1 - self.beta2**self.t)
        N = torch.sign(self.beta1 * self.M + (1 - self.beta1) * R)
        self.M = self.beta2 * self.M + (1 - self.beta2) * R
        return N, 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["momentum", "adagrad", "rmsprop", "lion"])
def test_inner(kind, shape):
    naive, p = NaiveInner(shape), weight(shape)
    naive.kind = kind
    optimizer = variant("inner")([p], kind=kind, **options())
    agrees(naive, optimizer, p, gradients(shape))
    m, n = min(shape), max(shape)
    assert state_bytes(optimizer, p) == 8 * (m * RANK + n * RANK + 1)
    resumes(lambda groups: variant("inner")(groups, kind=kind), shape)


def test_inner_which_phi_is_trivial():
    G = gradients((8, 20))
    p, q = weight((8, 20)), weight((8, 20))
    sgd = variant("inner")([p], kind="momentum", betas=(0.0, 0.9), **options(alpha=1.0, gamma=None))
    torch.testing.assert_close(train(sgd, p, G), train(torch.optim.SGD([q], lr=0.02), q, G), rtol=0, atol=1e-8)
    torch.testing.assert_close(sgd.seen[p]["phi"], torch.ones(20).double(), rtol=1e-5, atol=0)
    lion = variant("inner")([p], kind="lion", **options())
    train(lion, p, G)
    torch.testing.assert_close(
        lion.seen[p]["phi"] * lion.seen[p]["R"], torch.full((20,), 2.0).double(), rtol=1e-5, atol=0
    )
    with pytest.raises(ValueError, match="kind='lamb' must be one of"):
        variant("inner")([p], kind="lamb")


# rotate


class NaiveRotate(Naive):
    def change(self, P):
        if self.P is not None:
            M, V = self.M.clone(), self.V.clone()
            for i in range(RANK):
                cosines = [float(P[:, i] @ self.P[:, j]) for j in range(RANK)]
                self.M[i] = sum(c * M[j] for j, c in enumerate(cosines))
                self.V[i] = sum(c**2 * V[j] for j, c in enumerate(cosines))
        self.P = P


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rotate(shape):
    p = weight(shape)
    optimizer = variant("rotate")([p], **options())
    agrees(NaiveRotate(shape), optimizer, p, gradients(shape))
    assert state_bytes(optimizer, p) == 8 * (8 * RANK + 2 * 20 * RANK + 1)
    resumes(variant("rotate"), shape)


def test_rotate_keeps_the_momentum_whatever_the_basis():
    """A new basis of the same subspace: P M, the momentum as a matrix, stays the same, for Fira it does not."""
    kept = []
    for cls in (variant("rotate"), Fira):
        p = weight((8, 20))
        optimizer = cls([p], **options(update_proj_gap=100))
        train(optimizer, p, gradients((8, 20)))
        state = optimizer.state[p]
        before = state["projection"] @ state["exp_avg"]
        turn = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64)).Q
        optimizer.change_subspace(state, state["projection"] @ turn, optimizer.param_groups[0])
        kept.append(torch.dist(before, state["projection"] @ state["exp_avg"]) / before.norm())
    assert kept[0] < 1e-12 and kept[1] > 0.1


# two_sided


class NaiveTwoSided(Naive):
    def change(self, P):
        self.P, self.right_due = P, True

    def inner(self, R):
        if self.right_due:
            new = torch.linalg.svd(R).Vh[:RANK].T
            old = getattr(self, "right", new * (new * self.theirs()).sum(0).sign())
            self.right = new * (new * old).sum(0).sign()
            self.M, self.V = self.M[:, :RANK], self.V[:, :RANK]
            self.right_due = False
        N, c = self.adam(R @ self.right)
        return N @ self.right.T, c

    def outside(self, G, R, N):
        return torch.zeros_like(G)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_two_sided(shape):
    p, naive = weight(shape), NaiveTwoSided(shape)
    optimizer = variant("two_sided")([p], **options())
    naive.theirs = lambda: optimizer.state[p]["right"]  # the first signs are arbitrary
    agrees(naive, optimizer, p, gradients(shape))
    assert state_bytes(optimizer, p) == 8 * ((8 + 20) * RANK + 2 * RANK**2 + 1)
    resumes(variant("two_sided"), shape)
    p, q = weight(shape), weight(shape)  # at the full rank there are no sides: Adam
    both = train(variant("two_sided")([p], **options(rank=8)), p, gradients(shape))
    assert torch.equal(both, train(Fira([q], **options(rank=8)), q, gradients(shape)))


# adaptive_rank


class NaiveAdaptiveRank(Naive):
    energy = 0.9

    def find(self, G):
        U, sizes, _ = torch.linalg.svd(G)
        r = next(r for r in range(1, 9) if (sizes[:r] ** 2).sum() >= self.energy * (sizes**2).sum() or r == 6)
        return U[:, :r]

    def change(self, P):
        r, old = P.shape[1], 0 if self.P is None else self.P.shape[1]
        M, V = torch.zeros(r, self.M.shape[1]).double(), torch.zeros(r, self.M.shape[1]).double()
        for j in range(r if old else 0):
            M[j] = self.M[j] if j < old else 0
            V[j] = self.V[min(j, old - 1)]
        self.P, self.M, self.V = P, M, V


def spectrum(sizes, shape=(8, 20), seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, len(sizes), generator=generator).double()).Q for n in shape)
    return U * torch.tensor(sizes).double() @ V.T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adaptive_rank(shape):
    wide, narrow = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1, 0.3, 0.1, 0.05, 0.02]
    grads = [spectrum(s, shape, seed=0) for s in (wide,) * 3 + (narrow,) * 3 + ([1, 0.8, 0.5, 0.1],) * 3 + (wide,) * 3]
    p = weight(shape)
    optimizer = variant("adaptive_rank")([p], **options(rank=6))
    ranks, naive = [], NaiveAdaptiveRank(shape)
    for G in range(0, 12, GAP):
        agrees(naive, optimizer, p, grads[G : G + GAP])
        ranks.append(optimizer.state[p]["projection"].shape[1])
        assert state_bytes(optimizer, p) == 8 * ((8 + 2 * 20) * ranks[-1] + 1)
    assert ranks == [6, 1, 3, 6] or ranks == [5, 1, 3, 5], ranks  # 6 is the cap
    resumes(variant("adaptive_rank"), shape, grads=[G.float() for G in grads], rank=6)


def test_adaptive_rank_keeps_the_share():
    G, cls = spectrum([4, 3, 2, 1, 0.5, 0.25]), variant("adaptive_rank")
    for energy, r in ((0.5, 1), (0.9, 3), (0.99, 5), (1.0, 6)):
        p = weight(G.shape)
        optimizer = cls([p], energy=energy, **options(rank=7))
        train(optimizer, p, [G])
        assert optimizer.state[p]["projection"].shape[1] == r or energy == 1.0 and r <= 7
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="must have"):  # of a higher cap
        cls([weight(G.shape)], **options(rank=2)).load_state_dict(saved)
    with pytest.raises(ValueError, match="energy=32"):
        cls([weight(G.shape)], energy=32)


# randomized


class NaiveRandomized(Naive):
    def find(self, G):
        Q = torch.randn(8, RANK + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(self.t))
        for _ in range(2):
            Q = torch.linalg.svd(G @ G.T @ Q, full_matrices=False).U  # another basis of the same space
        return Q @ torch.linalg.svd(Q.T @ G).U[:, :RANK]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_randomized(shape):
    p = weight(shape)
    optimizer = variant("randomized")([p], oversample=2, **options())
    agrees(NaiveRandomized(shape), optimizer, p, gradients(shape), 1e-7)
    assert state_bytes(optimizer, p) == 8 * (8 * RANK + 2 * 20 * RANK + 1)
    resumes(variant("randomized"), shape)


def test_randomized_energy():
    """At a flat tail of the spectrum, the share of the exact energy that P holds."""
    G = spectrum([1 / (j + 1) ** 0.5 for j in range(60)], (60, 90))
    exact = torch.linalg.svdvals(G)[:16].square().sum()
    share = []
    for iterations in (1, 2, 4):
        optimizer = variant("randomized")([weight(G.shape)], iterations=iterations, **options(rank=16))
        P = optimizer.find_projection(G, None, 0, optimizer.param_groups[0])
        torch.testing.assert_close(P.T @ P, torch.eye(16).double())
        share.append(float((P.T @ G).square().sum() / exact))
    assert 0.85 < share[0] < share[1] < share[2] < 1 + 1e-9 and share[1] > 0.95, share


# spread


class NaiveSpread(Naive):
    turn = 0

    def step(self, G):
        global GAP
        if self.t and self.t % GAP != self.turn:
            t, self.t = self.t, 1  # not due
        return super().step(G)


def test_spread():
    """Which matrix changes in which step; between changes it is Fira."""
    shapes = [(8, 20), (20, 8), (8, 20), (9, 20), (8, 8)]
    ps = [weight(shape) for shape in shapes]
    optimizer = variant("spread")(ps, **options(update_proj_gap=10))
    changed, choose = [], Fira.find_projection

    def find(G, P, step, group):
        changed.append(step)
        return choose(optimizer, G, P, step, group)

    optimizer.find_projection = find
    log = []
    grads = [gradients(shape, 25, i) for i, shape in enumerate(shapes)]
    for step in range(25):
        for p, g in zip(ps, grads):
            p.grad = g[step].clone()
        optimizer.step()
        log.append(len(changed))
    assert [b - a for a, b in zip([0] + log, log)] == [5] + [0, 1] * 12  # one each second step, none twice
    assert sorted(changed) == sorted([0] * 5 + list(range(2, 25, 2)))
    resumes(variant("spread"), (8, 20))
