"""All tests. The oracle for the optimizer is `naive_step`, a float64 transcription of the algorithm with
full-size matrices throughout, written apart from the fast code and sharing nothing with it."""

import base64
import copy
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fira
import prepare_data
import train as train_script
from fira import Fira, param_groups, state_bytes
from model import ModelConfig, Transformer, add_lora, export, load_pretrained

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"  # two real inputs that some machines have beside the project
FAMILY = {
    "galore": {"scaling": None},
    "galore_add": {"scaling": "unit", "gamma": None},
    "fira_matrix": {"scaling": "matrix"},
    "fira": {},
    "fira_no_limiter": {"gamma": None},
    "fira_only_scaling": {"only_scaling": True},
    "apollo": {"only_scaling": True, "proj_method": "random"},
    "apollo_mini": {"only_scaling": True, "proj_method": "random", "scaling": "matrix", "rank": 1},
}
SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (16, 16)}


# The oracle


def naive_step(
    W, G, P, state, t, *, lr, alpha, alpha_mode, scaling, only_scaling, gamma, betas, eps=1e-8, weight_decay=0.0
):
    """Algorithm 1 of the paper on (m, n) matrices with P (m, r) on the left; returns the new W."""
    R = P.T @ G
    state["M"] = betas[0] * state["M"] + (1 - betas[0]) * R
    state["V"] = betas[1] * state["V"] + (1 - betas[1]) * R * R
    N = state["M"] / (torch.sqrt(state["V"]) + eps)
    phi = torch.zeros(1, G.shape[1], dtype=G.dtype)
    for i in range(G.shape[1]):
        if scaling == "column":
            phi[0, i] = torch.norm(N[:, i]) / (torch.norm(R[:, i]) + 1e-8)
        elif scaling == "matrix":
            phi[0, i] = torch.norm(N) / (torch.norm(R) + 1e-8)
        elif scaling == "unit":
            phi[0, i] = 1.0
    if only_scaling:
        S = phi * G
    elif alpha_mode == "released":
        S = phi * (G - alpha * (P @ R))
    else:
        S = phi * (G - P @ R)
    if P.shape[0] == P.shape[1] and not only_scaling:
        S = torch.zeros_like(G)
    if gamma is not None:
        norm = float(torch.norm(S))
        if state["prev_norm"] is not None and norm / (state["prev_norm"] + 1e-8) > gamma:
            S = S * gamma / (norm / (state["prev_norm"] + 1e-8))
        if norm > 0:
            state["prev_norm"] = float(torch.norm(S))
    if only_scaling:
        update = alpha * S
    elif alpha_mode == "paper":
        update = alpha * (P @ N + S)
    else:
        update = alpha * (P @ N) + S
    c_t = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
    W = W - lr * c_t * update
    return W - lr * weight_decay * W


def oracle_run(W, gradients, rank, bases, right, moments="align", **options):
    """The trajectory under given bases, one for each step."""
    if right:
        W, gradients = W.T, [G.T for G in gradients]
    r = min(rank, *W.shape)
    state = {"M": torch.zeros(r, W.shape[1]).double(), "V": torch.zeros(r, W.shape[1]).double(), "prev_norm": None}
    trajectory = []
    for t, G in enumerate(gradients, 1):
        P = torch.eye(W.shape[0]).double() if rank >= min(W.shape) else bases[t - 1]
        if moments == "rotate" and t > 1 and P is not bases[t - 2]:
            state["M"] = P.T @ bases[t - 2] @ state["M"]
        W = naive_step(W, G, P, state, t, **options)
        trajectory.append(W.T if right else W)
    return trajectory


def random_gradients(shape, steps, dtype=torch.float64, seed=0):
    """Gradients with a decaying spectrum and columns of very different sizes, so that the limiter acts."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    low = torch.randn(m, 4, generator=generator).double() @ torch.randn(4, n, generator=generator).double()
    sizes = torch.logspace(-3, 1, n).double()
    return [
        ((low + torch.randn(m, n, generator=generator).double()) * sizes * (1 + 2 * (i % 4 == 3))).to(dtype)
        for i in range(steps)
    ]


def run(W, gradients, rank, **options):
    """(trajectory, the basis at each step, the optimizer) of Fira on one matrix."""
    p = nn.Parameter(W.clone())
    optimizer = Fira([p], rank=rank, **options)
    trajectory, bases = [], []
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        trajectory.append(p.detach().clone())
        bases.append(optimizer.state[p].get("projection"))
    return trajectory, bases, optimizer


@pytest.mark.parametrize("alpha_mode", ["paper", "unscaled", "released"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_family_equals_the_naive_algorithm(shape, member, alpha_mode):
    options = {"lr": 0.02, "alpha": 0.3, "weight_decay": 0.1, "betas": (0.8, 0.95), "alpha_mode": alpha_mode}
    options |= {"rank": 5, "proj_method": "svd", "scaling": "column", "only_scaling": False, "gamma": 1.01} | FAMILY[
        member
    ]
    rank, gap = options.pop("rank"), 4
    W, gradients = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double(), random_gradients(shape, 14)
    got, bases, _ = run(W, gradients, rank, update_proj_gap=gap, **options)
    assert not torch.equal(bases[0], bases[gap]) and torch.equal(bases[0], bases[gap - 1])
    options.pop("proj_method")
    right = shape[0] >= shape[1]
    bases = [bases[i - i % gap] for i in range(14)]  # each as it was when it was chosen
    if FAMILY[member].get("proj_method") != "random":
        for G, P in zip(gradients[::gap], bases[::gap]):  # the leading singular vectors, up to signs
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            cosines = (P * (Vh.T if shape[0] >= shape[1] else U)[:, :rank]).sum(0)
            torch.testing.assert_close(cosines.abs(), torch.ones(rank).double(), rtol=0, atol=1e-9)
    expected = oracle_run(W, gradients, rank, bases, right, **options)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a - W, b - W, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("moments", fira.CHOICES["moments"])
@pytest.mark.parametrize("proj_method", fira.CHOICES["proj_method"])
def test_every_way_to_change_the_subspace_equals_the_naive_algorithm(proj_method, moments, spread):
    """Three matrices in one group; spread, their subspaces change one after the other."""
    shapes, generator = [(12, 30), (30, 12), (16, 16)], torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator).double() for shape in shapes]
    gradients = [random_gradients(shape, 14, seed=i) for i, shape in enumerate(shapes)]
    options = {"lr": 0.02, "betas": (0.8, 0.95), "alpha": 0.3}
    params = [nn.Parameter(W.clone()) for W in start]
    optimizer = Fira(
        params, rank=5, update_proj_gap=6, proj_method=proj_method, moments=moments, spread=spread, **options
    )
    bases, got = [[], [], []], [[], [], []]
    for step in zip(*gradients):
        for p, G in zip(params, step):
            p.grad = G.clone()
        optimizer.step()
        for i, p in enumerate(params):
            bases[i].append(optimizer.state[p]["projection"])
            got[i].append(p.detach().clone())
    changes = [[t for t in range(1, 14) if b[t] is not b[t - 1]] for b in bases]
    assert changes == ([[6, 12], [2, 8], [4, 10]] if spread else [[6, 12]] * 3)
    for W, G, b, trajectory, shape in zip(start, gradients, bases, got, shapes):
        options |= {"scaling": "column", "only_scaling": False, "gamma": 1.01, "alpha_mode": "unscaled"}
        expected = oracle_run(W, G, 5, b, shape[0] >= shape[1], moments, **options)
        for a, e in zip(trajectory, expected):
            torch.testing.assert_close(a - W, e - W, rtol=1e-9, atol=1e-12)
        for before, after in itertools.pairwise(b):
            if before is not after and moments == "align":
                assert ((before * after).sum(0) >= 0).all()
            if moments == "keep":
                assert (after.gather(0, after.abs().argmax(0, keepdim=True)) > 0).all()


# The optimizer


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("member", ["fira", "galore", "apollo"])
def test_rank_of_the_short_side_needs_no_projection(shape, member):
    options = {"lr": 0.02, "alpha": 0.3, "betas": (0.8, 0.95), "alpha_mode": "released"}
    W, gradients = torch.randn(shape).double(), random_gradients(shape, 6)
    got, _, optimizer = run(W, gradients, 6, update_proj_gap=2, **options, **FAMILY[member])
    assert all("projection" not in state for state in optimizer.state.values())
    options |= {"scaling": "column", "only_scaling": False, "gamma": 1.01} | FAMILY[member]
    options.pop("proj_method", None)
    expected = oracle_run(W, gradients, 6, None, shape[0] >= shape[1], **options)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a - W, b - W, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_other_sides_equal_the_naive_algorithm(shape, proj_type):
    options = {"lr": 0.02, "alpha": 0.3, "betas": (0.8, 0.95), "alpha_mode": "released"}
    W, gradients = torch.randn(shape).double(), random_gradients(shape, 9)
    got, bases, _ = run(W, gradients, 5, update_proj_gap=4, proj_type=proj_type, **options)
    right = {"reverse_std": shape[0] < shape[1], "left": False, "right": True}[proj_type]
    options |= {"scaling": "column", "only_scaling": False, "gamma": 1.01}
    expected = oracle_run(W, gradients, 5, [bases[i - i % 4] for i in range(9)], right, **options)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a - W, b - W, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("proj_type, m", [("std", 8), ("reverse_std", 20), ("left", 8), ("right", 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1e-1, 1e-5])  # of the singular values, the largest being 1
def test_svd_finds_the_leading_singular_vectors(proj_type, m, dtype, smallest):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, 8).double()).Q for k in (8, 20))
    G = (U * torch.logspace(0, math.log10(smallest), 8).double() @ V.T).to(dtype)
    _, bases, _ = run(torch.zeros(8, 20, dtype=dtype), [G], 5, proj_type=proj_type, proj_method="svd")
    expected = (V if m == 20 else U)[:, :5]
    assert bases[0].shape == (m, 5) and bases[0].dtype == dtype
    agreement = (bases[0].double() * expected).sum(0).abs()
    torch.testing.assert_close(
        agreement, torch.ones(5).double(), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-11
    )


@pytest.mark.parametrize("shape", [(16, 30), (30, 16)], ids=str)  # projected on the left: the short side, the long one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace_iteration_converges_to_the_singular_vectors(shape, dtype):
    """Each change is one iteration, so its error falls by (σ_{r+1}/σ_r)² at every change."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, 16).double()).Q for k in shape)
    G = (U * 2.0 ** -torch.arange(16).double() @ V.T).to(dtype)
    options = {"proj_method": "subspace", "proj_type": "left", "update_proj_gap": 1}
    _, bases, _ = run(torch.zeros(shape, dtype=dtype), [G] * 16, 5, **options)
    errors = [1 - (P.double() * U[:, :5]).sum(0).abs().min().item() for P in bases]
    assert errors[-1] < (1e-6 if dtype == torch.float32 else 1e-12)
    assert all(new < old / 4 + 1e-6 for old, new in itertools.pairwise(errors))
    assert all(torch.allclose(P.T @ P, torch.eye(5, dtype=dtype), atol=1e-5) for P in bases)
    for P in bases:  # and they are as near to singular vectors as their span allows: PᵀGGᵀP is diagonal
        ritz = P.T @ G @ G.T @ P
        torch.testing.assert_close(ritz, ritz.diagonal().diag(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("proj_method", ["svd", "subspace"])
@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e37])
def test_the_whole_range_of_float32_and_a_low_rank(scale, proj_method):
    torch.manual_seed(0)
    G = scale * torch.randn(12, 3) @ torch.randn(3, 30)  # rank 3: the other two vectors are any orthonormal ones
    P = fira.find_projection(G, None, 5, proj_method, 0, G.abs().max().item()).double()
    torch.testing.assert_close(P.T @ P, torch.eye(5).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close((P @ (P.T @ G.double()) / scale).float(), G / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moments", fira.CHOICES["moments"])
@pytest.mark.parametrize("proj_method", ["svd", "subspace"])
def test_the_signs_of_singular_vectors_do_not_matter(monkeypatch, proj_method, moments):
    gradients = random_gradients((12, 30), 14)
    options = {"update_proj_gap": 4, "proj_method": proj_method, "moments": moments}
    expected, _, _ = run(torch.zeros(12, 30).double(), gradients, 5, **options)
    exact, generator = fira.find_projection, torch.Generator().manual_seed(3)

    def with_random_signs(*arguments):
        return exact(*arguments) * (torch.randint(2, (5,), generator=generator) * 2 - 1)

    monkeypatch.setattr(fira, "find_projection", with_random_signs)
    got, _, _ = run(torch.zeros(12, 30).double(), gradients, 5, **options)
    torch.testing.assert_close(got[-1], expected[-1], rtol=1e-11, atol=1e-13)


def test_random_projections_are_seeded_and_differ():
    gradients = [torch.randn(10, 24) for _ in range(4)]
    first, second = (run(torch.zeros(10, 24), gradients, 3, proj_method="random", update_proj_gap=2) for _ in range(2))
    assert torch.equal(first[0][-1], second[0][-1])
    assert not torch.allclose(first[1][0].abs(), first[1][2].abs())
    two = [nn.Parameter(torch.zeros(10, 24)) for _ in range(2)]
    optimizer = Fira(two, rank=3, proj_method="random")
    for p in two:
        p.grad = torch.randn(10, 24)
    optimizer.step()
    assert not torch.allclose(optimizer.state[two[0]]["projection"], optimizer.state[two[1]]["projection"])


@pytest.mark.parametrize("count", [1, 2])  # from two on, the subspaces are found in threads
def test_nothing_in_a_step_follows_the_default_device_or_keeps_a_graph(count):
    weights = [nn.Parameter(torch.randn(8, 20)) for _ in range(count)]
    optimizer = Fira(weights, rank=3)
    try:
        torch.set_default_device("meta")  # stands for a GPU
        for w in weights:
            w.grad = 2 * w  # as after backward(create_graph=True)
        optimizer.step()
    finally:
        torch.set_default_device(None)
    kept = [x for w in weights for x in optimizer.state[w].values() if isinstance(x, torch.Tensor)]
    assert not any(x.requires_grad or x.is_meta for x in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(700, 333), (0, 5), (5, 0)], ids=str)
def test_column_norms_of_more_than_one_block_or_none(shape, transposed, dtype):
    X = torch.randn(shape, dtype=dtype)
    X = X.T if transposed else X
    norms = fira.column_norms(X)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norms.double(), X.double().square().sum(0).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_without_rank_is_adamw_bit_for_bit(scale, dtype):
    start = [torch.randn(7, 5, dtype=dtype), torch.randn(5, dtype=dtype), torch.randn((), dtype=dtype)]
    results = []
    for kind in (Fira, lambda p, **k: torch.optim.AdamW(p, fused=True, **k)):
        params = [nn.Parameter(x.clone()) for x in start]
        optimizer = kind(params, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            for p in params:
                p.grad = scale * torch.randn(p.shape, dtype=dtype, generator=generator)
            optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("transposed", [False, True])
def test_adamw_of_bf16_weights_keeps_float32_moments(transposed):
    p = torch.randn(700, 800).bfloat16()  # more than one block of rows
    p = nn.Parameter(p.T if transposed else p)
    reference = nn.Parameter(p.detach().float())
    scalar = nn.Parameter(torch.tensor(0.5).bfloat16())
    optimizer, adamw = Fira([p, scalar], lr=0.01), torch.optim.AdamW([reference], lr=0.01, weight_decay=0, fused=True)
    for _ in range(3):
        p.grad, scalar.grad = torch.empty_like(p).normal_(), torch.tensor(1.0).bfloat16()
        reference.grad = p.grad.float()
        reference.data.copy_(p.detach())
        optimizer.step(), adamw.step()
        assert torch.equal(p, reference.bfloat16())
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32 and optimizer.state[p]["step"] == 3
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], adamw.state[reference]["exp_avg_sq"])
    assert abs(scalar.item() - (0.5 - 3 * 0.01)) < 0.005


