"""The tests of fira.py. The oracle comes first: course/naive.py, Fira by the book in float64, which shares nothing with
the fast code. Then the subspace, what a step costs, AdamW, what one expects of a torch optimizer, errors, groups."""

import copy
import importlib
import inspect
import io
import itertools
import math
import pickle
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fira
from course import naive
from fira import Fira, param_groups
from model import ModelConfig, Transformer

FAMILY = {
    "galore": {"scaling": None, "proj_method": "svd"},
    "galore_add": {"scaling": "unit", "gamma": None, "proj_method": "svd"},
    "fira_matrix": {"scaling": "matrix"},
    "fira": {},
    "fira_no_limiter": {"gamma": math.inf, "proj_method": "svd"},
    "fira_only_scaling": {"only_scaling": True},
    "apollo": {"only_scaling": True, "proj_method": "random"},
    "apollo_mini": {"only_scaling": True, "proj_method": "random", "scaling": "matrix", "rank": 1},
}
MEMBERS = FAMILY | {"adamw": {"rank": None}}
SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16)}
OPTIONS = {"lr": 0.02, "alpha": 0.3, "betas": (0.8, 0.95), "weight_decay": 0.1, "rank": 5, "update_proj_gap": 4}


def random_gradients(shape, steps, dtype=torch.float64, seed=0):
    """Gradients with a decaying spectrum and columns of very different sizes, some larger, so that the limiter acts."""
    (m, n), generator = shape, torch.Generator().manual_seed(seed)
    low = torch.randn(m, 4, generator=generator).double() @ torch.randn(4, n, generator=generator).double()
    noise = [torch.randn(m, n, generator=generator).double() for _ in range(steps)]
    sizes = torch.logspace(-3, 1, n).double()
    return [((low + x) * sizes * (1 + 2 * (i % 4 == 3))).to(dtype) for i, x in enumerate(noise)]


def start(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def all_params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer, *gradients):
    for p, G in zip(all_params(optimizer), gradients):
        p.grad = None if G is None else G.clone()
    optimizer.step()


def run(*gradients, kind=Fira, **options):
    """Train matrices, each with its own list of gradients. Returns the optimizer, and all Ws and all Ps of each."""
    params = [nn.Parameter(start(Gs[0].shape, Gs[0].dtype)) for Gs in gradients]
    optimizer, Ws, Ps = kind(params, **options), [[] for _ in params], [[] for _ in params]
    for now in zip(*gradients):
        step(optimizer, *now)
        for i, p in enumerate(params):
            Ws[i].append(p.detach().clone())
            Ps[i].append(optimizer.state[p].get("projection"))
    return optimizer, Ws, Ps


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def end(*gradients, **options):
    return run(*gradients, **options)[1][0][-1]


# The oracle


def subspace_iteration(G, P, r):
    if not P.any():
        return naive.singular_vectors(G, P, r)
    Q = torch.linalg.qr(G @ G.T @ P).Q
    return Q @ torch.linalg.svd(Q.T @ G).U


def assert_equals_naive(gradients, Ws, Ps, right=None, proj_method="subspace", update_proj_gap=200, **options):
    """The movement to 1e-9, and P but for the sign with which each of its vectors began."""
    chosen = iter(Ps[::update_proj_gap])
    ways = {"svd": naive.singular_vectors, "subspace": subspace_iteration, "random": lambda *_: next(chosen)}
    m, n = gradients[0].shape
    turn = (lambda X: X.T) if (m >= n if right is None else right) else (lambda X: X)
    expected, state = turn(start((m, n))), {}
    for G, W, P in zip(gradients, Ws, Ps, strict=True):
        expected = naive.fira_step(expected, turn(G), state, T=update_proj_gap, choose=ways[proj_method], **options)
        W_0 = start((m, n))
        torch.testing.assert_close(W - W_0, turn(expected) - W_0, rtol=1e-9, atol=1e-12)
        if P is not None:
            torch.testing.assert_close(P * (P * state["P"]).sum(0).sign(), state["P"], rtol=0, atol=1e-9)


