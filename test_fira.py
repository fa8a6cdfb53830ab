"""The tests of fira.py. The oracle comes first: course/naive.py, which is Fira by the book in float64 and shares nothing
with the fast code. Then the subspace, what a step costs, and what one may expect of a torch optimizer."""

import ast
import copy
import importlib.util
import itertools
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fira
from fira import Fira, param_groups
from model import ModelConfig, Transformer

ROOT = Path(__file__).resolve().parent


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


naive = load(ROOT / "course" / "naive.py", "naive")

FAMILY = {
    "galore": {"scaling": None, "proj_method": "svd"},
    "galore_add": {"scaling": "unit", "gamma": None, "proj_method": "svd"},
    "fira_matrix": {"scaling": "matrix"},
    "fira": {},
    "fira_no_limiter": {"gamma": math.inf},
    "fira_only_scaling": {"only_scaling": True},
    "apollo": {"only_scaling": True, "proj_method": "random"},
    "apollo_mini": {"only_scaling": True, "proj_method": "random", "scaling": "matrix", "rank": 1},
}
SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16)}
COMMON = {"lr": 0.02, "alpha": 0.3, "betas": (0.8, 0.95), "weight_decay": 0.1, "rank": 5, "update_proj_gap": 4}


def random_gradients(shape, steps, dtype=torch.float64, seed=0):
    """Gradients with a decaying spectrum and columns of very different sizes, some larger, so that the limiter acts."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    low = torch.randn(m, 4, generator=generator).double() @ torch.randn(4, n, generator=generator).double()
    noise = [torch.randn(m, n, generator=generator).double() for _ in range(steps)]
    sizes = torch.logspace(-3, 1, n).double()
    return [((low + x) * sizes * (1 + 2 * (i % 4 == 3))).to(dtype) for i, x in enumerate(noise)]


def start(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def step(optimizer, *gradients):
    for p, G in zip((p for group in optimizer.param_groups for p in group["params"]), gradients):
        p.grad = None if G is None else G.clone()
    optimizer.step()


def run(W, gradients, kind=Fira, **options):
    """Fira on one matrix: the weights after each step, P in each step, and the optimizer."""
    p = nn.Parameter(W.clone())
    optimizer = kind([p], **options)
    weights, bases = [], []
    for G in gradients:
        step(optimizer, G)
        weights.append(p.detach().clone())
        bases.append(optimizer.state[p].get("projection"))
    return weights, bases, optimizer


def subspace_iteration(G, P, r):
    if not P.any():
        return naive.singular_vectors(G, P, r)
    Q = torch.linalg.qr(G @ G.T @ P).Q
    return Q @ torch.linalg.svd(Q.T @ G).U


def assert_equals_naive(W, gradients, weights, bases, right, proj_method="subspace", update_proj_gap=200, **options):
    """Movements to 1e-9, and P but for the sign with which each of its vectors began."""
    chosen = iter([P for i, P in enumerate(bases) if i % update_proj_gap == 0])
    ways = {"svd": naive.singular_vectors, "subspace": subspace_iteration, "random": lambda *_: next(chosen)}
    state, W = {}, W.T if right else W
    expected = W
    for G, got, P in zip(gradients, weights, bases):
        G, got = (G.T, got.T) if right else (G, got)
        expected = naive.fira_step(expected, G, state, T=update_proj_gap, choose=ways[proj_method], **options)
        torch.testing.assert_close(got - W, expected - W, rtol=1e-9, atol=1e-12)
        if P is not None:
            signs = (P * state["P"]).sum(0).sign()
            torch.testing.assert_close(P * signs, state["P"], rtol=0, atol=1e-9)


# The oracle


@pytest.mark.parametrize("alpha_mode", fira.CHOICES["alpha_mode"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_family_equals_the_naive_algorithm(shape, member, alpha_mode):
    options = COMMON | {"alpha_mode": alpha_mode} | FAMILY[member]
    W, gradients = start(shape), random_gradients(shape, 14)
    weights, bases, _ = run(W, gradients, **options)
    assert [i for i in range(1, 14) if not torch.equal(bases[i], bases[i - 1])] == [4, 8, 12]
    assert_equals_naive(W, gradients, weights, bases, right=shape[0] >= shape[1], **options)


@pytest.mark.parametrize("proj_method", fira.CHOICES["proj_method"])
def test_several_matrices_equal_the_naive_algorithm(proj_method):
    """Their subspaces are found at the same time, in threads."""
    options = COMMON | {"proj_method": proj_method, "weight_decay": 0.0}
    gradients = [random_gradients(shape, 10, seed=i) for i, shape in enumerate(SHAPES.values())]
    params = [nn.Parameter(start(shape)) for shape in SHAPES.values()]
    optimizer, weights, bases = Fira(params, **options), [[], [], []], [[], [], []]
    for now in zip(*gradients):
        step(optimizer, *now)
        for i, p in enumerate(params):
            weights[i].append(p.detach().clone())
            bases[i].append(optimizer.state[p]["projection"])
    for i, (m, n) in enumerate(SHAPES.values()):
        assert_equals_naive(start((m, n)), gradients[i], weights[i], bases[i], right=m >= n, **options)


@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_other_sides_equal_the_naive_algorithm(shape, proj_type):
    options = COMMON | {"alpha_mode": "released"}
    W, gradients = start(shape), random_gradients(shape, 9)
    weights, bases, _ = run(W, gradients, proj_type=proj_type, **options)
    right = {"reverse_std": shape[0] < shape[1], "left": False, "right": True}[proj_type]
    assert bases[0].shape == (shape[right], 5)
    assert_equals_naive(W, gradients, weights, bases, right, **options)


@pytest.mark.parametrize("alpha_mode", fira.CHOICES["alpha_mode"])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (1, 9)], ids=str)
@pytest.mark.parametrize("member", ["fira", "galore", "fira_only_scaling"])
def test_a_rank_of_the_short_side_needs_no_projection(shape, member, alpha_mode):
    options = COMMON | {"alpha_mode": alpha_mode, "rank": 6} | FAMILY[member]
    W, gradients = start(shape), random_gradients(shape, 6)
    weights, bases, optimizer = run(W, gradients, **options)
    assert bases == [None] * 6
    if member == "fira":
        assert list(optimizer.seen.values()) == [{}]
    assert_equals_naive(W, gradients, weights, bases, right=shape[0] >= shape[1], **options)


@pytest.mark.parametrize("member", ["fira", "fira_only_scaling", "galore"])
@pytest.mark.parametrize("zeros", [(0,), (0, 1, 2), (2,), (4,), (4, 5), (6,)], ids=str)  # 0, 4 and 8 choose a subspace
def test_an_all_zero_gradient_does_no_harm(zeros, member):
    """It chooses no subspace, and the oracle does not store its norm: so the limiter does not hold S down for long."""
    options = COMMON | {"alpha_mode": "paper", "betas": (0.5, 0.9)} | FAMILY[member]
    W, gradients = torch.ones(10, 24).double(), random_gradients((10, 24), 12)
    for i in zeros:
        gradients[i] = torch.zeros(10, 24).double()
    weights, bases, optimizer = run(W, gradients, **options)
    first, steady = [i for i in range(12) if bases[i].any()][0], run(W, gradients[:1], **options)[2]
    assert first == (len(zeros) if zeros[0] == 0 else 0)
    for state in (*steady.state.values(), *optimizer.state.values()):  # the entries are the same from the first step on
        assert set(state) == {"step", "prev_norm", "projection", "chosen", "exp_avg", "exp_avg_sq"}
    assert_equals_naive(W, gradients, weights, bases, right=False, **options)


def test_the_learning_rate_and_betas_of_a_schedule_count():
    for make in (
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3, base_momentum=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=12),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 4)),
    ):
        p, state, seen = nn.Parameter(start((12, 30))), {}, set()
        expected, optimizer = p.detach().clone(), Fira([p], rank=5, update_proj_gap=4, proj_method="svd")
        scheduler = make(optimizer)
        for G in random_gradients((12, 30), 10):
            now = {name: optimizer.param_groups[0][name] for name in ("lr", "betas")}
            seen.add(str(now))
            expected = naive.fira_step(expected, G, state, rank=5, T=4, **now)
            step(optimizer, G)
            scheduler.step()
            torch.testing.assert_close(p.detach() - start((12, 30)), expected - start((12, 30)), rtol=1e-9, atol=1e-12)
        assert len(seen) > 3


@pytest.mark.parametrize("scaling", ["column", "matrix", "unit"])
def test_what_a_step_shows_is_what_the_names_say(scaling):
    p, before = nn.Parameter(start((12, 30))), math.inf
    optimizer = Fira([p], rank=5, scaling=scaling, betas=(0.8, 0.95))
    for G in random_gradients((12, 30), 8):
        step(optimizer, G)
        (seen,), state = optimizer.seen.values(), optimizer.state[p]
        R, N = state["projection"].T @ G, state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        ones = torch.ones(30).double()
        phi = {"column": N.norm(dim=0) / (R.norm(dim=0) + 1e-8), "matrix": N.norm() / R.norm() * ones, "unit": ones}[
            scaling
        ]
        S = (phi * (G - state["projection"] @ R)).norm()
        before = min(S, 1.01 * before)
        wanted = {"G": G.norm(dim=0), "R": R.norm(dim=0), "phi": phi, "S": S, "limited": before}
        assert seen.keys() == wanted.keys() and state["prev_norm"] == seen["limited"]
        for name, x in wanted.items():
            torch.testing.assert_close(seen[name], x, rtol=1e-6, atol=0)
    assert before < S  # the limiter was at work
    step(optimizer, None)
    assert (
        optimizer.seen
        == {}
        == next(iter(run(torch.ones(4, 8), [torch.ones(4, 8)], rank=2, scaling=None)[2].seen.values()))
    )


# The subspace


@pytest.mark.parametrize("proj_type, m", [("std", 8), ("reverse_std", 20), ("left", 8), ("right", 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1e-1, 1e-5])  # of the singular values, the largest being 1
def test_svd_finds_the_leading_singular_vectors(proj_type, m, dtype, smallest):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, 8).double()).Q for k in (8, 20))
    G = (U * torch.logspace(0, math.log10(smallest), 8).double() @ V.T).to(dtype)
    _, (P,), _ = run(torch.zeros(8, 20, dtype=dtype), [G], rank=5, proj_type=proj_type, proj_method="svd")
    assert P.shape == (m, 5) and P.dtype == dtype
    agreement = (P.double() * (V if m == 20 else U)[:, :5]).sum(0).abs()
    near = 1e-6 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(agreement, torch.ones(5).double(), rtol=0, atol=near)


@pytest.mark.parametrize("shape", [(16, 30), (30, 16)], ids=str)  # projected on the left: the short side, the long one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace_iteration_converges_to_the_singular_vectors(shape, dtype):
    """Each change is one iteration, so its error falls by (σ_{r+1}/σ_r)² at every change, also from a bad start."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, 16).double()).Q for k in shape)
    G = (U * 2.0 ** -torch.arange(16).double() @ V.T).to(dtype)
    options = {"rank": 5, "proj_type": "left", "update_proj_gap": 1}
    _, bases, _ = run(torch.zeros(shape, dtype=dtype), [torch.randn(shape, dtype=dtype)] + [G] * 16, **options)
    errors = [1 - (P.double() * U[:, :5]).sum(0).abs().min().item() for P in bases]
    assert errors[0] > 0.1 and errors[-1] < (1e-6 if dtype == torch.float32 else 1e-10)
    assert all(new < old / 4 + 1e-6 for old, new in itertools.pairwise(errors[5:]))
    for P in bases[1:]:  # as near to singular vectors as their span allows: PᵀGGᵀP is diagonal
        torch.testing.assert_close(P.T @ P, torch.eye(5, dtype=dtype), rtol=0, atol=1e-5)
        ritz = P.T @ G @ G.T @ P
        torch.testing.assert_close(ritz, ritz.diagonal().diag(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("proj_method", ["svd", "subspace"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e37])
def test_the_whole_range_of_float32_and_a_low_rank(scale, proj_method):
    torch.manual_seed(0)
    G = scale * torch.randn(12, 3) @ torch.randn(3, 30)  # rank 3: the other two vectors are any orthonormal ones
    options = {"rank": 5, "proj_method": proj_method, "update_proj_gap": 1}
    weights, bases, _ = run(torch.zeros(12, 30), [G] * 3, **options)
    assert all(W.isfinite().all() for W in weights)
    for P in bases:
        torch.testing.assert_close(P.T @ P, torch.eye(5), rtol=0, atol=1e-5)
        rebuilt = P.double() @ (P.T.double() @ G.double()) / scale
        torch.testing.assert_close(rebuilt, G.double() / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proj_method", ["svd", "subspace"])
def test_the_signs_of_singular_vectors_do_not_matter(proj_method):
    generator = torch.Generator().manual_seed(3)

    class WithRandomSigns(Fira):
        def find_projection(self, *arguments):
            return super().find_projection(*arguments) * (torch.randint(2, (5,), generator=generator) * 2 - 1)

    options = {"rank": 5, "update_proj_gap": 4, "proj_method": proj_method}
    W, gradients = start((12, 30)), random_gradients((12, 30), 14)
    expected, got = (run(W, gradients, kind, **options)[0] for kind in (Fira, WithRandomSigns))
    torch.testing.assert_close(got[-1], expected[-1], rtol=1e-11, atol=1e-13)


def test_random_projections_are_seeded_and_depend_on_the_step_only():
    """So processes that hold different parameters of a model agree about each."""
    gradients = [torch.randn(10, 24) for _ in range(4)]
    options = {"rank": 3, "proj_method": "random", "update_proj_gap": 2}
    weights, bases, _ = run(torch.zeros(10, 24), gradients, **options)
    torch.testing.assert_close(bases[0].T @ bases[0], torch.eye(3))
    assert torch.equal(bases[0], bases[1]) and not torch.allclose(bases[0].abs(), bases[2].abs(), atol=1e-3)
    torch.manual_seed(5)
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 9), (10, 24))]
    optimizer = Fira(params, **options)
    for G in gradients:
        step(optimizer, torch.randn(7, 9), G)
    assert torch.equal(params[1], weights[-1])