def tensor_bytes(optimizer):
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


def small_model(kind="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return Transformer(ModelConfig(61, 16, kind, 32, 80, 4, 2)).to(dtype)


def train_steps(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(61, (2, 17), generator=generator)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("member", [*FAMILY, "adamw"])
def test_state_bytes_equal_the_formula(member, dtype):
    model, item = small_model(dtype=dtype), max(4, dtype.itemsize)
    options = {"rank": 8} | FAMILY.get(member, {"rank": None})
    optimizer = Fira(param_groups(model, **options))
    train_steps(model, optimizer, 2)
    r, expected = options["rank"], 0
    for name, p in model.named_parameters():
        if r is None or "blocks" not in name or p.dim() < 2:
            expected += 2 * p.numel() * item + 4
        else:
            m, n = sorted(p.shape)
            expected += m * r * dtype.itemsize + (2 * n * r + 1) * item
    assert tensor_bytes(optimizer) == state_bytes(optimizer.param_groups) == expected


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
def test_no_temporary_of_a_weights_size(member, shape, dtype):
    options = {"rank": 16, "update_proj_gap": 4} | FAMILY.get(member, {"rank": None})
    if member == "adamw":
        shape = (2 * shape[0], 2 * shape[1])  # 16-bit weights are converted in blocks; these are several
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = Fira([p], weight_decay=0.1, **options)
    p.grad = torch.randn(shape, dtype=dtype)
    optimizer.step()  # chooses the subspace
    kept = [v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    with Watch([p, p.grad, *kept]) as watch:
        optimizer.step()
    assert watch.reads == 0  # nothing waits for a device
    assert watch.largest < 0.5 * p.numel()
    # Some ops allocate inside. Every allocation and release of one more step, in order:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(itertools.accumulate(sizes))
    assert (0 < peak or member == "adamw") and peak < 0.8 * p.nbytes


CHANGES = {  # further ways to change the subspace
    "subspace": {"proj_method": "subspace"},
    "rotate": {"moments": "rotate"},
    "keep": {"moments": "keep"},
    "spread": {"spread": True, "proj_method": "subspace"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", [*FAMILY, *CHANGES])
def test_training_goes_on_bit_for_bit_from_a_saved_state(tmp_path, member, dtype):
    options = {"rank": 8, "update_proj_gap": 3} | (FAMILY | CHANGES)[member]
    model = small_model(dtype=dtype)
    optimizer = Fira(param_groups(model, **options), lr=0.01, weight_decay=0.1)
    train_steps(model, optimizer, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    train_steps(model, optimizer, 5, seed=1)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    other = small_model(dtype=dtype)
    resumed = Fira(param_groups(other, **options), lr=0.5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train_steps(other, resumed, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    for a, b in zip(optimizer.state.values(), resumed.state.values()):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("member", ["fira", "fira_only_scaling", "galore"])
@pytest.mark.parametrize("zero_at", [0, 2, 4, 6])  # T = 4: 0 and 4 choose a subspace
def test_an_all_zero_gradient_does_no_harm(zero_at, member):
    options = {"lr": 0.01, "alpha": 0.3, "alpha_mode": "paper", "betas": (0.5, 0.9), "weight_decay": 0.1}
    gradients = random_gradients((10, 24), 12)
    gradients[zero_at] = torch.zeros(10, 24).double()
    W = torch.ones(10, 24).double()
    got, bases, optimizer = run(W, gradients, 4, update_proj_gap=4, **options, **FAMILY[member])
    assert (bases[0] is None) if zero_at == 0 else torch.equal(bases[zero_at], bases[zero_at - 1])
    options |= {"scaling": "column", "only_scaling": False, "gamma": 1.01} | FAMILY[member]
    # The oracle does not store a zero norm, and so is not capped by it.
    expected = oracle_run(W, gradients, 4, [bases[1] if P is None else P for P in bases], False, **options)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a - W, b - W, rtol=1e-9, atol=1e-12)
    assert (got[-1] - got[-2]).norm() > 1e-3


def test_a_state_loads_into_another_precision_and_through_hooks():
    model = small_model(dtype=torch.bfloat16)
    optimizer = Fira(param_groups(model, rank=8))
    train_steps(model, optimizer, 2)
    saved = optimizer.state_dict()
    other = small_model()
    resumed = Fira(param_groups(other, rank=8))
    resumed.load_state_dict(saved)
    train_steps(other, resumed, 2)
    assert all(s["projection"].dtype == torch.float32 for s in resumed.state.values() if "projection" in s)
    resumed.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    resumed.load_state_dict(saved)
    assert not resumed.state
    for group in saved["param_groups"]:
        del group["alpha_mode"]  # as if saved before there was this option
    optimizer.load_state_dict(saved)
    train_steps(model, optimizer, 1)


def test_no_gradient_no_update():
    p, q = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    optimizer = Fira([p, q], rank=2, weight_decay=0.1)
    p.grad = torch.randn(4, 8)
    optimizer.step()
    assert torch.equal(q, torch.ones(4, 8)) and q not in optimizer.state and not torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_backward_is_the_step_without_the_gradients(dtype):
    options = {"lr": 0.01, "weight_decay": 0.1}
    plain, layerwise = small_model(dtype=dtype), small_model(dtype=dtype)
    a, b = (Fira(param_groups(model, 8, update_proj_gap=3), **options) for model in (plain, layerwise))
    handles = b.step_in_backward()
    alive, most = set(), []

    def count(p):
        alive.discard(p) if p.grad is None else alive.add(p)
        most.append(sum(q.grad.nbytes for q in layerwise.parameters() if q.grad is not None))

    for p in layerwise.parameters():
        p.register_post_accumulate_grad_hook(count)
    for step in range(7):
        train_steps(plain, a, 1, seed=step)
        train_steps(layerwise, b, 1, seed=step)
        if step == 3:  # the hooks act on what the state and the groups are now
            a.load_state_dict(a.state_dict()), b.load_state_dict(b.state_dict())
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 0.02
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), layerwise.parameters()))
    assert not alive and max(most) == 0  # each is gone before the next is there
    for handle in handles:
        handle.remove()
    before = copy.deepcopy(layerwise)
    layerwise(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), layerwise.parameters()))


def test_a_step_in_backward_is_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="averaged"):
        Fira([nn.Parameter(torch.ones(3))]).step_in_backward()


def test_maximize_ascends():
    for rank in (3, None):
        ends = []
        for sign, maximize in ((1, False), (-1, True)):
            p = nn.Parameter(torch.zeros(8, 20))
            optimizer = Fira([p], rank=rank, maximize=maximize, update_proj_gap=2, weight_decay=0.1)
            for G in random_gradients((8, 20), 5, torch.float32):
                p.grad = sign * G
                optimizer.step()
            ends.append(p.detach())
        torch.testing.assert_close(*ends)


def test_it_behaves_as_a_torch_optimizer():
    model = small_model()
    optimizer = Fira(param_groups(model, rank=8), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1e-3)
    before = copy.deepcopy(model.state_dict())
    train_steps(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))  # lr 0
    scheduler.step()
    train_steps(model, optimizer, 1)
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())

    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    tokens = torch.randint(61, (2, 17))

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return loss

    assert math.isfinite(optimizer.step(closure).item()) and calls == ["pre", "closure", "post"]

    optimizer.zero_grad()  # a deepcopy has none
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train_steps(model, optimizer, 3), train_steps(twin, twin_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))

    extra = nn.Parameter(torch.ones(6, 6))
    optimizer.add_param_group({"params": [extra], "rank": 2, "lr": 0.1})
    assert optimizer.param_groups[-1]["alpha"] == 0.25
    extra.grad = torch.randn(6, 6)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(6, 6))
    with pytest.raises(ValueError, match="rank=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "rank": -1})
    assert optimizer.param_groups[-1]["params"][0] is extra
    assert "Fira" in repr(optimizer)


def test_grad_scaler_skips_a_step_that_overflowed():
    p = nn.Parameter(torch.ones(8, 20))
    optimizer, scaler = Fira([p], rank=3, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
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

    trajectories, plain = [], fira.fira_update
    for backend in (None, count, "aot_eager"):  # the last one takes the operators that change W apart
        if backend:
            compiled = torch.compile(plain, backend=backend, fullgraph=True)
            monkeypatch.setattr(fira, "fira_update", compiled)
        p = nn.Parameter(torch.zeros(8, 20))
        optimizer = Fira([p], rank=3, update_proj_gap=5)
        step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        for i, G in enumerate(gradients):
            p.grad, optimizer.param_groups[0]["lr"] = G, 0.01 / (i + 1)
            step()
        trajectories.append(p.detach())
    torch.testing.assert_close(trajectories[1], trajectories[0])
    torch.testing.assert_close(trajectories[2], trajectories[0])
    assert len(graphs) == 1


def test_two_copies_of_the_file_live_in_one_process():
    """The installed one and one in somebody's project; both register the operator for torch.compile."""
    spec = importlib.util.spec_from_file_location("another_fira", ROOT / "fira.py")
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    p = nn.Parameter(torch.zeros(8, 20))
    p.grad = torch.ones_like(p)
    another.Fira([p], rank=3).step()
    assert (p < 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"alpha": 0.0}, "alpha"),
        ({"gamma": 0.5}, "gamma"),
        ({"gamma": math.inf}, "gamma"),
        ({"scaling": "row"}, "scaling"),
        ({"proj_type": "up"}, "proj_type"),
        ({"proj_method": "qr"}, "proj_method"),
        ({"moments": "drop"}, "moments"),
        ({"spread": 1}, "spread"),
        ({"alpha_mode": "new"}, "alpha_mode"),
        ({"only_scaling": True, "scaling": None}, "only_scaling"),
        ({"only_scaling": "False"}, "only_scaling"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Fira([nn.Parameter(torch.ones(4, 8))], **({"rank": 2} | options))


def test_bad_parameters_and_gradients_are_refused():
    sharded = nn.Parameter(torch.ones(4, 8))
    sharded.placements = ()  # as a DTensor has
    with pytest.raises(ValueError, match="whole matrices: use DistributedDataParallel"):
        Fira([sharded], rank=2)
    with pytest.raises(ValueError, match=r"\(8,\)"):
        Fira([nn.Parameter(torch.ones(8))], rank=2)
    with pytest.raises(ValueError, match="complex"):
        Fira([nn.Parameter(torch.ones(4, 8, dtype=torch.complex64))], rank=2)
    with pytest.raises(ValueError, match="complex"):
        Fira([nn.Parameter(torch.ones(4, 8, dtype=torch.complex64))])
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Fira(embedding.parameters()).step()
    with pytest.raises(ValueError, match="ModuleList"):
        param_groups(nn.Embedding(4, 4), rank=2)
    with pytest.raises(ValueError, match="no option scale"):
        param_groups(small_model(), rank=2, scale=0.25)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("proj_method", fira.CHOICES["proj_method"])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(bad, proj_method):
    good, sick = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(5, 9))
    optimizer = Fira([{"params": [good]}, {"params": [sick]}], rank=2, proj_method=proj_method)
    good.grad, sick.grad = torch.randn(4, 8), torch.randn(5, 9)
    sick.grad[2, 3] = bad
    with pytest.raises(FloatingPointError, match=r"not finite in step 1.*shape \(5, 9\) in group 1"):
        optimizer.step()
    assert torch.equal(good, torch.ones(4, 8)) and torch.equal(sick, torch.ones(5, 9))


def test_param_groups_of_a_transformer():
    model = small_model()
    matrices, others, vectors = param_groups(model, rank=8, alpha=0.5)
    assert len(matrices["params"]) == 2 * 7 and matrices["rank"] == 8 and matrices["alpha"] == 0.5
    assert {id(p) for p in others["params"]} == {id(model.embedding.weight), id(model.head.weight)}
    assert all(p.dim() == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0.0
    gpt2 = small_model("gpt2")
    groups = param_groups(gpt2, rank=8)
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in gpt2.parameters())
    assert len(groups[1]["params"]) == 2  # the head is the embedding, and the positions


def random_tokens():
    return torch.randint(61, (24, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_hugging_face_trainer_resumes_bit_for_bit(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    size = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config, matrices = transformers.LlamaConfig(**size, **special, intermediate_size=80), 2 * 7
    else:
        config, matrices = transformers.GPT2Config(**size, **special, n_positions=16), 2 * 4
    ends = []
    for checkpoint in (None, tmp_path / "checkpoint-4"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if checkpoint:  # or a run from scratch would pass
            torch.nn.utils.vector_to_parameters(torch.zeros(10**6), model.parameters())
        optimizer = Fira(param_groups(model, rank=8, update_proj_gap=3), lr=1e-2)
        assert [len(g["params"]) for g in optimizer.param_groups[:2]] == [matrices, 2]  # GPT-2's head is tied
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=8, save_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[]
        )
        data = [{"input_ids": tokens, "labels": tokens} for tokens in random_tokens()[:, :16]]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append(model)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters()))
    torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)


def test_lightning_resumes_bit_for_bit(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def training_step(self, batch, _):
            return self.model(batch[:, :-1], batch[:, 1:])

        def configure_optimizers(self):
            return Fira(param_groups(self, rank=8, update_proj_gap=3), lr=1e-2)

    ends = []
    for checkpoint in (None, tmp_path / "step=6.ckpt"):
        keep = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, enable_version_counter=False
        )
        trainer = lightning.Trainer(
            max_steps=12, accelerator="cpu", logger=False, callbacks=keep, gradient_clip_val=1.0
        )
        ends.append(Lit())
        if checkpoint:
            torch.nn.utils.vector_to_parameters(torch.zeros(10**6), ends[-1].parameters())
        trainer.fit(ends[-1], torch.utils.data.DataLoader(random_tokens(), batch_size=4), ckpt_path=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].parameters(), ends[1].parameters()))


