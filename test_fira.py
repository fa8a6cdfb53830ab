"""All tests. The oracle for the optimizer is `naive_step`, a float64 transcription of the algorithm with
full-size matrices throughout, written apart from the fast code and sharing nothing with it."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fira
import prepare_data
import train as train_script
from fira import Fira, param_groups, state_bytes
from model import ModelConfig, Transformer, add_lora
from prepare_data import InputError

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


def naive_step(W, G, P, state, t, *, lr, alpha, alpha_mode, scaling, only_scaling, gamma, betas, eps=1e-8, weight_decay=0.0):
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


def oracle_run(W, gradients, rank, gap, bases, right, **options):
    """The trajectory under given bases, one for each subspace change."""
    if right:
        W, gradients = W.T, [G.T for G in gradients]
    r = min(rank, *W.shape)
    state = {"M": torch.zeros(r, W.shape[1]).double(), "V": torch.zeros(r, W.shape[1]).double(), "prev_norm": None}
    trajectory = []
    for t, G in enumerate(gradients, 1):
        P = torch.eye(W.shape[0]).double() if rank >= min(W.shape) else bases[(t - 1) // gap]
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
    options |= {"rank": 5, "proj_method": "svd", "scaling": "column", "only_scaling": False, "gamma": 1.01} | FAMILY[member]
    rank, gap = options.pop("rank"), 4
    W, gradients = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double(), random_gradients(shape, 14)
    got, bases, _ = run(W, gradients, rank, update_proj_gap=gap, **options)
    assert not torch.equal(bases[0], bases[gap]) and torch.equal(bases[0], bases[gap - 1])
    options.pop("proj_method")
    right = shape[0] >= shape[1]
    expected = oracle_run(W, gradients, rank, gap, bases[::gap], right, **options)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a - W, b - W, rtol=1e-9, atol=1e-12)