def matrices(steps, shapes=tuple(SHAPES.values()), dtype=torch.float64):
    return [random_gradients(shape, steps, dtype, seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("alpha_mode", fira.CHOICES["alpha_mode"])
@pytest.mark.parametrize("member", FAMILY)
def test_family_equals_the_naive_algorithm(member, alpha_mode):
    """Wide, tall and square; their subspaces are found at the same time, in threads."""
    options, gradients = OPTIONS | FAMILY[member] | {"alpha_mode": alpha_mode}, matrices(14)
    for G, W, P in zip(gradients, *run(*gradients, **options)[1:]):
        assert [i for i in range(1, 14) if not torch.equal(P[i], P[i - 1])] == [4, 8, 12]
        assert_equals_naive(G, W, P, **options)


@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right"])
def test_the_other_sides_equal_the_naive_algorithm(proj_type):
    options, gradients = OPTIONS | {"alpha_mode": "released"}, matrices(9)
    for (m, n), *matrix in zip(SHAPES.values(), gradients, *run(*gradients, proj_type=proj_type, **options)[1:]):
        right = {"reverse_std": m < n, "left": False, "right": True}[proj_type]
        assert matrix[2][0].shape == (n if right else m, 5)
        assert_equals_naive(*matrix, right, **options)


@pytest.mark.parametrize("alpha_mode", fira.CHOICES["alpha_mode"])
@pytest.mark.parametrize("member", ["fira", "galore", "fira_only_scaling"])
def test_a_rank_of_the_short_side_needs_no_projection(member, alpha_mode):
    options = OPTIONS | FAMILY[member] | {"alpha_mode": alpha_mode, "rank": 6}
    gradients = matrices(6, [(6, 20), (20, 6), (1, 9)])
    assert run(*gradients, **options | {"proj_type": "reverse_std"})[2] == [[None] * 6] * 3
    optimizer, *found = run(*gradients, **options)
    assert member == "fira_only_scaling" or list(optimizer.seen.values()) == [{}] * 3
    for G, W, P in zip(gradients, *found):
        assert P == [None] * 6
        assert_equals_naive(G, W, P, **options)


@pytest.mark.parametrize("member", ["fira", "fira_only_scaling", "galore"])
@pytest.mark.parametrize("zeros", [(0,), (0, 1, 2), (2,), (4,), (4, 5), (6,)], ids=str)  # 0, 4 and 8 choose a subspace
def test_an_all_zero_gradient_does_no_harm(zeros, member):
    """It chooses no subspace, and its norm is not stored: so the limiter does not hold S down for long."""
    options = OPTIONS | FAMILY[member] | {"alpha_mode": "paper", "betas": (0.5, 0.9)}
    gradients = [G * (i not in zeros) for i, G in enumerate(random_gradients((10, 24), 12))]
    _, (Ws,), (Ps,) = run(gradients, **options)
    assert [P.any().item() for P in Ps].index(True) == (len(zeros) if zeros[0] == 0 else 0)
    assert_equals_naive(gradients, Ws, Ps, **options)
    state = run(gradients[:1], **options)[0].state_dict()["state"][0]  # has all its entries after any first step
    assert set(state) == {"step", "prev_norm", "projection", "chosen", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("kind, arguments", [("CyclicLR", (0.001, 0.02, 3)), ("OneCycleLR", (0.02, 12))])
def test_the_learning_rate_and_betas_of_a_schedule_count(kind, arguments):
    p, state = nn.Parameter(start((12, 30))), {}
    expected, optimizer = p.detach().clone(), Fira([p], rank=5, proj_method="svd")  # all else as by default
    scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, *arguments)
    for G in random_gradients((12, 30), 10):
        now = {name: optimizer.param_groups[0][name] for name in ("lr", "betas")}
        expected = naive.fira_step(expected, G, state, rank=5, **now)
        step(optimizer, G)
        scheduler.step()
        torch.testing.assert_close(p.detach() - start((12, 30)), expected - start((12, 30)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaling", ["column", "matrix", "unit"])
def test_what_a_step_shows_is_what_the_names_say(scaling):
    gradients, limited = random_gradients((12, 30), 8), math.inf
    for t in range(1, 9):
        optimizer, _, (Ps,) = run(gradients[:t], rank=5, scaling=scaling, betas=(0.8, 0.95))
        (seen,), (state,), G, P = optimizer.seen.values(), optimizer.state.values(), gradients[t - 1], Ps[-1]
        R, N = P.T @ G, state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        phi = {"column": N.norm(dim=0) / (R.norm(dim=0) + 1e-8), "matrix": N.norm() / R.norm()}.get(scaling, 1.0)
        phi = phi * torch.ones(30).double()
        S = (phi * (G - P @ R)).norm()
        limited = min(S, 1.01 * limited)
        wanted = {"G": G.norm(dim=0), "R": R.norm(dim=0), "phi": phi, "S": S, "limited": limited}
        torch.testing.assert_close(seen, wanted, rtol=1e-6, atol=0)
        assert state["prev_norm"] == seen["limited"]
    assert limited < S  # the limiter was at work
    step(optimizer, None)
    assert optimizer.seen == {}


# The subspace


@pytest.mark.parametrize("proj_method", ["svd", "subspace"])
@pytest.mark.parametrize("shape", [(16, 30), (30, 16)], ids=str)  # projected on the left: the short side, the long one
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("base", [2.0, 8.0])  # of the singular values, so the last is 3e-5 or 3e-14 of the first
def test_the_columns_of_p_are_the_singular_vectors_or_converge_to_them(base, dtype, near, shape, proj_method):
    """Each change is one iteration, so its error falls by (σ_{r+1}/σ_r)² at every change, from any start."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, 16).double()).Q for k in shape)
    G = (U * base ** -torch.arange(16).double() @ V.T).to(dtype)
    gradients = [torch.randn(shape, dtype=dtype)] + [G] * 16
    _, _, (Ps,) = run(gradients, rank=5, proj_type="left", update_proj_gap=1, proj_method=proj_method)
    errors = [1 - (P.double() * U[:, :5]).sum(0).abs().min().item() for P in Ps]
    assert errors[0] > 0.1 and max(errors[-1:] if proj_method == "subspace" else errors[1:]) < near
    assert all(new < old / 4 + 1e-6 for old, new in itertools.pairwise(errors[5:]))
    for P in Ps[1:]:  # as near to singular vectors as their span allows: PᵀGGᵀP is diagonal
        torch.testing.assert_close(P.T @ P, torch.eye(5, dtype=dtype), rtol=0, atol=1e-5)
        ritz = P.T @ G @ G.T @ P
        torch.testing.assert_close(ritz, ritz.diagonal().diag(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("proj_method", ["svd", "subspace"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e37])
def test_the_whole_range_of_float32_and_a_low_rank(scale, proj_method):
    torch.manual_seed(0)
    G = scale * torch.randn(12, 3) @ torch.randn(3, 30)  # rank 3: the other two vectors are any orthonormal ones
    optimizer, (Ws,), (Ps,) = run([G] * 3, rank=5, proj_method=proj_method, update_proj_gap=1)
    assert scale > 1 or all(seen["S"] == 0 for seen in optimizer.seen.values())  # nothing is outside but rounding
    for W, P in zip(Ws, Ps):
        assert W.isfinite().all()
        torch.testing.assert_close(P.T @ P, torch.eye(5), rtol=0, atol=1e-5)
        rebuilt = P.double() @ (P.T.double() @ G.double())
        torch.testing.assert_close(rebuilt / scale, G.double() / scale, rtol=1e-4, atol=1e-4)


def test_a_subspace_that_the_gradient_has_left_is_chosen_anew():
    before, after = random_gradients((12, 30), 2)
    before[6:] = after[:6] = 0
    P = run([before, after], rank=3, update_proj_gap=1)[2][0][1]
    torch.testing.assert_close((P.T @ naive.singular_vectors(after, P, 3)).abs(), torch.eye(3).double())


def test_the_signs_of_singular_vectors_do_not_matter():
    class RandomSigns(Fira):
        def find_projection(self, *arguments):
            return super().find_projection(*arguments) * (torch.randint(2, (5,)) * 2 - 1)

    torch.manual_seed(0)
    options, gradients = {"rank": 5, "update_proj_gap": 4}, random_gradients((12, 30), 14)
    got, expected = (end(gradients, kind=kind, **options) for kind in (RandomSigns, Fira))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_random_projections_are_seeded_and_depend_on_the_step_only():
    """So processes that hold different parameters of a model agree about each."""
    gradients, options = random_gradients((10, 24), 4), {"rank": 3, "proj_method": "random", "update_proj_gap": 2}
    _, (Ws,), (Ps,) = run(gradients, **options)
    torch.testing.assert_close(Ps[0].T @ Ps[0], torch.eye(3).double())
    assert torch.equal(Ps[0], Ps[1]) and not torch.allclose(Ps[0].abs(), Ps[2].abs(), atol=1e-3)
    torch.manual_seed(5)
    assert torch.equal(run(random_gradients((7, 9), 4), gradients, **options)[1][1][-1], Ws[-1])


def test_a_step_keeps_no_graph_follows_no_default_device_and_leaves_random_numbers_and_threads_alone():
    optimizer, threads = Fira([nn.Parameter(torch.ones(8, 20)) for _ in range(2)], rank=3), torch.get_num_threads()
    for p in all_params(optimizer):
        p.grad = 2 * p  # as after backward(create_graph=True)
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    with torch.device("meta"):  # stands for a GPU
        optimizer.step()
    with ThreadPoolExecutor(1) as pool:  # a thread that is new
        found = [torch.get_num_threads(), pool.submit(torch.get_num_threads).result()]
    torch.set_num_threads(threads)
    assert torch.equal(before, torch.get_rng_state()) and found == [2, 2]
    assert not any(x.requires_grad or x.is_meta for p in optimizer.state for x in tensors(optimizer, p))


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
def test_the_state_has_mr_2nr_1_numbers(member, dtype):
    options, moments = {"rank": 5} | FAMILY[member], torch.promote_types(dtype, torch.float32)
    optimizer = run(*matrices(2, dtype=dtype), **options)[0]
    for (p, state), r in zip(optimizer.state.items(), [options["rank"]] * 3):
        m, n = sorted(p.shape)
        assert sum(x.numel() for x in tensors(optimizer, p)) == m * r + 2 * n * r + 1
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors(optimizer, p))
        dtypes = {"projection": dtype, "exp_avg": moments, "exp_avg_sq": moments, "prev_norm": moments}
        assert {k: x.dtype for k, x in state.items() if torch.is_tensor(x)} == dtypes


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
@pytest.mark.parametrize("member", MEMBERS)
def test_a_step_makes_no_temporary_of_a_weights_size_and_waits_for_nothing(member, shape, dtype):
    optimizer = run([torch.randn(shape, dtype=dtype)], **{"rank": 16, "weight_decay": 0.1} | MEMBERS[member])[0]
    (p,) = optimizer.state
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
    torch.manual_seed(0)
    gradients = [[scale * torch.randn(shape, dtype=dtype) for _ in range(20)] for shape in ((7, 5), (5,), ())]
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": True}
    ends = [all_params(run(*gradients, **options, **k)[0]) for k in ({}, {"kind": torch.optim.AdamW, "fused": True})]
    assert equal(*ends)


LAYOUTS = {  # of a (4, 3) tensor
    "slice": lambda: torch.ones(4, 6)[:, :3],
    "transposed": lambda: torch.ones(3, 4).T,
    "expanded": lambda: torch.ones(4, 1).expand(4, 3),
    "plain": lambda: torch.ones(4, 3),
}


@pytest.mark.parametrize("rank, dtype", [(None, torch.float32), (None, torch.bfloat16), (2, torch.float32)])
@pytest.mark.parametrize("weight", ["slice", "transposed", "plain"])
@pytest.mark.parametrize("gradient", LAYOUTS)
def test_neither_the_layout_in_memory_nor_16_bits_change_a_step(weight, gradient, rank, dtype):
    around = torch.ones(8, 6, dtype=dtype)
    W = around.as_strided((4, 3), LAYOUTS[weight]().stride())
    p, same = nn.Parameter(W), nn.Parameter(torch.ones(4, 3))
    twin = Fira([same], 0.1, rank=2) if rank else torch.optim.AdamW([same], 0.1, weight_decay=0, fused=True)
    optimizer = Fira([p], lr=0.1, rank=rank)
    for i in range(3):
        G = LAYOUTS[gradient]().to(dtype)
        G[:, :1] = torch.arange(4.0).square().reshape(4, 1) - i  # and so the others, where they are one; no R is 0
        p.grad, same.grad = G, G.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        same.data.copy_(p.detach())  # of 16 bits
        optimizer.step(), twin.step()
        torch.testing.assert_close(p, same.to(dtype), rtol=1e-6 if rank else 0, atol=0)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], twin.state[same]["exp_avg_sq"])
    assert (around != 1).sum() == (p != 1).sum() > 8  # nothing else was written


# A torch optimizer


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)) for _ in range(2)]
    return nn.Sequential(nn.Embedding(11, 12), *blocks, nn.Linear(12, 11)).to(dtype)


def train(model, optimizer, steps):
    for seed in steps:
        optimizer.zero_grad()
        tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(seed))
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def saved_and_loaded(both):
    (model, optimizer), file = both, io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = small_model(next(model.parameters()).dtype)
    other.load_state_dict(saved["model"])
    resumed = Fira(param_groups(other, rank=optimizer.param_groups[0]["rank"]))  # all other options are loaded
    resumed.load_state_dict(saved["optimizer"])
    return other, resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("twin", [saved_and_loaded, copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_twin_goes_on_bit_for_bit(twin, member, dtype):
    model = small_model(dtype)
    groups = param_groups(model, **{"rank": 4, "update_proj_gap": 3} | MEMBERS[member])
    optimizer = Fira(groups, lr=0.01, weight_decay=0.1)
    train(model, optimizer, range(4))
    optimizer.zero_grad()  # a deepcopy has none
    other, resumed = twin((model, optimizer))
    train(model, optimizer, range(4, 9)), train(other, resumed, range(4, 9))
    assert equal(model.parameters(), other.parameters())
    assert [set(group) for group in resumed.param_groups] == [set(group) for group in optimizer.param_groups]
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert all(type(a[k]) is type(b[k]) and torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
        assert all(x.stride() == b[k].stride() for k, x in a.items() if torch.is_tensor(x))


@pytest.mark.parametrize("rank", [3, 8, None])
def test_what_adamw_does_too(rank):
    gradients, options = random_gradients((8, 20), 4), {"rank": rank, "weight_decay": 0.5, "lr": 0.25}
    expected = end(gradients, **options)
    torch.testing.assert_close(end([-G for G in gradients], maximize=True, **options), expected)
    for lr in (torch.tensor(0.25), torch.tensor([0.25])):
        torch.testing.assert_close(end(gradients, **options | {"lr": lr}), expected)
    p, q = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    optimizer = Fira([p, q], **options)
    step(optimizer, torch.ones(4, 8), None)  # no gradient, no update
    assert torch.equal(q, torch.ones(4, 8)) and q not in optimizer.state and not torch.equal(p, q)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # a stale graph is noticed
        loss.backward()


def test_closures_and_step_hooks():
    p, calls = nn.Parameter(torch.ones(4, 8)), []
    optimizer = Fira([p], rank=2)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append(p.sum().item()))
    with torch.no_grad():
        optimizer.step(lambda: calls.append("closure") or p.square().sum().backward())
    assert calls == ["pre", "closure", p.sum().item()] and calls[-1] != 32 and "Fira" in repr(optimizer)
    assert optimizer.step(lambda: 3.0) == 3.0 and optimizer.step() is None


def test_add_param_group():
    optimizer, extra, bad = Fira([torch.ones(6, 6)], rank=2), torch.ones(6, 6), torch.ones(6, 6)
    optimizer.add_param_group({"params": [extra], "rank": 3})
    step(optimizer, None, torch.ones(6, 6))
    assert {"lr": 1e-3, "update_proj_gap": 200, "rank": 3}.items() <= optimizer.param_groups[-1].items()
    before = extra.clone()
    with pytest.raises(ValueError, match="rank=-1"):  # before anything is changed
        optimizer.add_param_group({"params": [bad], "rank": -1})
        step(optimizer, None, torch.ones(6, 6), torch.ones(6, 6))
    assert torch.equal(before, extra) and optimizer.state[extra]["projection"].shape == (6, 3)


@pytest.mark.parametrize("rank", [3, None])
def test_grad_scaler_skips_a_step_that_overflowed(rank):
    p = nn.Parameter(torch.ones(8, 20))
    optimizer, scaler = Fira([p], rank=rank), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, moves in ((1.0, True), (1e38, False), (1.0, True)):
        before = p.detach().clone()
        optimizer.zero_grad()
        scaler.scale(p.sum() * factor).backward()
        scaler.step(optimizer), scaler.update()
        assert torch.equal(before, p) != moves and p.isfinite().all()


def test_a_compiled_update_equals_the_plain_one(monkeypatch):
    """And is compiled once for all steps, whatever the learning rate, the step and the norms."""
    gradients, graphs = random_gradients((8, 20), 12, torch.float32), []

    def count(graph, inputs):  # torch 2.6 makes an empty one, too
        graphs.extend([graph] * any(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    ends, plain = [], fira.fira_update
    for backend in (None, count, "aot_eager"):  # the last one takes the operators that change W apart
        p = nn.Parameter(torch.zeros(8, 20))
        optimizer = Fira([p], rank=3, update_proj_gap=5)
        compiled_step = optimizer.step
        if backend:
            options = {"backend": backend, "fullgraph": True, "dynamic": False}
            monkeypatch.setattr(fira, "fira_update", torch.compile(plain, **options))
            compiled_step = torch.compile(optimizer.step, backend=backend)
        for i, G in enumerate(gradients):
            p.grad, optimizer.param_groups[0]["lr"] = G, 0.01 / (i + 1)
            compiled_step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[1:], [ends[0]] * 2)
    assert len(graphs) == 1


def test_autocast_around_a_step_changes_nothing():
    gradients, options = matrices(4, dtype=torch.float32), {"rank": 4, "update_proj_gap": 2}
    expected = all_params(run(*gradients, **options)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(all_params(run(*gradients, **options)[0]), expected)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("member", MEMBERS)
def test_a_huge_finite_gradient_leaves_weights_finite(member, at):
    gradients = random_gradients((8, 20), 6, torch.float32)
    gradients[at] = gradients[at].sign() * 1e19
    optimizer, (Ws,), _ = run(gradients, **{"rank": 3, "update_proj_gap": 2} | MEMBERS[member])
    assert all(W.abs().max() < 100 for W in Ws)
    assert all(x.isfinite().all() for seen in optimizer.seen.values() for x in seen.values())


def test_the_file_needs_torch_only_and_may_be_there_twice(tmp_path, monkeypatch):
    source = inspect.getsource(fira)
    names = re.findall(r"^ *(?:import|from) (\w+)", source, flags=re.MULTILINE)
    assert "torch" in names and set(names) <= {"torch", *sys.stdlib_module_names}
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mine, gradients = importlib.import_module("mine"), random_gradients((8, 20), 2)
    assert torch.equal(end(gradients, kind=mine.Fira, rank=3), end(gradients, rank=3))


# Saved states


def saved_by(kind=Fira, **options):
    return run([torch.ones(8, 20)], kind=kind, **options)[0].state_dict()


FOREIGN = {  # the rank of the optimizer, and a state that is not one of its own
    "adamw": (4, lambda: saved_by(torch.optim.AdamW)),
    "with a rank": (None, lambda: saved_by(rank=4)),
    "sgd": (None, lambda: saved_by(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "another rank": (4, lambda: saved_by(rank=2)),
    "another side": (4, lambda: saved_by(rank=4, proj_type="reverse_std")),
}


@pytest.mark.parametrize("rank, saved", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_state_is_refused(rank, saved):
    optimizer = Fira([("other", torch.ones(1, 1)), ("layer.weight", torch.ones(8, 20))], rank=rank)
    step(optimizer, None, torch.ones(8, 20))
    before, saved = str(optimizer.state_dict()), saved()
    saved["param_groups"][0]["params"] = [1, 0]  # the first one has no state
    saved["param_groups"][0].pop("proj_type", None)
    with pytest.raises(ValueError, match=r"saved state of layer.weight \(8, 20\)"):
        optimizer.load_state_dict(saved)
    assert before == str(optimizer.state_dict()) and not optimizer._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_of_more_or_fewer_groups_is_refused(count):
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    saved = Fira([{"params": [p]} for p in params[:count]], rank=2).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Fira([{"params": [p]} for p in params[:2]], rank=2).load_state_dict(saved)


@pytest.mark.parametrize("number", [float, int, torch.tensor, lambda x: torch.tensor(float(x))])
@pytest.mark.parametrize("rank", [4, None])
def test_a_numeric_step_loads_and_a_group_keeps_its_own_rank_and_what_the_saved_one_lacks(rank, number):
    saved, p = saved_by(rank=rank, alpha=0.5), nn.Parameter(torch.ones(8, 20))
    saved["state"][0]["step"], saved["param_groups"][0]["rank"] = number(7), 9
    del saved["param_groups"][0]["alpha_mode"]  # as if saved before there was this option
    optimizer = Fira([p], rank=rank, alpha_mode="paper")
    optimizer.load_state_dict(saved)
    before = saved["state"][0]["exp_avg"].clone()
    step(optimizer, torch.full((8, 20), 2.0))
    assert {"alpha_mode": "paper", "alpha": 0.5, "rank": rank}.items() <= optimizer.param_groups[0].items()
    assert optimizer.state[p]["step"] == 8 and isinstance(optimizer.state[p]["step"], int if rank else torch.Tensor)
    assert torch.equal(before, saved["state"][0]["exp_avg"])


def test_a_state_loads_into_another_precision_between_the_users_hooks():
    optimizer, resumed = (run(random_gradients((8, 20), 2, t), rank=4)[0] for t in (torch.bfloat16, torch.float32))
    seen = []
    for user in (optimizer, resumed):
        user.register_load_state_dict_post_hook(lambda o: seen.extend(dict(state) for state in o.state.values()))
        user.load_state_dict(optimizer.state_dict())
    assert [state["exp_avg"].dtype for state in seen] == [torch.float32] * 2  # as it stays
    assert [state["projection"].dtype for state in seen] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(*(state["exp_avg"] for state in seen), rtol=0, atol=0)
    resumed.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    resumed.load_state_dict(optimizer.state_dict())
    assert not resumed.state


# Errors

BAD = {"lr": (-1.0, math.nan), "betas": ((0.9, 1.0), (-0.1, 0.9)), "eps": (-1e-8,), "weight_decay": (-1.0,)}
BAD |= {"rank": (0, -3, 2.5), "update_proj_gap": (0, 1.5), "alpha": (0.0, math.inf, math.nan), "gamma": (0.5, math.nan)}
BAD |= dict.fromkeys(("scaling", "proj_type", "proj_method", "alpha_mode", "only_scaling", "maximize"), ("no",))


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_bad_options_are_refused(name, value):
    words = {"lr": "learning rate", "betas": "beta", "eps": "epsilon", "weight_decay": "weight_decay"}
    with pytest.raises(ValueError, match=words.get(name, re.escape(f"{name}={value!r} must be "))):
        Fira([{"params": [nn.Parameter(torch.ones(4, 8))], "rank": 2, name: value}])


def test_what_does_not_go_together_or_is_called_otherwise_is_refused():
    p = nn.Parameter(torch.ones(4, 8))
    with pytest.raises(ValueError, match="1-element"):
        Fira([p], lr=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="only_scaling=True must be False where scaling is None"):
        Fira([p], rank=2, only_scaling=True, scaling=None)
    peers = {"scale": "alpha", "scale_type": "scaling", "proj": "proj_method", "projection_type": "proj_type"}
    for theirs, ours in peers.items():
        with pytest.raises(ValueError, match=f"{theirs}=1.* must be called '{ours}'"):
            Fira([{"params": [p], theirs: 1.0}], rank=2)
    with pytest.raises(ValueError, match="no option params, scale"):
        param_groups(small_model(), rank=2, scale=0.25, params=3)
    for model in (nn.Embedding(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))):
        with pytest.raises(ValueError, match="no blocks with matrices .*make groups by hand"):
            param_groups(model, rank=2)
        with pytest.raises(ValueError, match="no parameter requires a gradient"):
            param_groups(model.requires_grad_(False), rank=2)
    optimizer = Fira([{"params": [p], "name": "blocks", "lr_scale": 0.5}], rank=np.int64(2))  # labels are allowed
    step(optimizer, torch.ones(4, 8))
    assert optimizer.param_groups[0]["name"] == "blocks" and type(optimizer.param_groups[0]["rank"]) is int
    saved = optimizer.state_dict()
    saved["param_groups"][0]["alpha"] = -1.0
    with pytest.raises(ValueError, match="alpha=-1.0"):
        optimizer.load_state_dict(saved)


def test_bad_parameters_and_gradients_are_refused():
    sharded = nn.Parameter(torch.ones(4, 8))
    optimizer = Fira([sharded], rank=2)
    sharded.placements = ()  # as a DTensor has
    for attempt in (lambda: Fira([sharded], rank=2), lambda: step(optimizer, torch.ones(4, 8))):  # it may come later
        with pytest.raises(ValueError, match="FSDP splits them: use DistributedDataParallel"):
            attempt()
    Fira([sharded])  # AdamW needs no whole matrices
    for shape in ((8,), (2, 3, 4), ()):
        with pytest.raises(ValueError, match="blocks.0.bias .*whole matrices only"):
            Fira([("a", nn.Parameter(torch.ones(4, 8))), ("blocks.0.bias", nn.Parameter(torch.ones(shape)))], rank=2)
    for rank in (2, None):
        with pytest.raises(ValueError, match="parameter 0 .*real numbers only"):
            Fira([nn.Parameter(torch.ones(4, 8, dtype=torch.complex64))], rank=rank)
        embedding = nn.Embedding(10, 4, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="[sS]parse"):
            Fira(embedding.parameters(), rank=rank).step()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("proj_method", fira.CHOICES["proj_method"])
def test_a_gradient_that_is_not_finite_is_named_and_leaves_nothing_behind(bad, proj_method):
    named, gradients = dict(zip(("adamw", "good", "sick"), SHAPES.values())), matrices(3)
    groups = [[{"params": [(k, nn.Parameter(start(x)))], "rank": 3} for k, x in named.items()] for _ in range(2)]
    optimizer, fresh = (Fira([g[0] | {"rank": None}, *g[1:]], proj_method=proj_method) for g in groups)
    sick = gradients[2][0].clone()
    sick[2, 3] = bad
    with pytest.raises(FloatingPointError, match=r"not finite .* gradient of sick \(16, 16\)"):
        step(optimizer, gradients[0][0], gradients[1][0], sick)
    assert equal(all_params(optimizer), all_params(fresh))
    for now in zip(*gradients):  # as if it had not been
        step(optimizer, *now), step(fresh, *now)
    assert equal(all_params(optimizer), all_params(fresh))


# The groups of a model


@pytest.mark.parametrize("kind", ["llama", "gpt2", None])
def test_param_groups_of_a_transformer(kind):
    model = Transformer(ModelConfig(61, 16, kind=kind)) if kind else small_model()
    groups, found = param_groups(model, rank=8, alpha=0.5), dict(model.named_parameters())
    matrices, others, vectors = ({name for name, p in found.items() if p in set(g["params"])} for g in groups)
    inside = {name for name in found if re.search(r"blocks|^[12]\.", name)}
    assert matrices == {name for name in inside if found[name].dim() == 2} and len(others) == 2
    assert vectors == {name for name, p in found.items() if p.dim() < 2} and found.keys() == matrices | others | vectors
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert options == [{"rank": 8, "alpha": 0.5}, {"rank": None}, {"rank": None, "weight_decay": 0.0}]
    assert all(group["rank"] is None for group in param_groups(model, rank=None))


two, few = small_model()[1:3], [nn.EmbeddingBag(9, 2), nn.Embedding(9, 2), nn.Conv1d(1, 2, 3), nn.Linear(2, 2)]
MODELS = {  # how many matrices have a rank
    "list": (4, lambda: nn.Sequential(nn.Embedding(11, 12), nn.ModuleList(two), nn.Linear(12, 11))),
    "head of two": (4, lambda: nn.Sequential(nn.ModuleList(two), nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3)))),
    "some": (1, lambda: nn.ModuleList([nn.Sequential(*few), nn.Linear(2, 2)])),
    "half frozen": (2, lambda: nn.Sequential(*small_model()[:2].requires_grad_(False), *small_model()[2:])),
    "torch's": (8, lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, batch_first=True), 2)),
}


@pytest.mark.parametrize("matrices, make", MODELS.values(), ids=MODELS)
def test_only_matrices_of_blocks_are_projected(matrices, make):
    groups = param_groups(make(), rank=2)
    assert len(groups[0]["params"]) == matrices and all(group["params"] for group in groups)
    assert all(p.dim() == 2 and p.requires_grad for p in groups[0]["params"])