# The model


def test_sizes_are_those_of_the_paper_and_of_gpt2():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in Transformer(ModelConfig.preset(name, 32000, 256)).parameters())
            for name in ("60m", "130m", "350m", "1b")
        }
        gpt2 = Transformer(ModelConfig.preset("gpt2", 50257, 1024))
    # 2 V d + L (4 d² + 3 d f) + (2 L + 1) d
    assert counts == {"60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752}
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808  # the published GPT-2 small


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_token_sees_the_ones_after_it(kind):
    model, tokens = small_model(kind), torch.randint(61, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (tokens[:, 9] + 1) % 61
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]).item(), math.log(61), rtol=0.05, atol=0)


def test_rotary_attention_depends_on_distances_only():
    model = small_model()
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8)
    from model import rotate

    scores = (rotate(q, model.cos, model.sin) @ rotate(k, model.cos, model.sin).mT)[0, 0]
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[5, 5], scores[5, 2])


def test_lora_starts_as_the_same_function_and_freezes_the_blocks():
    model, tokens = small_model(), torch.randint(61, (2, 16))
    before = model(tokens)
    add_lora(model, rank=4)
    assert torch.equal(before, model(tokens))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * 7 and all("linear.weight" in name for name in frozen)
    groups = param_groups(model, rank=None)
    train_steps(model, Fira(groups, lr=0.01), 3)
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    assert not torch.allclose(before, model(tokens))
    layer = model.blocks[0].mlp.down
    x = torch.randn(3, 80)
    torch.testing.assert_close(layer(x), x @ (layer.linear.weight + 32 / 4 * layer.B @ layer.A).T)


def uncached(model, tokens, n_new, temperature, top_k):
    """What generate does, with the whole context through the model for every token."""
    for _ in range(n_new):
        logits = model(torch.tensor([tokens]))[0, -1]
        if temperature == 0:
            tokens = [*tokens, logits.argmax().item()]
        else:
            kept, ids = (logits / temperature).topk(min(top_k, 61))
            tokens = [*tokens, ids[torch.multinomial(kept.softmax(-1), 1)].item()]
    return tokens