def test_a_step_keeps_no_graph_and_leaves_the_random_numbers_and_threads_alone():
    params = [nn.Parameter(torch.randn(8, 20)) for _ in range(2)]
    optimizer = Fira(params, rank=3, proj_method="random")
    for p in params:
        p.grad = 2 * p  # as after backward(create_graph=True)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert not any(x.requires_grad for p in params for x in optimizer.state[p].values() if torch.is_tensor(x))


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="step_size is made on the default device")
def test_a_step_does_not_follow_the_default_device():
    params = [nn.Parameter(torch.randn(8, 20)) for _ in range(2)]
    optimizer = Fira([{"params": params[:1], "rank": 3}, {"params": params[1:]}])
    for p in params:
        p.grad = torch.randn(8, 20)
    try:
        torch.set_default_device("meta")  # stands for a GPU
        optimizer.step(), optimizer.step()
    finally:
        torch.set_default_device(None)
    assert not any(x.is_meta for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(700, 333), (0, 5), (5, 0)], ids=str)
def test_column_norms_of_more_than_one_block_or_none(shape, transposed, dtype):
    X = torch.randn(shape, dtype=dtype)
    X = X.T if transposed else X
    norms = fira.column_norms(X)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms.double(), X.double().square().sum(0).sqrt(), rtol=1e-6, atol=0)