def wide_model(kind="llama", **options):
    """Weights large enough that the next token depends on all before it."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(61, 16, kind, 32, 80, 4, 2, **options))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


@pytest.mark.parametrize("temperature, top_k", [(0, 50), (0.7, 5), (1.5, 1000)])
@pytest.mark.parametrize("kind, options", [("llama", {}), ("gpt2", {}), ("llama", {"n_kv_heads": 2, "head_dim": 6})])
def test_generate_with_its_cache_is_sampling_without(kind, options, temperature, top_k):
    model = wide_model(kind, **options)
    torch.manual_seed(1)
    expected = uncached(model, [1, 2, 3], 13, temperature, top_k)
    torch.manual_seed(1)
    assert list(model.generate(torch.tensor([1, 2, 3]), 13, temperature, top_k)) == expected[3:]
    assert len(set(expected)) > 3
    torch.manual_seed(1)
    assert list(model.generate([60] * 9 + [1, 2, 3], 0, temperature, top_k)) == []


def test_generate_goes_past_the_context_at_a_bounded_cost(monkeypatch):
    model, calls, plain = wide_model(), [], Transformer.forward

    def counted(self, tokens, **options):
        calls.append(tokens.tolist()[0])
        return plain(self, tokens, **options)

    prompt, written = list(range(20)), []
    monkeypatch.setattr(Transformer, "forward", counted)
    for i, token in enumerate(model.generate(prompt, 40, temperature=0)):
        assert len(calls) == i + 1  # each as soon as it is there
        written.append(token)
    assert torch.is_grad_enabled() and len(written) == 40 and not any(isinstance(t, torch.Tensor) for t in written)
    assert calls[0] == prompt[-16:]
    again = [i for i, call in enumerate(calls) if len(call) > 1]
    assert again == [0, 1, 9, 17, 25, 33] and all(len(calls[i]) == 9 for i in again[1:])
    monkeypatch.undo()
    for i in again:  # where the cache is new, the tokens are those of the model on what it was filled from
        assert written[i] == model(torch.tensor([calls[i]]))[0, -1].argmax()
    with pytest.raises(ValueError, match="needs a token"):
        next(model.generate([], 1))
    short = Transformer(ModelConfig(61, 1))
    assert len(list(short.generate([1, 2], 5))) == 5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_computes_the_same_from_less_memory(kind):
    model, tokens = small_model(kind), torch.randint(61, (4, 17))
    gradients, held = [], []
    for model.checkpointing in (False, True):
        saved = {}
        saved = {}

        def keep(x, saved=saved):
            saved[x.data_ptr()] = x.nbytes
            return x

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        held.append(sum(saved.values()) - sum(p.nbytes for p in model.parameters() if p.data_ptr() in saved))
        loss.backward()
        gradients.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert held[1] < held[0] / 2
    assert len(list(model.generate([1], 20))) == 20


# Hugging Face checkpoints


LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": 0}
CHECKPOINTS = {
    "llama": LLAMA,
    "grouped": LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "one_kv_head": LLAMA | {"num_key_value_heads": 1, "head_dim": 6},
    "theta": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2},
    "gpt2_wide": GPT2 | {"n_inner": 48, "activation_function": "gelu_pytorch_tanh"},
}


@pytest.fixture
def theirs(tmp_path):
    """A function: transformers' model with random weights, as it saves it to tmp_path / "hf"."""
    transformers = pytest.importorskip("transformers")

    def make(name="llama", dtype=torch.float32, base=False):
        cls = transformers.GPT2Config if "gpt2" in name else transformers.LlamaConfig
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(cls(**CHECKPOINTS[name]))
        for p in model.parameters():  # biases and norms too
            p.data = (0.3 * torch.randn(p.shape)).to(dtype).float()
        rounded = copy.deepcopy(model.base_model if base else model).to(dtype)  # rounds the rotary frequencies too
        rounded.save_pretrained(tmp_path / "hf")
        return model.eval()

    return make