# What a step costs


def tensors(optimizer, p):
    return [x for x in optimizer.state[p].values() if torch.is_tensor(x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_state_has_mr_2nr_1_numbers(shape, member, dtype):
    options = {"rank": 5} | FAMILY[member]
    _, _, optimizer = run(start(shape).to(dtype), random_gradients(shape, 2, dtype), **options)
    (p,), ((m, n), r) = optimizer.state, (sorted(shape), options["rank"])
    assert sum(x.numel() for x in tensors(optimizer, p)) == m * r + 2 * n * r + 1
    assert optimizer.state[p]["projection"].dtype == dtype
    moments = torch.promote_types(dtype, torch.float32)
    assert all(optimizer.state[p][name].dtype == moments for name in ("exp_avg", "exp_avg_sq", "prev_norm"))
    assert all(x.is_contiguous() or x.T.is_contiguous() for x in tensors(optimizer, p))


class Watch(TorchDispatchMode):
    """Records the largest output that an op allocates, and whether a number was read off a tensor."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest, self.reads = {t.untyped_storage().data_ptr() for t in known}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.reads += "_local_scalar_dense" in str(func)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(800, 900), (900, 800), (800, 800)], ids=str)
@pytest.mark.parametrize("member", [*FAMILY, "adamw"])
def test_a_step_makes_no_temporary_of_a_weights_size_and_waits_for_nothing(member, shape, dtype):
    options = {"rank": 16, "update_proj_gap": 4} | FAMILY.get(member, {"rank": None})
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = Fira([p], weight_decay=0.1, **options)
    step(optimizer, torch.randn(shape, dtype=dtype))  # chooses the subspace
    with Watch([p, p.grad, *tensors(optimizer, p)]) as watch:
        optimizer.step()
    assert watch.reads == 0
    if member == "adamw" and dtype == torch.bfloat16:
        return  # these are copied in float32, one after the other
    assert watch.largest < 0.5 * p.numel()
    # Some ops allocate inside. Every allocation and release of one more step, in order:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(sizes), default=0)
    assert (0 < peak or member == "adamw") and peak < 0.8 * p.nbytes


# AdamW, the groups without a rank


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_rank_is_adamw_bit_for_bit(scale, dtype):
    generator, results = torch.Generator().manual_seed(0), []
    gradients = [
        [scale * torch.randn(s, dtype=dtype, generator=generator) for s in ((7, 5), (5,), ())] for _ in range(20)
    ]
    for kind in (Fira, lambda p, **k: torch.optim.AdamW(p, fused=True, **k)):
        params = [nn.Parameter(torch.ones_like(x)) for x in gradients[0]]
        optimizer = kind(params, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for now in gradients:
            step(optimizer, *now)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("transposed", [False, True])
def test_adamw_of_bf16_weights_keeps_float32_moments(transposed):
    p = torch.randn(70, 80).bfloat16()
    p = nn.Parameter(p.T if transposed else p)
    reference = nn.Parameter(p.detach().float())
    optimizer, adamw = Fira([p], lr=0.01), torch.optim.AdamW([reference], lr=0.01, weight_decay=0, fused=True)
    for _ in range(3):
        p.grad = torch.empty_like(p).normal_()
        reference.grad = p.grad.float()
        reference.data.copy_(p.detach())
        optimizer.step(), adamw.step()
        assert torch.equal(p, reference.bfloat16())
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32 and optimizer.state[p]["step"] == 3
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], adamw.state[reference]["exp_avg_sq"])


LAYOUTS = {  # of a (4, 3) tensor of ones
    "slice": lambda: torch.ones(4, 6)[:, :3],
    "step": lambda: torch.ones(8, 3)[::2],
    "transposed": lambda: torch.ones(3, 4).T,
    "expanded": lambda: torch.ones(4, 1).expand(4, 3),
    "plain": lambda: torch.ones(4, 3),
}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("weight", ["slice", "step", "transposed", "plain"])
@pytest.mark.parametrize("gradient", LAYOUTS)
def test_the_layout_in_memory_does_not_matter(weight, gradient, rank):
    W = LAYOUTS[weight]()
    p, same = nn.Parameter(W), nn.Parameter(torch.ones(4, 3))
    around = W._base if W._base is not None else W
    optimizers = [Fira([q], rank=rank, lr=0.1) for q in (p, same)]
    for i in range(3):
        p.grad = (i + LAYOUTS[gradient]()) if gradient != "expanded" else torch.full((4, 1), i + 1.0).expand(4, 3)
        same.grad = p.grad.clone(memory_format=torch.contiguous_format)
        [optimizer.step() for optimizer in optimizers]
    torch.testing.assert_close(p, same, rtol=0 if rank is None else 1e-6, atol=0)
    assert (around != 1).sum() == p.numel() == (p != 1).sum()  # nothing else was written


# A torch optimizer


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def backward(model, seed):
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for seed in steps:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def equal(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", [*FAMILY, "adamw"])
def test_training_goes_on_bit_for_bit_from_a_saved_state(tmp_path, member, dtype):
    options = {"update_proj_gap": 3} | {"rank": 4} | FAMILY.get(member, {"rank": None})
    model, other = small_model(dtype), small_model(dtype)
    optimizer = Fira(param_groups(model, **options), lr=0.01, weight_decay=0.1)
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    train(model, optimizer, range(4, 9))
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    resumed = Fira(param_groups(other, **options), lr=0.5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(4, 9))
    assert equal(model, other)
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert all(type(a[k]) is type(b[k]) and torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        assert all(x.stride() == b[k].stride() for k, x in a.items() if torch.is_tensor(x))


def test_no_gradient_no_update():
    p, q = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    for rank in (2, None):
        optimizer = Fira([p, q], rank=rank, weight_decay=0.1)
        step(optimizer, torch.randn(4, 8), None)
        assert torch.equal(q, torch.ones(4, 8)) and q not in optimizer.state and not torch.equal(p, q)


@pytest.mark.parametrize("rank", [3, 8, None])
def test_maximize_ascends(rank):
    options, gradients = {"rank": rank, "weight_decay": 0.1}, random_gradients((8, 20), 5)
    ends = [run(start((8, 20)), gradients, **options)[0][-1]]
    ends += [run(start((8, 20)), [-G for G in gradients], maximize=True, **options)[0][-1]]
    torch.testing.assert_close(*ends)


def test_closures_and_step_hooks():
    model, calls = small_model(), []
    optimizer = Fira(param_groups(model, rank=4))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        first = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"] and optimizer.step(closure) < first
    assert optimizer.step() is None and "Fira" in repr(optimizer)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_have_the_same_options(twin):
    model = small_model()
    optimizer = Fira(param_groups(model, rank=4, update_proj_gap=3), lr=0.01)
    train(model, optimizer, range(2))
    optimizer.zero_grad()  # a deepcopy has none
    other, copied = twin((model, optimizer))
    train(model, optimizer, range(2, 6)), train(other, copied, range(2, 6))
    assert equal(model, other)
    copied.load_state_dict(copied.state_dict())
    assert [set(group) for group in copied.param_groups] == [set(group) for group in optimizer.param_groups]


def test_a_tensor_learning_rate_is_as_good_as_a_number():
    for rank in (3, None):
        ends = []
        for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
            weights, _, optimizer = run(
                start((8, 20)), random_gradients((8, 20), 3), lr=lr, rank=rank, weight_decay=0.5
            )
            ends.append(weights[-1])
            assert optimizer.param_groups[0]["lr"] is lr
        torch.testing.assert_close(ends[1], ends[0]), torch.testing.assert_close(ends[2], ends[0])


def test_add_param_group():
    optimizer = Fira([nn.Parameter(torch.ones(6, 6))], rank=2)
    extra, bad = nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(6, 6))
    optimizer.add_param_group({"params": [extra], "rank": 3, "lr": 0.1})
    step(optimizer, None, torch.randn(6, 6))
    assert optimizer.param_groups[-1]["alpha"] == 0.25 and optimizer.state[extra]["projection"].shape == (6, 3)
    before = extra.detach().clone()
    with pytest.raises(ValueError, match="rank=-1"):  # before anything is changed
        optimizer.add_param_group({"params": [bad], "rank": -1})
        step(optimizer, None, torch.randn(6, 6), torch.randn(6, 6))
    assert torch.equal(before, extra)


@pytest.mark.parametrize("rank", [3, None])
def test_grad_scaler_skips_a_step_that_overflowed(rank):
    p = nn.Parameter(torch.ones(8, 20))
    optimizer, scaler = Fira([p], rank=rank, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, moves in ((1.0, True), (1e38, False), (1.0, True)):
        before = p.detach().clone()
        optimizer.zero_grad()
        scaler.scale((p * torch.randn(8, 20)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, p) != moves
    assert torch.isfinite(p).all()


def test_a_compiled_update_equals_the_plain_one(monkeypatch):
    """And is compiled once for all steps, whatever the learning rate, the step and the norms."""
    gradients, graphs = random_gradients((8, 20), 12, torch.float32), []

    def count(graph, inputs):
        if any(node.op.startswith("call") for node in graph.graph.nodes):  # torch 2.6 makes an empty one, too
            graphs.append(graph)
        return graph

    ends, plain = [], fira.fira_update
    for backend in (None, count, "aot_eager"):  # the last one takes the operators that change W apart
        if backend:
            compiled = torch.compile(plain, backend=backend, fullgraph=True, dynamic=False)
            monkeypatch.setattr(fira, "fira_update", compiled)
        p = nn.Parameter(torch.zeros(8, 20))
        optimizer = Fira([p], rank=3, update_proj_gap=5)
        compiled_step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        for i, G in enumerate(gradients):
            p.grad, optimizer.param_groups[0]["lr"] = G, 0.01 / (i + 1)
            compiled_step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], ends[0])
    torch.testing.assert_close(ends[2], ends[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("rank", [3, None])
def test_a_stale_graph_is_noticed(rank):
    p = nn.Parameter(torch.ones(8, 20))
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    Fira([p], rank=rank).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_around_a_step_changes_nothing():
    ends = []
    for enabled in (False, True):
        params = [nn.Parameter(start(shape).float()) for shape in SHAPES.values()]
        optimizer = Fira([{"params": params, "rank": 4}, {"params": [nn.Parameter(torch.ones(5))]}], update_proj_gap=2)
        for i in range(4):
            gradients = [random_gradients(shape, 1, torch.float32, seed=i)[0] for shape in SHAPES.values()]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                step(optimizer, *gradients, torch.ones(5))
        ends.append([p for group in optimizer.param_groups for p in group["params"]])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


@pytest.mark.parametrize("member", [*FAMILY, "adamw"])
def test_a_huge_finite_gradient_leaves_weights_finite(member):
    options = {"rank": 3, "update_proj_gap": 2} | FAMILY.get(member, {"rank": None})
    for at in range(3):
        gradients = random_gradients((8, 20), 6, torch.float32)
        gradients[at] = gradients[at].sign() * 1e19
        weights, _, optimizer = run(torch.ones(8, 20), gradients, **options)
        assert all(W.isfinite().all() for W in weights)
        if member not in ("galore", "adamw"):
            assert optimizer.seen[next(iter(optimizer.seen))]["limited"].isfinite()


def test_the_file_needs_torch_only_and_may_be_there_twice(tmp_path):
    source = (ROOT / "fira.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        name for node in imports for name in [getattr(node, "module", None), *(a.name for a in node.names)] if name
    }
    tops = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in tops} <= {"torch", *sys.stdlib_module_names} and names
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    ends = [
        run(start((8, 20)), random_gradients((8, 20), 2), k, rank=3)[0][-1]
        for k in (load(tmp_path / "mine.py", "mine").Fira, Fira)
    ]
    assert torch.equal(*ends)


# Saved states


def saved_by(kind, **options):
    p = nn.Parameter(start((8, 20)).float())
    optimizer = kind([p], **options)
    step(optimizer, torch.randn(8, 20))
    return optimizer.state_dict()


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("foreign", ["adamw", "sgd", "rank", "shape", "missing"])
def test_a_foreign_state_is_refused(foreign, rank):
    p = nn.Parameter(torch.ones(8, 20))
    optimizer = Fira([("layer.weight", p)], rank=rank)
    step(optimizer, torch.ones(8, 20))
    before = copy.deepcopy(optimizer.state_dict())
    state = {
        "adamw": lambda: saved_by(torch.optim.AdamW if rank else Fira, **({} if rank else {"rank": 4})),
        "sgd": lambda: saved_by(torch.optim.SGD, lr=0.1, momentum=0.9),
        "rank": lambda: saved_by(Fira, rank=2),
        "shape": lambda: saved_by(Fira, rank=rank),
        "missing": lambda: saved_by(Fira, rank=rank),
    }[foreign]()
    if foreign == "shape":
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].T
    if foreign == "missing":
        del state["state"][0]["exp_avg"]
    with pytest.raises(ValueError, match=r"saved state of layer.weight \(8, 20\)"):
        optimizer.load_state_dict(state)
    assert str(before) == str(optimizer.state_dict()) and not optimizer._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize("theirs", [1, pytest.param(3, marks=pytest.mark.xfail(strict=True, reason="zip drops one"))])
def test_a_state_of_more_or_fewer_groups_is_refused(theirs):
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    saved = Fira([{"params": [p]} for p in params[:theirs]], rank=2).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Fira([{"params": [p]} for p in params[:2]], rank=2).load_state_dict(saved)


def test_a_group_keeps_its_own_rank_and_what_the_saved_one_lacks():
    saved = saved_by(Fira, rank=4, alpha=0.5)
    p = nn.Parameter(torch.ones(8, 20))
    optimizer = Fira([p], rank=4, alpha_mode="paper")
    del saved["param_groups"][0]["alpha_mode"]  # as if saved before there was this option
    saved["param_groups"][0]["rank"] = None
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["alpha_mode"], group["alpha"], group["rank"]) == ("paper", 0.5, 4)
    assert optimizer.state[p]["projection"].data_ptr() != saved["state"][0]["projection"].data_ptr()


def test_a_state_loads_into_another_precision_between_the_users_hooks():
    model, other = small_model(torch.bfloat16), small_model()
    optimizer = Fira(param_groups(model, rank=4))
    train(model, optimizer, range(2))
    resumed, seen = Fira(param_groups(other, rank=4)), []
    for user in (optimizer, resumed):
        user.register_load_state_dict_post_hook(lambda o: seen.append([dict(state) for state in o.state.values()]))
        user.load_state_dict(optimizer.state_dict())
    for states, P in zip(seen, (torch.bfloat16, torch.float32)):  # of all that was loaded, as it stays
        assert {s["exp_avg"].dtype for s in states} == {torch.float32}
        assert {s["projection"].dtype for s in states if "projection" in s} == {P}
    train(other, resumed, range(2))
    resumed.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.state


@pytest.mark.parametrize("number", [float, int, torch.tensor, lambda x: torch.tensor(float(x))])
def test_a_numeric_step_loads(number):
    for rank in (4, None):
        saved, p = saved_by(Fira, rank=rank), nn.Parameter(torch.ones(8, 20))
        saved["state"][0]["step"] = number(7)
        optimizer = Fira([p], rank=rank)
        optimizer.load_state_dict(saved)
        step(optimizer, torch.ones(8, 20))
        assert optimizer.state[p]["step"] == 8


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "learning rate"),
        ({"lr": math.nan}, "learning rate"),
        ({"lr": torch.tensor([0.1, 0.2])}, "lr"),
        ({"betas": (0.9, 1.0)}, "beta"),
        ({"betas": (-0.1, 0.9)}, "beta"),
        ({"eps": -1e-8}, "epsilon"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"rank": 0}, "rank=0 must be a whole number above 0, or None"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"update_proj_gap": 1.5}, "update_proj_gap=1.5"),
        ({"alpha": 0.0}, "alpha=0.0 must be finite and above 0"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"gamma": 0.5}, "gamma=0.5 must be at least 1"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"scaling": "row"}, "scaling='row' must be one of .*'matrix'"),
        ({"proj_type": "up"}, "proj_type='up'"),
        ({"proj_method": "qr"}, "proj_method='qr'"),
        ({"alpha_mode": "new"}, "alpha_mode='new'"),
        ({"only_scaling": True, "scaling": None}, "only_scaling"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Fira([nn.Parameter(torch.ones(4, 8))], **({"rank": 2} | options))
    with pytest.raises(ValueError, match=message):
        Fira([{"params": [nn.Parameter(torch.ones(4, 8))], "rank": 2} | options])


def test_numpys_whole_numbers_are_good():
    _, _, optimizer = run(torch.ones(4, 8), [torch.ones(4, 8)], rank=np.int64(2), update_proj_gap=1)
    assert type(optimizer.param_groups[0]["rank"]) is int


@pytest.mark.parametrize("theirs, ours", fira.PEERS.items())
def test_the_names_of_other_packages_are_refused_and_labels_are_not(theirs, ours):
    p = nn.Parameter(torch.ones(4, 8))
    with pytest.raises(ValueError, match=f"{theirs}=1.* must be called '{ours}'"):
        Fira([{"params": [p], theirs: 1.0}], rank=2)
    optimizer = Fira([{"params": [p], "name": "blocks", "lr_scale": 0.5}], rank=2)
    step(optimizer, torch.ones(4, 8))
    assert optimizer.param_groups[0]["name"] == "blocks"


def test_bad_parameters_and_gradients_are_refused():
    sharded = nn.Parameter(torch.ones(4, 8))
    optimizer = Fira([sharded], rank=2)
    sharded.placements = ()  # as a DTensor has
    with pytest.raises(ValueError, match="FSDP splits them: use DistributedDataParallel"):
        Fira([sharded], rank=2)
    with pytest.raises(ValueError, match="FSDP"):  # it may come after the optimizer
        step(optimizer, torch.ones(4, 8))
    Fira([sharded])  # AdamW needs no whole matrices
    for shape in ((8,), (2, 3, 4), ()):
        with pytest.raises(ValueError, match="parameter 0 .*whole matrices only"):
            Fira([nn.Parameter(torch.ones(shape))], rank=2)
    with pytest.raises(ValueError, match=r"blocks.0.bias \(8,\)"):
        Fira([("a", nn.Parameter(torch.ones(4, 8))), ("blocks.0.bias", nn.Parameter(torch.ones(8)))], rank=2)
    for rank in (2, None):
        with pytest.raises(ValueError, match="real numbers only"):
            Fira([nn.Parameter(torch.ones(4, 8, dtype=torch.complex64))], rank=rank)
        embedding = nn.Embedding(10, 4, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="[sS]parse"):
            Fira(embedding.parameters(), rank=rank).step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("proj_method", fira.CHOICES["proj_method"])
def test_a_gradient_that_is_not_finite_is_named_and_changes_no_weight(bad, proj_method):
    params = [nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(5, 9)), nn.Parameter(torch.ones(3))]
    groups = [{"params": [("good", params[0])]}, {"params": [("sick", params[1])]}, {"params": [("b", params[2])]}]
    groups[2]["rank"] = None
    optimizer = Fira(groups, rank=2, proj_method=proj_method)
    gradients = [torch.randn(4, 8), torch.randn(5, 9), torch.ones(3)]
    gradients[1][2, 3] = bad
    with pytest.raises(FloatingPointError, match=r"not finite .* gradient of sick \(5, 9\)"):
        step(optimizer, *gradients)
    assert all((p == 1).all() for p in params)


@pytest.mark.xfail(strict=True, reason="the state says that a subspace was chosen, and it is 0")
def test_after_a_gradient_that_is_not_finite_training_goes_on_as_if_it_had_not_been():
    gradients = [random_gradients(shape, 3) for shape in SHAPES.values()]
    ends = []
    for bad in (True, False):
        params = [nn.Parameter(start(shape)) for shape in SHAPES.values()]
        optimizer = Fira(params, rank=3)
        if bad:
            with pytest.raises(FloatingPointError):
                step(optimizer, gradients[0][0], gradients[1][0], math.nan * gradients[2][0])
        for now in zip(*gradients):
            step(optimizer, *now)
        ends.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# The groups of a model


def names(model, groups):
    found = {p: name for name, p in model.named_parameters()}
    return [{found[p] for p in group["params"]} for group in groups]


def test_param_groups_of_a_transformer():
    model = small_model()
    groups = param_groups(model, rank=8, alpha=0.5)
    blocks = {f"blocks.{i}.{side}" for i in range(2) for side in ("up.weight", "down.weight")}
    vectors = {name for name, p in model.named_parameters() if p.dim() < 2}
    assert names(model, groups) == [blocks, {"embedding.weight", "head.weight"}, vectors]
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert options == [{"rank": 8, "alpha": 0.5}, {"rank": None}, {"rank": None, "weight_decay": 0.0}]
    assert all(group["rank"] is None for group in param_groups(model, rank=None))
    model.blocks[0].requires_grad_(False)
    assert names(model, param_groups(model, rank=8))[0] == {"blocks.1.up.weight", "blocks.1.down.weight"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_param_groups_of_the_models_of_this_project(kind):
    model = Transformer(ModelConfig(61, 16, kind=kind, d_model=32, d_ff=80, n_heads=4, n_layers=3))
    found = names(model, param_groups(model, rank=8))
    assert found[0] == {name for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2}
    assert len(found[1]) == 2 and sum(map(len, found)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "make, matrices",
    [
        (lambda: nn.Sequential(nn.Embedding(11, 12), Block(12), Block(12), nn.Linear(12, 11)), 4),
        (lambda: nn.Sequential(nn.Embedding(11, 12), nn.ModuleList([Block(12)]), nn.Linear(12, 11)), 2),
        (lambda: nn.Sequential(Net(), nn.Sequential(nn.Linear(11, 12), nn.ReLU(), nn.Linear(12, 3))), 4),
        (lambda: nn.ModuleList([nn.Sequential(nn.EmbeddingBag(9, 12), nn.Linear(12, 12)), nn.Linear(12, 11)]), 1),
        (lambda: nn.ModuleList([nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12))]), 1),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2), 2), 8),
    ],
    ids=["sequential", "list", "head", "bag", "embedding", "encoder"],
)
def test_only_matrices_of_blocks_are_projected(make, matrices):
    model = make()
    projected = [p for p in param_groups(model, rank=2)[0]["params"]]
    assert len(projected) == matrices and all(p.dim() == 2 for p in projected)
    assert not any(name.startswith("3") for name in names(model, [{"params": projected}])[0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Embedding(4, 4), "no blocks with matrices"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "no blocks with matrices"),
        (lambda: small_model().requires_grad_(False), "no parameter requires a gradient"),
    ],
)
def test_models_without_matrices_to_project_are_refused(make, message):
    with pytest.raises(ValueError, match=message + ".*make groups by hand"):
        param_groups(make(), rank=2)


def test_an_unknown_option_of_param_groups_is_refused():
    with pytest.raises(ValueError, match="no option params, scale"):
        param_groups(small_model(), rank=2, scale=0.25, params=3)