def assert_same_logits(ours, theirs):
    tokens = torch.randint(61, (3, ours.config.block_size), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_pretrained_model_computes_what_transformers_does(theirs, tmp_path, name, dtype):
    expected = theirs(name, dtype)
    model = load_pretrained(tmp_path / "hf")
    assert model.config.block_size == 24 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_logits(model, expected)
    assert_same_logits(load_pretrained(str(tmp_path / "hf"), block_size=10), expected)
    kept = load_pretrained(tmp_path / "hf", dtype=None)
    assert {p.dtype for p in kept.parameters()} == {dtype}
    assert all(torch.equal(a.float(), b) for a, b in zip(kept.parameters(), model.parameters()))
    assert (model.head.weight is model.embedding.weight) == expected.config.tie_word_embeddings
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # trainable, and the file stays as it is
    Fira(param_groups(model, rank=4), lr=0.1).step()
    assert_same_logits(load_pretrained(tmp_path / "hf"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_loads_what_export_writes(theirs, tmp_path, name, dtype):
    transformers = pytest.importorskip("transformers")
    theirs(name, dtype)
    model = load_pretrained(tmp_path / "hf", block_size=12, dtype=None)
    export(model, tmp_path / "out", end_of_text=7)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype and again.config.eos_token_id == again.config.bos_token_id == 7
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert original.keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in original.items())
    assert_same_logits(model.float(), again.float())
    assert load_pretrained(tmp_path / "out", block_size=12).config == model.config


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_trained_model_and_its_lora_are_exported(tmp_path, kind):
    model, tokens = wide_model(kind, tied=kind == "llama"), torch.randint(61, (2, 16))
    export(model, tmp_path / "plain")
    again = load_pretrained(tmp_path / "plain")
    assert again.config == model.config and torch.equal(again(tokens), model(tokens))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    add_lora(model, rank=4)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    export(model, tmp_path / "plain")  # over the other
    torch.testing.assert_close(load_pretrained(tmp_path / "plain")(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(again(tokens), model(tokens), rtol=0.1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="no place"):
        export(wide_model("gpt2", n_kv_heads=2), tmp_path / "grouped")
    assert not (tmp_path / "grouped").exists()


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    export(small_model(), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(number):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        export(wide_model("gpt2"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def refuses(folder, says, **options):
    with pytest.raises(ValueError) as error:
        load_pretrained(folder, **options)
    message = str(error.value)
    assert says in message and str(folder) in message and "\n" not in message and len(message) < 500, message


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("llama", {"model_type": "mistral"}, "model_type 'mistral'"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSeq"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling {'type': 'linear'"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters {'rope_type': 'll"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters [1]"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
        ("llama", {"sliding_window": 8}, "sliding_window 8"),
        ("llama", {"auto_map": {"AutoModel": "x"}}, "auto_map"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder True"),
        ("llama", {"hidden_size": "32"}, "hidden_size is '32'"),
        ("llama", {"hidden_size": 32.0}, "hidden_size is 32.0"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1"),
        ("llama", {"vocab_size": True}, "vocab_size is True"),
        ("llama", {"hidden_size": None}, "hidden_size is None"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ("llama", {"num_attention_heads": 5}, "5 heads"),
        ("llama", {"num_key_value_heads": 3}, "3 key and value heads"),
        ("llama", {"head_dim": 7}, "heads of 7"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
        ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("gpt2", {"n_layer": 3}, "lacks 'transformer.h.2.attn.c_attn.bias' and 11 more"),
        ("gpt2", {"n_layer": 1}, "has the unknown 'transformer.h.1"),
        ("gpt2", {"n_inner": None}, "not floating [32, 128]"),
        ("gpt2", {"tie_word_embeddings": False}, "lacks 'lm_head.weight'"),
    ],
    ids=str,
)
def test_a_model_that_would_compute_something_else_is_refused(tmp_path, kind, change, says):
    export(small_model(kind), tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    load_pretrained(tmp_path)
    path.write_text(json.dumps(fields | change))
    refuses(tmp_path, says)


def test_fields_are_read_as_old_and_new_files_write_them(tmp_path):
    export(small_model(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, theta in (
        ({"rope_theta": 500}, 500),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.0}, 7),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9),
        ({"attention_dropout": 0.1, "num_key_value_heads": None, "pretraining_tp": 2, "use_cache": False}, 10000),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        assert load_pretrained(tmp_path).config.rope_theta == theta
    for field in ("rope_theta", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "mlp_bias"):
        del fields[field]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_pretrained(tmp_path).config == small_model().config
    del fields["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refuses(tmp_path, "has no hidden_size")
    for damaged in (b"{", b"\xff\xfe", b"[" * 100_000, b"", b"[]"):
        (tmp_path / "config.json").write_bytes(damaged)
        refuses(tmp_path, "config.json")


def split_file(path):
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join_file(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_damaged_file_is_refused(tmp_path):
    export(small_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    header, data = split_file(path)
    join_file(path, json.dumps(header).encode() + b"   ", data)  # a header of an odd length is not an error
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_pretrained(tmp_path)(tokens), small_model()(tokens))
    for cut in (0, 1, 7, 8, 9, 100, len(good) - len(data), len(good) - 1):
        path.write_bytes(good[:cut])
        refuses(tmp_path, "is damaged")
    for length in (0, 1, len(good), len(good) - 7, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + good[8:])
        refuses(tmp_path, "is damaged: its header")
    path.write_bytes(good + b"x")
    refuses(tmp_path, "bytes after the last tensor")
    for text in (b"{}}", b"[]", b'"ab"', b"\xff\xff", b"[" * 100_000, b'{"a": 1}', b'{"a": {}}', b'{"a": null}'):
        join_file(path, text, data)
        refuses(tmp_path, "the header is not that of a safetensors file")
    join_file(path, json.dumps(header).encode()[:-1] + b', "model.norm.weight": 1}', data)
    refuses(tmp_path, "a name is there twice")

    first, second = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"  # (61, 32) and (32,)
    assert [entry["data_offsets"][1] for entry in (header[first], header[second])] == [7808, 7936]
    for name, change, says in (
        (second, {"data_offsets": [7808, 10**12]}, "do not fit"),
        (second, {"data_offsets": [0, 128]}, "do not fit"),  # over the first
        (second, {"data_offsets": [7936, 7808]}, "do not fit"),
        (second, {"data_offsets": [-128, 0]}, "safetensors file"),
        (second, {"data_offsets": [7808.0, 7936.0]}, "safetensors file"),
        (second, {"data_offsets": [7808]}, "safetensors file"),
        (second, {"data_offsets": "ab"}, "safetensors file"),
        (second, {"data_offsets": None}, "safetensors file"),
        (second, {"shape": [33]}, "do not fit"),
        (second, {"shape": [True, 32]}, "safetensors file"),
        (second, {"shape": [-32]}, "safetensors file"),
        (second, {"shape": [32, 1]}, "[32, 1], not floating [32]"),
        (second, {"shape": 32}, "safetensors file"),
        (first, {"shape": [32, 61]}, "[32, 61], not floating [61, 32]"),
        (second, {"dtype": "F16"}, "do not fit"),
        (second, {"dtype": "I32"}, "torch.int32 [32], not floating"),
        (second, {"dtype": "F8_E4M3"}, "the dtype 'F8_E4M3'"),
        (second, {"dtype": ["F32"]}, "safetensors file"),
    ):
        join_file(path, header | {name: header[name] | change}, data)
        refuses(tmp_path, says)
    join_file(path, {n: e for n, e in header.items() if n != second}, data)  # a gap
    refuses(tmp_path, "do not fit")
    join_file(path, {n.replace(second, "model.extra"): e for n, e in header.items()}, data)
    refuses(tmp_path, f"lacks {second!r}")
    join_file(path, header | {"model.extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}}, data)
    refuses(tmp_path, "has the unknown 'model.extra'")
    join_file(path, header | {"norm.weight": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}}, data)
    refuses(tmp_path, "with its prefix and without")


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_names_without_prefix_and_the_buffers_of_old_files(theirs, tmp_path, name):
    expected, path = theirs(name, base=True), tmp_path / "hf" / "model.safetensors"
    header, data = split_file(path)
    assert not any(key.startswith(("model.", "transformer.")) for key in header)
    assert_same_logits(load_pretrained(tmp_path / "hf"), expected)
    for buffer in ("h.0.attn.bias", "h.1.attn.masked_bias", "layers.0.self_attn.rotary_emb.inv_freq"):
        header[buffer] = {"dtype": "U8", "shape": [1, 1, 2], "data_offsets": [len(data), len(data) + 2]}
        data += b"\1\0"
    join_file(path, header, data)
    assert_same_logits(load_pretrained(tmp_path / "hf"), expected)
    embedding = expected.get_input_embeddings().weight.detach().numpy().tobytes()
    for head, same in ((embedding, True), (bytes(len(embedding)), False)):  # some files hold a tied head
        entry = {"dtype": "F32", "shape": [61, 32], "data_offsets": [len(data), len(data) + len(head)]}
        join_file(path, header | {"lm_head.weight": entry}, data + head)
        if same:
            assert_same_logits(load_pretrained(tmp_path / "hf"), expected)
        else:
            refuses(tmp_path / "hf", "lm_head.weight is not the embedding")


def test_what_is_not_one_whole_checkpoint_is_refused(tmp_path):
    refuses(tmp_path / "nothing", "no config.json")
    export(small_model(), tmp_path)
    refuses(tmp_path, "a context of 17 tokens", block_size=17)
    refuses(tmp_path, "a context of 0 tokens", block_size=0)
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, "no model.safetensors in")
    (tmp_path / "pytorch_model.bin").touch()
    refuses(tmp_path, "but pytorch_model.bin")
    (tmp_path / "model.safetensors.index.json").touch()
    refuses(tmp_path, "but model.safetensors.index.json")


# The data

UNICODE = "naïve café — 你好，世界。🙂‍↔️ e\u0301\r\n\ttabs  and   spaces \u2003\u00a0x\x1c\n\n'll 've don't 12345 <|endoftext|>\n"
TOKENIZERS = [
    "bytes",
    "tiny.tiktoken",
    pytest.param(
        "gpt2-file", marks=pytest.mark.skipif(not SHARED.exists(), reason="no GPT-2 vocabulary beside the project")
    ),
]


def tokenizer_argument(name):
    return str(SHARED / "r50k_base.tiktoken") if name == "gpt2-file" else name


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run the scripts in, with a text of some 60 kB."""
    monkeypatch.chdir(tmp_path)
    text = "".join((ROOT / name).read_text() for name in ("fira.py", "model.py", "train.py", "prepare_data.py"))
    Path("text.txt").write_text(text)
    yield tmp_path
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def fails(module, *arguments, says):
    """Run a script's main; it must stop with one line that holds `says`. Returns the line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            module.main()
    line = str(stopped.value.code)
    assert line.startswith("error: ") and "\n" not in line.strip() and says in line, line
    return line


def runs(module, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()


def decoded(name, split):
    meta, train, val = prepare_data.load(name)
    return prepare_data.get_encoding(meta["tokenizer"]).decode_bytes((train if split == "train" else val).tolist())


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_text_comes_back_exactly_and_is_tokenized_as_a_whole(workplace, monkeypatch, tokenizer):
    content = (UNICODE * 400).encode()
    Path("uni.txt").write_bytes(content)
    tiny_ranks("tiny.tiktoken")
    monkeypatch.setattr(prepare_data, "PIECE", 1000)  # so that there are many pieces, cut within characters
    runs(prepare_data, "uni.txt", "--tokenizer", tokenizer_argument(tokenizer))
    assert decoded("uni", "train") + decoded("uni", "val") == content
    meta, train, val = prepare_data.load("uni")
    encoding = prepare_data.get_encoding(meta["tokenizer"])
    for split, tokens in (("train", train), ("val", val)):
        assert tokens.tolist() == encoding.encode_ordinary(decoded("uni", split).decode())
        assert meta[f"{split}_bytes"] == len(decoded("uni", split)) and meta[f"{split}_tokens"] == len(tokens)
    assert 0.08 < meta["val_bytes"] / len(content) <= 0.1 and decoded("uni", "train").endswith(b"\n")
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == {"bytes": 257, "tiny.tiktoken": 267}.get(
        tokenizer, 50257
    )


def test_one_long_line_is_split_between_characters(workplace):
    Path("line.txt").write_text("你好" * 5000, encoding="utf-8")
    runs(prepare_data, "line.txt")
    assert (decoded("line", "train") + decoded("line", "val")).decode() == "你好" * 5000
    decoded("line", "train").decode()


class Hub(BaseHTTPRequestHandler):
    """Serves server.files as a hub of data sets does. Each request takes the next of server.plan: "" is good,
    a number an HTTP status, the rest is named below; after the last all is good."""

    def do_GET(self):
        server, wanted = self.server, self.headers["Range"]
        plan = server.plan.pop(0) if server.plan else ""
        server.log.append((self.path, wanted, plan))
        if isinstance(plan, int):
            return self.send_error(plan)
        if plan == "redirect":
            self.send_response(302)
            self.send_header("Location", "/cdn/%2e%2e/evil.txt")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if (content := server.files.get(self.path.replace("/cdn/%2e%2e/evil.txt", "/a"))) is None:
            return self.send_error(404)
        etag = server.etag or '"' + hashlib.sha256(content).hexdigest() + '"'
        ranged = wanted and plan != "no range" and self.headers["If-Range"] == etag or plan == "wrong part"
        start = int(wanted[6:-1]) if ranged else 0
        if start >= len(content):
            return self.send_error(416)
        start -= plan == "wrong part"
        body = content[start:]
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", len(body) + 100 * (plan == "wrong length"))
        self.send_header("Content-Disposition", 'attachment; filename="../../evil.txt"')
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if plan == "cut" else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(workplace, monkeypatch):
    """A server of this machine instead of the network, where tests put what it serves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.plan, server.log, server.etag = {}, [], [], None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(prepare_data, "WAITS", (0,) * 5)
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    server.server_close()


ONE = bytes(range(256)) * 400


def fetched(hub, *plan, path=Path("data/.downloads/mine.bin"), **options):
    hub.log.clear()
    hub.plan[:] = plan
    prepare_data.download(hub.url + "/a", path, **options)
    return path.read_bytes()


def test_a_download_goes_on_where_it_broke_off(hub):
    hub.files["/a"] = ONE
    assert fetched(hub, "cut", "cut", 500, 429) == ONE
    half, three_quarters = len(ONE) // 2, len(ONE) * 3 // 4
    assert [wanted for _, wanted, _ in hub.log] == [None, f"bytes={half}-"] + [f"bytes={three_quarters}-"] * 3
    assert os.listdir("data/.downloads") == ["mine.bin"]
    assert fetched(hub, 404) == ONE and not hub.log  # nothing is fetched twice
    # After a kill the next process goes on, after a kill just before the last rename too:
    for end in (1000, len(ONE)):
        Path("data/.downloads/mine.bin").unlink()
        Path("data/.downloads/mine.bin.part").write_bytes(ONE[:end])
        Path("data/.downloads/mine.bin.etag").write_text('"' + hashlib.sha256(ONE).hexdigest() + '"')
        assert fetched(hub) == ONE and hub.log[0][1] == f"bytes={end}-"


@pytest.mark.parametrize("plan", ["no range", "changed", "weak etag", "wrong part"])
def test_a_download_never_glues_two_versions(hub, plan):
    hub.files["/a"], hub.etag = ONE, 'W/"1"' if plan == "weak etag" else None
    hub.plan[:] = ["cut", *[404] * 9]
    with pytest.raises(prepare_data.InputError, match="404"):
        fetched(hub, "cut", 404)
    assert os.path.getsize("data/.downloads/mine.bin.part") == len(ONE) // 2
    if plan in ("changed", "weak etag"):
        hub.files["/a"] = ONE[::-1]
    assert fetched(hub, "" if plan in ("changed", "weak etag") else plan) == hub.files["/a"]


@pytest.mark.parametrize(
    "plan, tries, says",
    [
        ([404], 1, "404"),
        ([403], 1, "403"),
        ([500] * 9, 6, "500"),
        ([503, 429, 404], 3, "404"),
        (["wrong length"] + [404], 2, "404"),
        (["wrong length"], 6, "416|broke off"),
    ],
    ids=str,
)
def test_a_download_that_fails_is_one_line_and_nothing_is_kept(hub, plan, tries, says):
    hub.files["/a"] = ONE
    if plan == ["wrong length"]:
        plan = plan * 9
        hub.etag = 'W/"1"'  # which begins anew each time
    with pytest.raises(prepare_data.InputError, match=says) as error:
        fetched(hub, *plan)
    assert "\n" not in str(error.value) and hub.url in str(error.value) and len(hub.log) == tries
    assert not Path("data/.downloads/mine.bin").exists()


def test_a_download_without_a_server_is_one_line(hub):
    with pytest.raises(prepare_data.InputError, match="cannot download http://127.0.0.1:1/x .*refused"):
        prepare_data.download("http://127.0.0.1:1/x", Path("x"))


def test_attempts_wait_longer_each_time(hub, monkeypatch):
    waited = []
    monkeypatch.setattr(prepare_data, "WAITS", (1, 2, 4))
    monkeypatch.setattr(prepare_data.time, "sleep", waited.append)
    with pytest.raises(prepare_data.InputError):
        fetched(hub, *[500] * 9)
    assert waited == [1, 2, 4]


def test_the_wrong_content_is_not_kept_and_no_name_of_the_servers_is_used(hub):
    hub.files["/a"] = ONE
    good = hashlib.sha256(ONE).hexdigest()
    assert fetched(hub, "redirect", sha256=good) == ONE  # to another path, with a hostile file name
    assert {path.name for path in Path("..").rglob("*evil*")} == set()
    Path("data/.downloads/mine.bin").write_bytes(b"damaged since")
    assert fetched(hub, sha256=good) == ONE
    Path("data/.downloads/mine.bin").unlink()
    hub.files["/a"] = ONE[:-1]
    with pytest.raises(prepare_data.InputError, match="did not send the expected file"):
        fetched(hub, sha256=good)
    assert not list(Path("data/.downloads").glob("mine.bin*part")) and not Path("data/.downloads/mine.bin").exists()


def lines_of(texts):
    return "".join(json.dumps({"text": text, "url": "http://x/"}) + "\n" for text in texts).encode()


def test_corpora_by_name(hub, monkeypatch):
    """c4 from its shards, TinyStories from its two files, Tiny Shakespeare from one, in those formats."""
    sources = {}
    for name, (suffix, _, shards, train, val) in prepare_data.SOURCES.items():
        assert name == "shakespeare" or train.startswith("https://huggingface.co/datasets/")
        assert train.format(3).endswith({"c4": "en/c4-train.00003-of-01024.json.gz"}.get(name, "t"))
        local = [url and hub.url + "/" + url.rpartition("/")[2] for url in (train, val)]
        sources[name] = (
            suffix,
            hashlib.sha256(b"Who's there?\n" * 99).hexdigest() if not val else None,
            shards,
            *local,
        )
    monkeypatch.setattr(prepare_data, "SOURCES", sources)
    if SHARED.exists():
        real = (SHARED / "tinyshakespeare.txt").read_bytes()
        assert hashlib.sha256(real).hexdigest() == prepare_data.SHAKESPEARE_SHA256
    hub.files["/input.txt"] = b"Who's there?\n" * 99
    for i in range(3):
        hub.files[f"/c4-train.{i:05d}-of-01024.json.gz"] = gzip.compress(
            lines_of(f"shard {i} page {j}" for j in range(9))
        )
    hub.files["/c4-validation.00000-of-00008.json.gz"] = gzip.compress(lines_of(["validation", "page"]))
    hub.files["/TinyStoriesV2-GPT4-train.txt"] = b"\nOnce there\nwas.\n<|endoftext|>\nOnce more.\n<|endoftext|>\n"
    hub.files["/TinyStoriesV2-GPT4-valid.txt"] = b"At last.\n<|endoftext|>\nThe end \xc3\xa9\n<|endoftext|>"
    runs(prepare_data, "shakespeare")
    assert decoded("shakespeare", "train") + decoded("shakespeare", "val") == hub.files["/input.txt"]
    monkeypatch.setattr(prepare_data, "PIECE", 5)
    runs(prepare_data, "tinystories")
    assert decoded("tinystories", "train") == b"Once there\nwas.<|endoftext|>Once more."
    assert decoded("tinystories", "val") == "At last.<|endoftext|>The end é".encode()
    meta, train, val = prepare_data.load("tinystories")
    assert (train == 256).sum() == 1 and meta["train_bytes"] == 25 and meta["val_bytes"] == len("At last.The end é") + 1
    hub.log.clear()
    runs(prepare_data, "c4", "--shards", "2")
    assert decoded("c4", "train").decode().split("<|endoftext|>") == [
        f"shard {i} page {j}" for i in range(2) for j in range(9)
    ]
    assert decoded("c4", "val") == b"validation<|endoftext|>page" and len(hub.log) == 3
    runs(prepare_data, "c4", "--shards", "3")
    assert len(hub.log) == 4  # only the new shard
    old = prepare_data.load("c4")[0]
    fails(prepare_data, "c4", "--shards", "4", says="404")
    assert prepare_data.load("c4")[0] == old and not [name for name in os.listdir("data") if "new" in name]
    for arguments in (["c4", "--shards", "0"], ["c4", "--shards", "1025"], ["text.txt", "--shards", "2"]):
        fails(prepare_data, *arguments, says="--shards")
    assert hub.log[-1][0] == "/c4-train.00003-of-01024.json.gz"


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.json.gz", "docs.txt.gz"])
def test_json_lines_and_gzip(workplace, monkeypatch, name):
    texts = [f"{i} {UNICODE * (i % 5)}" for i in range(40)] + ["x" * 700 + " y" * 900]
    content = b"\n" + lines_of([*texts, ""]) + b" \n" if "json" in name else "".join(texts).encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    tiny_ranks("tiny.tiktoken")
    for piece in (2**20, 1000, 100):
        monkeypatch.setattr(prepare_data, "PIECE", piece)
        runs(prepare_data, name, "--tokenizer", "tiny.tiktoken")
        meta, train, val = prepare_data.load("docs")
        encoding = prepare_data.get_encoding("tiny.tiktoken")
        if "json" not in name:
            texts = [decoded("docs", "train").decode(), decoded("docs", "val").decode()]
            assert "".join(texts).encode() == content and 0.05 < len(texts[1].encode()) / len(content) <= 0.1
            splits = ([texts[0]], [texts[1]])
        else:
            splits = [text for i, text in enumerate(texts) if i % 10 != 1], texts[1::10]
        for split, tokens, documents in zip(("train", "val"), (train, val), splits):
            ids = [encoding.encode_ordinary(text) for text in documents]
            assert tokens.tolist() == list(itertools.chain(*([256 + 10] + each for each in ids)))[1:]
            assert meta[f"{split}_bytes"] == sum(len(text.encode()) for text in documents)
    assert prepare_data.ensure(name) == "docs"
    Path(name).write_bytes(Path(name).read_bytes() + gzip.compress(lines_of(["more"])))
    with pytest.raises(prepare_data.InputError, match="has changed since"):
        prepare_data.ensure(name)


def test_a_folder_may_hold_any_format(workplace):
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("plain")
    Path("mixed/b.jsonl").write_bytes(lines_of(["one", "two"]))
    Path("mixed/c.json.gz").write_bytes(gzip.compress(lines_of(["three"])))
    Path("mixed/d.txt.gz").write_bytes(gzip.compress(b"packed"))
    runs(prepare_data, "mixed", "--glob", "*")
    parts = [part for split in ("train", "val") for part in decoded("mixed", split).decode().split("<|endoftext|>")]
    assert sorted(parts) == sorted(["plain", "one", "two", "three", "packed"])


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b'{"txt": "a"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'"text"',
        b"[" * 99999,
        b'{"text": "\\ud800"}',
        b"\xff",
    ],
    ids=lambda line: str(line[:20]),
)
def test_a_bad_line_is_named(workplace, line):
    runs(prepare_data, "text.txt")
    old = prepare_data.load("text")[0]
    Path("text.jsonl").write_bytes(lines_of(["a"] * 20) + b"\n" + line + b"\n" + lines_of(["b"]))
    fails(prepare_data, "text.jsonl", says='text.jsonl, line 22: this is no JSON object with a "text" string')
    assert prepare_data.load("text")[0] == old and os.listdir("data") == ["text"]


def test_damaged_gzip_is_one_line(workplace):
    good = gzip.compress(lines_of(str(i) for i in range(5000)))
    for bad in (good[:-100], good[:-1], good[:300] + b"damage" + good[306:], b"no gzip at all"):
        for name in ("bad.jsonl.gz", "bad.txt.gz"):
            Path(name).write_bytes(bad)
            fails(prepare_data, name, says=f"{name} is damaged or no gzip file")
    assert os.listdir("data") == []


def test_a_corpus_is_never_in_memory_as_a_whole(workplace, monkeypatch):
    monkeypatch.setattr(prepare_data, "PIECE", 2**14)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    texts = [f"{i} some words that are repeated, over and over\n" for i in range(60_000)]
    Path("large.txt").write_text("".join(texts))
    Path("large.jsonl.gz").write_bytes(gzip.compress(lines_of(texts), 1))
    for name in ("large.txt", "large.jsonl.gz"):
        tracemalloc.start()
        prepare_data.prepare(name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < prepare_data.load("large")[0]["train_bytes"] / 3, peak


def test_what_a_killed_preparation_left_is_removed(workplace):
    for name in (".text.new-abc", ".text2.new-abc"):
        (Path("data") / name).mkdir(parents=True)
        (Path("data") / name / "train.bin").write_bytes(b"half")
    runs(prepare_data, "text.txt")
    assert sorted(os.listdir("data")) == [".text2.new-abc", "text"]


def test_two_preparations_take_turns(workplace):
    with prepare_data.alone():
        process = subprocess.Popen([sys.executable, ROOT / "prepare_data.py", "text.txt"], cwd=workplace)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert os.listdir("data") == []
    assert process.wait(60) == 0 and decoded("text", "train")


def test_a_folder_is_split_by_file(workplace):
    texts = {f"doc {i}\n" * (i + 1) for i in range(40)}
    for i, text in enumerate(texts):
        path = Path("docs") / f"d{i % 3}" / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    Path("docs/other.rst").write_text("not this one")
    runs(prepare_data, "docs", "--glob", "*.md")
    train, val = (decoded("docs", split).decode().split("<|endoftext|>") for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts) and len(val) == 2
    first = prepare_data.load("docs")[0]["sha256"]
    runs(prepare_data, "docs", "--glob", "*.md")
    assert prepare_data.load("docs")[0]["sha256"] == first  # the same order again
    assert os.listdir("data") == ["docs"]  # and nothing left over


def test_the_standard_library_is_the_default(workplace, monkeypatch):
    files = prepare_data.stdlib_files()
    assert len(files) > 400 and not any({"test", "site-packages"} & set(path.parts[-4:]) for path in files)
    monkeypatch.setattr(prepare_data, "stdlib_files", lambda: files[:50])
    runs(prepare_data)
    assert prepare_data.load("stdlib")[0]["vocab_size"] == 257


def test_a_failure_leaves_the_old_data(workplace, monkeypatch):
    runs(prepare_data, "text.txt")
    old = prepare_data.load("text")[0]
    Path("text.txt").write_bytes(b"good line\n" * 1000 + b"\xff\xfe bad" + b"good line\n" * 5000)
    fails(prepare_data, "text.txt", says="not UTF-8 text (near byte 10000)")
    assert prepare_data.load("text")[0] == old and os.listdir("data") == ["text"]
    # A kill between the two renames that replace a data set:
    Path("data/text").rename("data/.text.old")
    assert prepare_data.load("text")[0] == old and os.listdir("data") == ["text"]


def test_an_interrupted_replacement_leaves_the_old_data(workplace, monkeypatch):
    runs(prepare_data, "text.txt")
    old, rename = prepare_data.load("text")[0], Path.rename

    def interrupted(self, target):
        if ".new-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit, match="130"):
        runs(prepare_data, "text.txt", "--tokenizer", "bytes")
    assert os.listdir("data") == ["text"] and prepare_data.load("text")[0] == old  # at once, not at the next use


def test_nothing_of_the_users_in_the_data_folder_is_replaced(workplace):
    text = Path("text.txt").read_bytes()
    for path in ("data/corpus/a.txt", "data/corpus/b.txt", "data/foo/foo.txt", "data/.hidden.txt", "corpus.txt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text)
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    fails(prepare_data, "data/corpus", says="the text lies in data/corpus")
    fails(prepare_data, "data/foo/foo.txt", says="the text lies in data/foo")
    fails(prepare_data, "corpus.txt", says="holds something else than a data set (a.txt)")
    fails(prepare_data, "data/.hidden.txt", says="cannot name a data set '.hidden'")
    fails(train_script, "--data", "data/corpus", "--steps", 1, says="the text lies in data/corpus")
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before


def test_bad_data_is_named_in_one_line(workplace):
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("1")
    Path("bad.tiktoken").write_text("not base64 at all\n")
    Path("short.tiktoken").write_text("IQ== 0\n")
    Path("docs").mkdir()
    for arguments, says in (
        (["shakespear"], "did you mean shakespeare?"),
        (["stdlb"], "did you mean stdlib?"),
        (["nowhere/at/all.txt"], "neither a file or folder"),
        (["empty.txt"], "empty.txt is empty"),
        (["one.txt"], "too short"),
        ([""], "no data ''"),
        (["docs"], "two are needed"),
        (["docs", "--glob", "/x"], "no pattern"),
        (["text.txt", "--tokenizer", "word"], "unknown tokenizer 'word'"),
        (["text.txt", "--tokenizer", "missing.tiktoken"], "missing.tiktoken"),
        (["text.txt", "--tokenizer", "bad.tiktoken"], "not in tiktoken's format"),
        (["text.txt", "--tokenizer", "short.tiktoken"], "cut short or damaged"),
    ):
        fails(prepare_data, *arguments, says=says)
    assert not Path("data").exists() or os.listdir("data") == []


def tiny_ranks(path):
    """A .tiktoken file of the 256 bytes and a few merges, so that GPT-2's pattern matters."""
    merges = [b"  ", b" a", b"ll", b"n't", b"'ll", b"\n\n", b"do", b" do", b"12", b"   "]
    lines = [
        base64.b64encode(token) + f" {rank}\n".encode()
        for rank, token in enumerate([bytes([i]) for i in range(256)] + merges)
    ]
    Path(path).write_bytes(b"".join(lines))


def test_a_tokenizer_file_that_is_gone_is_found_before_training(workplace):
    tiny_ranks("tiny.tiktoken")
    runs(prepare_data, "text.txt", "--tokenizer", "tiny.tiktoken")
    Path("tiny.tiktoken").unlink()
    fails(train_script, *SMALL, says="cannot read the tokenizer")
    assert not Path("out").exists()


def test_without_network_the_gpt2_tokenizer_tells_the_ways(workplace, monkeypatch):
    def offline(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    line = fails(prepare_data, "text.txt", "--tokenizer", "gpt2", says="TIKTOKEN_CACHE_DIR")
    assert "online" in line and "r50k_base.tiktoken" in line


@pytest.mark.skipif(not SHARED.exists(), reason="no GPT-2 vocabulary beside the project")
@pytest.mark.parametrize("way", ["cache", "online"])
def test_the_gpt2_tokenizer_comes_from_tiktokens_cache_or_the_network(workplace, monkeypatch, way):
    """tiktoken's cache names a file after the SHA-1 of its address."""
    address, asked = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken", []
    content = (SHARED / "r50k_base.tiktoken").read_bytes()
    cached = Path("cache") / hashlib.sha1(address.encode()).hexdigest()
    if way == "cache":
        cached.parent.mkdir()
        cached.write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "cache")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: asked.append(url) or content)
    runs(prepare_data, "text.txt", "--tokenizer", "gpt2")
    assert asked == ([] if way == "cache" else [address]) and cached.read_bytes() == content
    assert prepare_data.load("text")[0]["tokenizer"] == "gpt2" and prepare_data.load("text")[0]["vocab_size"] == 50257
    ids = prepare_data.get_encoding(str(SHARED / "r50k_base.tiktoken")).encode_ordinary(UNICODE)
    assert prepare_data.get_encoding("gpt2").encode_ordinary(UNICODE) == ids


# Training

SMALL = "--data text.txt --steps 40 --eval_interval 20 --block_size 32 --batch_size 4 --rank 8 --update_proj_gap 15 --device cpu".split()


def checkpoint(optimizer="fira", out="out", model="nano"):
    return torch.load(f"{out}/{model}-text-{optimizer}-seed0/ckpt.pt", weights_only=True)


def same_weights(a, b):
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
def test_a_run_learns_and_writes_what_it_says(workplace, capsys, precision):
    runs(train_script, *SMALL, "--precision", precision)
    printed = capsys.readouterr().out
    for word in ("data ", "869,760 parameters", "AdamW would hold", "perplexity", "bits per byte", "sample", "wrote"):
        assert word in printed
    folder = Path("out/nano-text-fira-seed0")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [10, 20, 30, 40]
    assert [entry["step"] for entry in log if "val_loss" in entry] == [20, 40]
    assert log[-1]["val_loss"] < log[1]["val_loss"] < math.log(257) and log[0]["loss"] > log[-1]["loss"]
    assert log[-1]["bits_per_byte"] == pytest.approx(log[-1]["val_loss"] / math.log(2), rel=1e-3)
    assert json.loads((folder / "config.json").read_text())["rank"] == 8 and (folder / "sample.txt").read_text()
    saved = checkpoint()
    assert {"model", "optimizer", "step", "config"} <= saved.keys() and saved["step"] == 40
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert all(value.dtype == dtype for value in saved["model"].values())
    state = saved["optimizer"]["state"].values()
    assert all(s[k].dtype == torch.float32 for s in state for k in ("exp_avg", "exp_avg_sq"))


def test_layerwise_trains_the_same(workplace):
    options = "--proj_method", "subspace", "--moments", "rotate", "--spread", "--update_proj_gap", "7"
    runs(train_script, *SMALL, *options)
    runs(train_script, *SMALL, *options, "--layerwise", "--out", "layerwise")
    assert same_weights(checkpoint(), checkpoint(out="layerwise"))
    group = checkpoint()["optimizer"]["param_groups"][0]
    assert (group["proj_method"], group["moments"], group["spread"]) == ("subspace", "rotate", True)


def test_checkpointing_trains_the_same(workplace, monkeypatch):
    runs(train_script, *SMALL)
    module, calls = sys.modules[Transformer.__module__], []
    recompute = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *a, **k: calls.append(1) or recompute(*a, **k))
    runs(train_script, *SMALL, "--checkpointing", "--out", "again")
    assert len(calls) >= 4 * 40 and same_weights(checkpoint(), checkpoint(out="again"))


@pytest.mark.parametrize("optimizer", train_script.METHODS)
def test_every_method_trains_and_counts_its_state(workplace, optimizer):
    runs(train_script, *SMALL, "--optimizer", optimizer)
    folder = Path(f"out/nano-text-{optimizer}-seed0")
    result = json.loads((folder / "result.json").read_text())
    assert result["val_loss"] < 4.5
    kept = [
        v
        for s in checkpoint(optimizer)["optimizer"]["state"].values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    ]
    assert sum(v.nbytes for v in kept) == result["state_bytes"]


def test_compare_prints_one_table_and_resumes(workplace):
    command = [sys.executable, ROOT / "train.py", *SMALL, "--optimizer", "fira", "adamw"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    table = json.loads(Path("out/nano-text-compare-seed0/table.json").read_text())
    assert [row["optimizer"] for row in table] == ["fira", "adamw"]
    assert {
        "val_loss",
        "perplexity",
        "bits_per_byte",
        "state_bytes",
        "peak_bytes",
        "ms_per_step",
        "optimizer_share",
    } <= table[0].keys()
    assert f"{table[1]['val_loss']:.4f}" in first.stdout.split("in optimizer\n")[-1]
    for optimizer in ("fira", "adamw"):  # the same initial weights and batches
        assert checkpoint(optimizer)["step"] == 40
    assert ("curves.png" in first.stdout) == bool(importlib.util.find_spec("matplotlib"))
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0 and json.loads(Path("out/nano-text-compare-seed0/table.json").read_text()) == table


def test_initial_weights_and_batches_are_those_of_the_seed():
    configs = [train_script.Config(optimizer=name, seed=3).resolve() for name in ("fira", "adamw", "lora")]
    models = [train_script.build(config, 257, "cpu")[0].state_dict() for config in configs]
    for name, weight in models[0].items():
        assert torch.equal(weight, models[1][name])
        assert torch.equal(weight, models[2].get(name, models[2].get(name.replace(".weight", ".linear.weight"))))
    tokens = np.arange(10_000) % 257
    a, b = (train_script.batch(tokens, config, step=5) for config in configs[:2])
    assert torch.equal(a, b) and a.shape == (1, 16, 129)
    assert not torch.equal(a, train_script.batch(tokens, configs[0], step=6))
    exact = train_script.batch(np.arange(129) % 257, configs[0], step=1)  # one window is the least
    assert torch.equal(exact[0, 0], torch.arange(129))


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    config = train_script.Config(steps=100, lr=2.0).resolve()
    rates = [train_script.learning_rate(step, config) for step in range(1, 101)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and rates[99] == pytest.approx(0.2) and max(rates) == 2.0
    assert rates[54] == pytest.approx(1.1) and all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_gradient_accumulation_is_a_larger_batch(workplace):
    losses = []
    for batch_size, grad_accum in ((8, 1), (2, 4)):
        arguments = [
            *SMALL,
            "--steps",
            "3",
            "--batch_size",
            batch_size,
            "--grad_accum",
            grad_accum,
            "--eval_interval",
            "1",
        ]
        runs(train_script, *arguments, "--out", f"out{grad_accum}")
        log = Path(f"out{grad_accum}/nano-text-fira-seed0/log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def log_lines(out):
    path = Path(out) / "nano-text-fira-seed0" / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_killed_runs_resume_bit_for_bit(workplace, precision):
    flags = [*SMALL, "--steps", "200", "--eval_interval", "50", "--precision", precision]
    runs(train_script, *flags, "--out", "straight")
    process = start(*flags, "--out", "broken")
    wait_for(lambda: log_lines("broken") >= 2, process)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == 130 and "--resume" in printed.splitlines()[-1]
    stopped_at = checkpoint(out="broken")["step"]
    assert 20 <= stopped_at < 200
    process = start(*flags, "--out", "broken", "--resume")
    wait_for(lambda: checkpoint(out="broken")["step"] >= 100 and log_lines("broken") >= 12, process)
    process.kill()
    process.communicate()
    assert 100 <= checkpoint(out="broken")["step"] < 200
    with open("broken/nano-text-fira-seed0/log.jsonl", "a") as file:
        file.write('{"step": 19')  # half a line, as a kill can leave
    runs(train_script, *flags, "--out", "broken", "--resume")
    straight, broken = checkpoint(out="straight"), checkpoint(out="broken")
    assert broken["step"] == 200 and same_weights(straight, broken)
    for a, b in zip(straight["optimizer"]["state"].values(), broken["optimizer"]["state"].values()):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    losses = [
        {
            entry["step"]: entry["val_loss"]
            for entry in map(json.loads, path.read_text().splitlines())
            if "val_loss" in entry
        }
        for path in (Path("straight/nano-text-fira-seed0/log.jsonl"), Path("broken/nano-text-fira-seed0/log.jsonl"))
    ]
    assert losses[0] == losses[1] and sorted(losses[0]) == [50, 100, 150, 200]
    log = Path("broken/nano-text-fira-seed0/log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == sorted(set(steps))  # what the killed process wrote after its last checkpoint is gone


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    train_script.write(path, {"step": 1})

    def half(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError):
        train_script.write(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_two_processes_train_as_one(workplace):
    """Up to the second change of the subspaces, which amplifies what rounding differs; rank 0 alone writes.

    Adam amplifies it, too, where a gradient is nearly zero, so one weight in 10,000 may differ by more.
    """
    options = [*SMALL, "--steps", "20", "--grad_accum", "2", "--eval_interval", "10"]
    runs(train_script, *options, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done       20 steps") == 1
    one, two = checkpoint(out="one"), checkpoint()
    for name, value in one["model"].items():
        difference = (two["model"][name] - value).abs()
        assert (difference > 2e-4).float().mean() < 1e-4 and difference.mean() < 1e-5
    losses = [[entry["loss"] for entry in saved["log"]] for saved in (one, two)]
    assert len(losses[1]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-4)
    wrong = subprocess.run([*command, *options, "--batch_size", "3"], capture_output=True, text=True)
    assert wrong.returncode and "error: --batch_size 3 must be a multiple of the 2 processes" in wrong.stderr


def replica(rank, folder):
    """One of two processes that train a model on different data; all weights must be the same in both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for proj_method in fira.CHOICES["proj_method"]:
        model = small_model()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = Fira(param_groups(model, 8, update_proj_gap=30, proj_method=proj_method), lr=0.01)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(200):
            tokens = torch.randint(61, (2, 17), generator=generator)
            parallel(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        for p in model.parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            torch.distributed.all_gather(both, p.detach())
            assert torch.equal(*both), proj_method
    os._exit(0)  # torch can hang where it takes the group down while another thread still ends the last gather


def test_replicas_stay_the_same_bit_for_bit(tmp_path):
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)


def test_a_second_run_keeps_the_first(workplace):
    runs(train_script, *SMALL)
    first = checkpoint()
    runs(train_script, *SMALL, "--lr", "0.001")
    assert not same_weights(first, checkpoint())
    kept = torch.load("out/nano-text-fira-seed0-earlier1/ckpt.pt", weights_only=True)
    assert same_weights(first, kept)
    runs(train_script, *SMALL, "--steps", "1")
    assert sorted(os.listdir("out")) == [f"nano-text-fira-seed0{end}" for end in ("", "-earlier1", "-earlier2")]


def test_sampling_from_a_checkpoint(workplace, capsys):
    runs(train_script, *SMALL)
    capsys.readouterr()
    runs(train_script, *SMALL, "--sample", "def main(")
    once = capsys.readouterr().out
    runs(train_script, *SMALL, "--sample", "def main(")
    assert once.startswith("def main(") and len(once) > 200 and capsys.readouterr().out == once


@pytest.mark.parametrize("optimizer", ["fira", "lora"])
def test_fine_tuning_goes_on_from_an_exported_model(workplace, capsys, optimizer):
    runs(train_script, *SMALL, "--optimizer", optimizer, "--lr", "3e-3")
    before = json.loads(Path(f"out/nano-text-{optimizer}-seed0/result.json").read_text())
    runs(train_script, *SMALL, "--optimizer", optimizer, "--lr", "3e-3", "--export", "exported")
    tuning = [*SMALL, "--init_from", "exported", "--lr", "1e-6", "--optimizer", optimizer]
    runs(train_script, *tuning)
    after = json.loads(Path(f"out/exported-text-{optimizer}-seed0/result.json").read_text())
    assert after["val_loss"] == pytest.approx(before["val_loss"], abs=2e-3)
    capsys.readouterr()
    runs(train_script, "--init_from", "exported", "--sample", "def ", "--optimizer", "adamw", "--data", "text.txt")
    assert capsys.readouterr().out.startswith("def ")  # no run of this name: what was exported itself
    (workplace / "exported" / "model.safetensors").unlink()
    runs(train_script, *tuning, "--steps", "50", "--resume")  # the checkpoint has all that is needed
    assert checkpoint(optimizer, model="exported")["step"] == 50
    fails(train_script, *tuning, says="exported")  # but a new run has not


def test_what_does_not_fit_a_pretrained_model_is_one_line(workplace):
    assert train_script.Config(init_from="exported").resolve().lr == pytest.approx(1e-3)  # a tenth
    runs(train_script, *SMALL)
    runs(train_script, *SMALL, "--export", "exported")
    fails(train_script, *SMALL, "--init_from", "exported", "--model", "60m", says="--model goes without --init_from")
    fails(train_script, *SMALL, "--init_from", "nowhere", says="nowhere")
    fails(train_script, *SMALL, "--init_from", "exported", "--block_size", "999", says="context")
    tiny_ranks("tiny.tiktoken")
    runs(prepare_data, "text.txt", "--tokenizer", "tiny.tiktoken")
    fails(train_script, *SMALL, "--init_from", "exported", says="vocabulary")


def test_a_loss_that_is_not_finite_stops_the_run(workplace, monkeypatch):
    runs(train_script, *SMALL)
    plain = Transformer.forward
    calls = []

    def sick(self, tokens, targets=None):
        loss = plain(self, tokens, targets)
        if torch.is_grad_enabled():
            calls.append(1)
            return loss * math.nan if len(calls) == 27 else loss
        return loss

    monkeypatch.setattr(Transformer, "forward", sick)
    assert "step 27" in fails(train_script, *SMALL, "--optimizer", "adamw", says="the loss is nan")
    assert checkpoint("adamw")["step"] == 20 and all(
        torch.isfinite(v).all() for v in checkpoint("adamw")["model"].values()
    )
    calls.clear()
    line = fails(train_script, *SMALL, "--update_proj_gap", "13", says="step 27")  # the 27th chooses a subspace
    assert "loss is nan" in line and checkpoint()["step"] == 20


@pytest.mark.parametrize("at", [20, 27])  # 20: an evaluation, with a checkpoint
def test_weights_that_are_not_finite_are_not_saved(workplace, monkeypatch, at):
    calls, zero_grad = [], Fira.zero_grad

    def sick(self):
        calls.append(1)
        if len(calls) == at:
            self.param_groups[0]["params"][0].data[0, 0] = math.nan
        zero_grad(self)

    monkeypatch.setattr(Fira, "zero_grad", sick)
    fails(
        train_script, *SMALL, says=f"weight is not finite after step {at}" if at == 20 else "the loss is nan at step 28"
    )
    if at == 27:
        assert all(torch.isfinite(value).all() for value in checkpoint()["model"].values())
    else:
        assert not Path("out/nano-text-fira-seed0/ckpt.pt").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "60n"], "did you mean 60m?"),
        (["--optimizer", "adam"], "did you mean adamw?"),
        (["--optimizer", "fira", "glore"], "did you mean galore?"),
        (["--data", "shakespear"], "did you mean shakespeare?"),
        (["--device", "cuda:77"], "'cuda:77' is not there"),
        (["--device", "gpu"], "'gpu' is not there"),
        (["--rank", "0"], "--rank 0 must be at least 1"),
        (["--lr", "-1"], "--lr -1.0 must be at least 0"),
        (["--lr", "nan"], "--lr nan must be at least 0"),
        (["--alpha", "-1"], "alpha=-1.0"),
        (["--gamma", "0.9"], "--gamma 0.9 must be at least 1"),
        (["--steps", "0"], "--steps 0"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--block_size", "99999"], "one window needs 100000"),
        (["--resume"], "nothing to go on from"),
        (["--sample", "x"], "nothing to go on from"),
        (["--sample", "x", "--optimizer", "fira", "adamw"], "one --optimizer"),
        (["--optimizer", "fira", "adamw", "--resume"], "nothing to go on from"),
        (["--seed", "99999999999999999999999"], "must be at most"),
        (["--data", ""], "no data ''"),
        (["--layerwise", "--grad_accum", "2"], "--layerwise frees each gradient at once: it needs --grad_accum 1"),
        (["--layerwise", "--grad_clip", "1"], "no --grad_clip"),
        (["--moments", "drop"], "unknown moments 'drop'"),
    ],
    ids=" ".join,
)
def test_bad_flags_are_named_in_one_line(workplace, arguments, says):
    data = [] if "--data" in arguments else ["--data", "text.txt"]
    fails(train_script, *data, *arguments, says=says)
    assert not Path("out").exists()


def test_wrong_types_and_unknown_flags_are_one_line(workplace, capsys):
    for arguments in (["--steps", "many"], ["--stepps", "3"]):
        with pytest.raises(SystemExit) as stopped:
            train_script.parse(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        train_script.parse(["--help"])
    text = capsys.readouterr().out
    flags = """--optimizer --model --data --steps --batch_size --grad_accum --block_size --lr --warmup --rank --update_proj_gap --alpha
        --alpha_mode --gamma --weight_decay --grad_clip --seed --device --precision --compile --eval_interval --out --resume --sample"""
    assert all(f"{flag} " in text for flag in flags.split())


def test_a_checkpoint_that_does_not_fit_is_refused(workplace):
    runs(train_script, *SMALL)
    folder = Path("out/nano-text-fira-seed0")
    good = (folder / "ckpt.pt").read_bytes()
    fails(train_script, *SMALL, "--resume", "--rank", "16", says="was trained with --rank 8, not 16")
    other = folder.with_name("9m-text-fira-seed0")
    other.mkdir()
    (other / "ckpt.pt").write_bytes(good)
    fails(train_script, *SMALL, "--resume", "--model", "9m", says="--model nano, not 9m")
    middle = len(good) // 2
    for damaged in (good[:middle], b"", b"not a checkpoint", good[:middle] + bytes(1000) + good[middle + 1000 :]):
        (folder / "ckpt.pt").write_bytes(damaged)
        fails(train_script, *SMALL, "--resume", says="damaged or not a checkpoint")
        fails(train_script, *SMALL, "--sample", "x", says="damaged or not a checkpoint")
    (folder / "ckpt.pt").write_bytes(good)
    meta = json.loads(Path("data/text/meta.json").read_text())
    Path("data/text/meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    fails(train_script, *SMALL, "--resume", says="another tokenizer")
    Path("data/text/meta.json").write_text(json.dumps(meta | {"sha256": "0"}))
    fails(train_script, *SMALL, "--resume", says="another text")
    Path("data/text/meta.json").write_text(json.dumps(meta))
    assert (folder / "ckpt.pt").read_bytes() == good
    whole = checkpoint()
    for change, says in (
        ({"config": whole["config"] | {"from_the_future": 1}}, "not a checkpoint of this train.py"),
        ({"model": {"head.weight": whole["model"]["head.weight"]}}, "does not fit this model"),
        ({"optimizer": None}, "does not fit this model"),
    ):
        torch.save(whole | change, folder / "ckpt.pt")
        fails(train_script, *SMALL, "--resume", says=says)
    (folder / "ckpt.pt").write_bytes(good)
    fails(train_script, *SMALL, "--resume", "--steps", "10", says="at step 40 already")
    (folder / "log.jsonl").write_text("[1]\nnonsense\n")  # the checkpoint has the log
    runs(train_script, *SMALL, "--resume", "--steps", "60")
    assert checkpoint()["step"] == 60
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [10, 20, 30, 40, 50, 60]


def test_damaged_data_is_refused(workplace):
    runs(prepare_data, "text.txt")
    good = Path("data/text/train.bin").read_bytes()
    Path("data/text/train.bin").write_bytes(good[:-10])
    fails(train_script, *SMALL, says="run prepare_data.py again")
    Path("data/text/train.bin").write_bytes(good[:5000] + b"\xff\xff" + good[5002:])
    fails(train_script, *SMALL, says="holds the token 65535")
    Path("data/text/train.bin").write_bytes(good)
    meta = Path("data/text/meta.json").read_text()
    for damaged in ("{", "[]", "{}", meta.replace("val_bytes", "bytes")):
        Path("data/text/meta.json").write_text(damaged)
        fails(train_script, *SMALL, says="incomplete or damaged")
    Path("data/text/meta.json").write_text(meta)
    Path("data/text/val.bin").unlink()
    fails(train_script, *SMALL, says="incomplete or damaged")
    for damage in ("{", None):  # what the message advises works, whatever the damage
        Path("data/text/meta.json").write_text(damage) if damage else Path("data/text/meta.json").unlink()
        runs(prepare_data, "text.txt")
        assert decoded("text", "train") + decoded("text", "val") == Path("text.txt").read_bytes()


def test_another_or_a_changed_file_of_the_same_name_is_not_mixed_up(workplace):
    runs(train_script, *SMALL)
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text + "one more line\n")
    fails(train_script, *SMALL, says="has changed since")
    Path("text.txt").write_text(text)
    Path("sub").mkdir()
    Path("sub/text.txt").write_text("quite another text\n" * 1000)
    fails(train_script, "--data", "sub/text.txt", says="prepared from another place")
