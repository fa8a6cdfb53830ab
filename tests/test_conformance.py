"""Is `Fira` a torch optimizer? The contract that PyTorch's own optimizer tests check, for eight kinds of Fira.

Of PyTorch's list these do not apply, for Fira has no such option or promise: capturable, differentiable, foreach and
fused as options (a group without a rank is always fused), amsgrad, sparse gradients (refused), complex parameters
(refused), optimizers that need a closure, several devices.
"""

import copy
import functools
import inspect
import io
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fira import CHOICES, Fira, param_groups  # noqa: E402

VARIANTS = {
    "adamw": {},
    "fira": {"rank": 3, "update_proj_gap": 4},
    "full_rank": {"rank": 9},
    "galore": {"rank": 3, "scaling": None, "proj_method": "svd", "proj_type": "left", "update_proj_gap": 4},
    "apollo": {"rank": 2, "only_scaling": True, "proj_method": "random", "alpha": 1.0, "update_proj_gap": 3},
    "bfloat16": {"rank": 3, "update_proj_gap": 4},
    "ascent": {"rank": 3, "maximize": True, "weight_decay": 0.1, "scaling": "matrix", "gamma": None},
    "mixed": {"rank": 3, "alpha_mode": "paper", "proj_type": "reverse_std", "update_proj_gap": 2},
}
LR = 2.0**-6  # the same number in every precision
OPTIONS = set(inspect.signature(Fira).parameters) - {"params"}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Problem:
    """Two matrices and a bias that a Fira of some variant can improve."""

    def __init__(self, variant, named=False, noncontiguous=False, seed=0, **options):
        torch.manual_seed(seed)
        dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
        first, second, bias = torch.randn(10, 5, 2), torch.randn(6, 10, 2), torch.randn(6, 2)
        self.whole = [x.to(dtype) for x in (first, second, bias)]
        cut = [x[..., 0] if noncontiguous else x[..., 0].contiguous() for x in self.whole]
        self.params = [nn.Parameter(x) for x in cut]
        self.input = torch.randn(16, 5).to(dtype)  # of full rank, or singular vectors would be arbitrary
        shown = [(f"name{i}", p) for i, p in enumerate(self.params)] if named else self.params
        own = VARIANTS[variant]
        if variant == "mixed":
            groups = [shown[:1], shown[1:2], shown[2:]]
            own = [own, {"rank": 8}, {"betas": (0.8, 0.99), "weight_decay": 0.01}]
        else:
            groups, own = [shown[:2], shown[2:]], [own, {k: v for k, v in own.items() if k == "maximize"}]
        self.optimizer = Fira([{"params": g, **o} for g, o in zip(groups, own)], **{"lr": LR} | options)

    def closure(self):
        self.optimizer.zero_grad()
        first, second, bias = self.params
        loss = (torch.tanh(self.input @ first.T) @ second.T + bias).square().mean()
        loss.backward()
        return loss

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def values(self):
        return [p.detach().clone() for p in self.params]


def equal(a, b):
    """Bit for bit, of tensors in any nest of lists and dicts."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def without_names(state_dict):
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]]
    return state_dict | {"param_groups": groups}


# The update goes where it should


SCHEDULERS = {
    "StepLR": functools.partial(sched.StepLR, gamma=0.9, step_size=3),
    "MultiStepLR": functools.partial(sched.MultiStepLR, milestones=[3, 6]),
    "ConstantLR": sched.ConstantLR,
    "LinearLR": sched.LinearLR,
    "ExponentialLR": functools.partial(sched.ExponentialLR, gamma=0.9),
    "PolynomialLR": functools.partial(sched.PolynomialLR, total_iters=8),
    "CosineAnnealingLR": functools.partial(sched.CosineAnnealingLR, T_max=8),
    "CosineAnnealingWarmRestarts": functools.partial(sched.CosineAnnealingWarmRestarts, T_0=4),
    "LambdaLR": functools.partial(sched.LambdaLR, lr_lambda=lambda t: 0.95**t),
    "MultiplicativeLR": functools.partial(sched.MultiplicativeLR, lr_lambda=lambda t: 0.95),
    "CyclicLR": functools.partial(sched.CyclicLR, base_lr=LR / 8, max_lr=LR, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": functools.partial(sched.OneCycleLR, max_lr=LR, total_steps=20),  # cycles the momentum too
    "ReduceLROnPlateau": functools.partial(sched.ReduceLROnPlateau, patience=1, threshold=1e9),
    "Sequential": lambda o: sched.SequentialLR(o, [sched.ConstantLR(o), sched.ExponentialLR(o, 0.9)], milestones=[4]),
    "Chained": lambda o: sched.ChainedScheduler([sched.ConstantLR(o), sched.ExponentialLR(o, 0.9)]),
    "SWALR": functools.partial(torch.optim.swa_utils.SWALR, swa_lr=LR / 4, anneal_epochs=5),
}


@each_variant
@pytest.mark.parametrize("noncontiguous", [False, True])
def test_goes_the_right_direction(variant, noncontiguous):
    problem = Problem(variant, noncontiguous=noncontiguous)
    rest = [x[..., 1].clone() for x in problem.whole] if noncontiguous else []
    first = problem.closure().item()
    last = problem.run(20).closure().item()
    assert last > 1.1 * first if variant == "ascent" else last < 0.9 * first
    assert all(torch.equal(x[..., 1], old) for x, old in zip(problem.whole, rest))  # the memory between is not ours
    if noncontiguous:
        dense = Problem(variant).run(20)
        tolerance = {"rtol": 0.1, "atol": 0.05} if variant == "bfloat16" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(problem.values(), dense.values(), **tolerance)


@each_variant
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_adamw(variant, name):
    problem, groups = Problem(variant), []
    for group in problem.optimizer.param_groups:
        groups.append({"params": [nn.Parameter(p.detach().clone()) for p in group["params"]], "betas": group["betas"]})
    other = torch.optim.AdamW(groups, lr=LR)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (problem.optimizer, other)]
    first, rates = problem.closure().item(), set()
    for _ in range(10):
        problem.run(1)
        other.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        for ours, theirs in zip(problem.optimizer.param_groups, other.param_groups):
            assert (ours["lr"], ours["betas"]) == (theirs["lr"], theirs["betas"])
        rates.add(ours["lr"])
    assert len(rates) > 1
    assert (problem.closure().item() > first) == (variant == "ascent")


@each_variant
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_the_number(variant, shape):
    lr = torch.full(shape, LR)
    problem = Problem(variant, lr=lr)
    scheduler = sched.ExponentialLR(problem.optimizer, 0.5)
    plain = Problem(variant)
    scheduler_of_plain = sched.ExponentialLR(plain.optimizer, 0.5)
    for _ in range(4):
        problem.run(1), plain.run(1)
        scheduler.step(), scheduler_of_plain.step()
    tolerance = {"rtol": 0.02, "atol": 1e-2} if variant == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(problem.values(), plain.values(), **tolerance)
    assert problem.optimizer.param_groups[0]["lr"].item() == LR / 16
    state = io.BytesIO()
    torch.save(problem.optimizer.state_dict(), state)
    state.seek(0)
    fresh = Problem(variant, lr=torch.full(shape, LR))
    fresh.optimizer.load_state_dict(torch.load(state, weights_only=True))
    assert fresh.optimizer.param_groups[0]["lr"].item() == LR / 16


@each_variant
def test_groups_are_as_good_as_optimizers(variant):
    """Each group has its own options: a parameter moves as it would alone; one of a tiny lr does not move."""
    together, apart = Problem(variant), Problem(variant)
    for group in together.optimizer.param_groups:
        assert OPTIONS <= group.keys()
    alone = [Fira([dict(group)]) for group in apart.optimizer.param_groups]
    still = nn.Parameter(torch.randn(4, 6))
    together.optimizer.add_param_group({"params": [still], "lr": 1e-28, "rank": 2})
    assert OPTIONS <= together.optimizer.param_groups[-1].keys()
    before = still.detach().clone()
    for _ in range(6):
        together.closure()
        still.grad = torch.randn_like(still)
        together.optimizer.step()
        apart.closure()
        for optimizer in alone:
            optimizer.step()
    assert equal(together.values(), apart.values()) and torch.equal(still, before)
    assert together.optimizer.state[still]["step"] == 6


@each_variant
def test_defaults_are_the_constructors(variant):
    optimizer = Problem(variant).optimizer
    assert optimizer.defaults.keys() == OPTIONS
    assert all(group.keys() >= OPTIONS | {"params"} for group in optimizer.param_groups)
    assert "Fira" in repr(optimizer) and "update_proj_gap: " in repr(optimizer)


# Gradients that are missing, zero or odd


@each_variant
def test_no_gradient_is_no_step(variant):
    problem = Problem(variant, weight_decay=0.1)
    before = problem.values()
    assert problem.optimizer.step(lambda: torch.tensor([1.0])) == 1 and not problem.optimizer.state
    assert equal(problem.values(), before)
    problem.closure()
    problem.params[0].grad = None
    problem.optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(problem.params, before)]
    assert moved == [False, True, True] and problem.params[0] not in problem.optimizer.state


@each_variant
def test_zero_gradients_do_nothing_and_harm_nothing(variant):
    problem = Problem(variant)
    for group in problem.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = problem.values()
    for _ in range(3):
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        problem.optimizer.step()
    assert equal(problem.values(), before)
    first = problem.closure().item()
    assert (problem.run(10).closure().item() > first) == (variant == "ascent")


@each_variant
def test_parameters_without_elements(variant):
    shapes, options = [(0, 5), (5, 0), (0, 0), (1, 5), (5, 1), (1, 1)], VARIANTS[variant]
    matrices = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    vectors = [nn.Parameter(torch.ones(shape)) for shape in [(0,), (), (1, 2, 0)]]
    optimizer = Fira([{"params": matrices, **options}, {"params": vectors}])
    for _ in range(3):
        for p in matrices + vectors:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(p.isfinite().all() and not (p == 1).any() for p in matrices + vectors)


@each_variant
def test_gradients_of_every_layout(variant):
    """A transposed or expanded gradient gives what its dense copy gives, and is not changed."""
    for odd in (lambda g: g.t().contiguous().t() if g.dim() == 2 else g, lambda g: g.flatten()[0].expand_as(g)):
        ends = []
        for dense in (False, True):
            problem = Problem(variant)
            for _ in range(5):
                problem.closure()
                for p in problem.params:
                    p.grad = odd(p.grad).contiguous() if dense else odd(p.grad)
                before = [p.grad.clone() for p in problem.params]
                problem.optimizer.step()
                assert all(torch.equal(p.grad, old) for p, old in zip(problem.params, before))
            ends.append(problem.values())
        tolerance = {"rtol": 0.05, "atol": 0.02} if variant == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(*ends, **tolerance)


def test_parameters_of_several_precisions_at_once():
    torch.manual_seed(0)
    for rank in (None, 2, 9):
        W = torch.randn(6, 4)
        params = [nn.Parameter(W.to(d)) for d in (torch.float64, torch.float32, torch.bfloat16)]
        optimizer = Fira([{"params": params, "rank": rank}], lr=LR)
        grads = torch.randn(4, 6, 4)
        for g in grads:
            for p in params:
                p.grad = g.to(p.dtype)
            optimizer.step()
        for p in params:
            state = optimizer.state[p]
            assert state["exp_avg"].dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(p.double(), params[0].double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_variant
def test_the_default_dtype_changes_nothing(variant, dtype):
    plain, problem = Problem(variant).run(4), Problem(variant)
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        problem.run(4)
    finally:
        torch.set_default_dtype(old)
    assert equal(problem.values(), plain.values())
    assert equal(problem.optimizer.state_dict(), plain.optimizer.state_dict())


# Graphs, closures, memory, profiles


@each_variant
def test_closures_run_with_gradients_and_leave_the_mode_alone(variant):
    problem, modes = Problem(variant), []

    def closure():
        modes.append(torch.is_grad_enabled())
        return problem.closure()

    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert problem.optimizer.step(closure).requires_grad
            assert torch.is_grad_enabled() == enabled
    assert modes == [True, True]
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in problem.params)


@each_variant
def test_a_stale_graph_is_noticed(variant):
    problem = Problem(variant).run(1)
    loss = sum((p * p).sum() for p in problem.params)  # which keeps p for its backward pass
    versions = [p._version for p in problem.params]
    problem.run(1)
    assert all(p._version > version for p, version in zip(problem.params, versions))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Largest(TorchDispatchMode):
    """The most elements that a new tensor has had."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if torch.is_tensor(x)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("full_rank", "bfloat16")])
def test_a_step_makes_nothing_of_the_size_of_a_weight(variant):
    p = nn.Parameter(torch.randn(512, 1024))
    optimizer = Fira([{"params": [p], **VARIANTS[variant] | {"update_proj_gap": 100}}])
    for _ in range(3):
        p.grad = torch.randn_like(p)
        with Largest() as largest:
            optimizer.step()
    assert largest.size <= p.numel() // 4  # a block of rows for the norms


def test_profiles_name_the_step():
    problem = Problem("fira")
    with torch.profiler.profile() as profile:
        problem.run(1)
    assert "Optimizer.step#Fira.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    problem = Problem("mixed")
    problem.closure()
    problem.optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in problem.params)
    problem.optimizer.step()
    assert bool(problem.optimizer.state) != set_to_none


@each_variant
def test_a_gradient_scaler_skips_a_step_that_overflowed(variant):
    problem, scaler = Problem(variant), torch.amp.GradScaler("cpu", init_scale=4.0)
    plain = Problem(variant).run(2)
    for overflow in (False, True, False):
        problem.closure()
        for p in problem.params:
            p.grad.mul_(torch.inf if overflow else scaler.scale(torch.ones(())).item())
        scaler.step(problem.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0 and equal(problem.values(), plain.values())


def test_swa_averages_what_it_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    groups = [{"params": [model[0].weight], "rank": 2}, {"params": [*model.parameters()][1:]}]
    optimizer, averaged = Fira(groups, lr=0.05), torch.optim.swa_utils.AveragedModel(model)
    data, seen = [torch.randn(16, 6) for _ in range(6)], []
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    torch.testing.assert_close(averaged.module[0].weight.detach(), torch.stack(seen).mean(0))
    torch.optim.swa_utils.update_bn(data, averaged)


# What is saved, loaded, copied


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_variant
@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)])
def test_a_loaded_state_continues_bit_for_bit(variant, named):
    problem, other = Problem(variant, named=named[0]).run(5), Problem(variant, named=named[1], seed=1)
    saved = problem.optimizer.state_dict()
    loaded = saved_and_loaded(saved)
    assert equal(saved, loaded) and all(problem.optimizer.state[p] for p in problem.params)
    with torch.no_grad():
        for p, q in zip(problem.params, other.params):
            q.copy_(p)
    other.input = problem.input
    other.optimizer.load_state_dict(loaded)
    assert equal(saved, loaded)  # loading changes nothing in what is loaded
    keys = [group.keys() - {"param_names"} for group in other.optimizer.param_groups]
    assert keys == [group.keys() - {"param_names"} for group in problem.optimizer.param_groups]
    if any(named):
        names = sum((group["param_names"] for group in other.optimizer.param_groups), [])
        assert names == ["name0", "name1", "name2"]
    problem.run(7), other.run(7)
    assert equal(problem.values(), other.values())
    assert equal(without_names(problem.optimizer.state_dict()), without_names(other.optimizer.state_dict()))
    assert not equal(saved["state"][0]["exp_avg"], loaded["state"][0]["exp_avg"])  # the second shares no memory
    # Groups that are there twice look alike in the state.
    other.optimizer.param_groups.extend(other.optimizer.param_groups)
    ends = [without_names(p.optimizer.state_dict())["param_groups"][-1] for p in (problem, other)]
    assert equal(*ends)


@each_variant
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_bit_for_bit(variant, how):
    problem = Problem(variant).run(5)
    twin = how(problem)
    assert equal(problem.optimizer.state_dict(), twin.optimizer.state_dict())
    assert twin.optimizer.defaults.items() >= problem.optimizer.defaults.items()  # torch adds one of its own
    problem.run(5), twin.run(5)
    assert equal(problem.values(), twin.values())
    assert equal(problem.optimizer.state_dict(), twin.optimizer.state_dict())
    fresh = how(Problem(variant).optimizer)
    assert fresh.step() is None and not fresh.state


@each_variant
def test_older_and_plainer_states_load(variant):
    """Options that a saved group lacks stay as they are; `step` may be a number or a tensor."""
    problem = Problem(variant).run(3)
    before = [dict(group) for group in problem.optimizer.param_groups]
    saved = copy.deepcopy(problem.optimizer.state_dict())
    for group in saved["param_groups"]:
        for option in OPTIONS - {"lr"}:
            del group[option]
    for state in saved["state"].values():
        state["step"] = state["step"].item() if torch.is_tensor(state["step"]) else torch.tensor(float(state["step"]))
    twin = copy.deepcopy(problem)
    problem.optimizer.load_state_dict(saved)
    for old, group in zip(before, problem.optimizer.param_groups):
        assert all(group[option] == old[option] for option in OPTIONS)
    problem.run(3), twin.run(3)
    assert equal(problem.values(), twin.values())
    assert equal(problem.optimizer.state_dict()["state"], twin.optimizer.state_dict()["state"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_moves_to_parameters_of_another_precision(variant, dtype):
    problem = Problem(variant).run(5)
    other = Problem(variant)
    for group in other.optimizer.param_groups:
        for p in group["params"]:
            p.data = p.data.to(dtype)
    other.optimizer.load_state_dict(saved_and_loaded(problem.optimizer.state_dict()))
    for p, q in zip(problem.params, other.params):
        M, moved = problem.optimizer.state[p]["exp_avg"], other.optimizer.state[q]["exp_avg"]
        assert moved.dtype == torch.promote_types(dtype, torch.float32) and torch.equal(M.to(moved.dtype), moved)
        q.data = p.detach().to(dtype)
    other.input = problem.input.to(dtype)
    problem.run(1), other.run(1)
    ends = [[p.detach().double() for p in x.params] for x in (problem, other)]
    torch.testing.assert_close(*ends, rtol=0.02, atol=0.02)


def states_that_are_not_ours(own):
    """Name, a state that must be refused, and what the message says."""
    params = [nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(6))]
    for p in params:
        p.grad = torch.randn_like(p)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    for name, make in {
        "AdamW": torch.optim.AdamW,
        "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
        "rank 2": lambda g: Fira([g[0] | {"rank": 2}, g[1]]),
    }.items():
        optimizer = make([dict(g) for g in groups])
        optimizer.step()
        yield name, optimizer.state_dict(), "saved state of name0"
    for name, key, value, says in (
        ("shape", "exp_avg", torch.zeros(3, 5), "name0"),
        ("scalar", "projection", 0.0, "name0"),
        ("more", "extra", 1, "extra"),
        ("text", "step", "five", "five"),
    ):
        state = copy.deepcopy(own)
        state["state"][0][key] = value
        yield name, state, says
    less = copy.deepcopy(own)
    del less["state"][0]["projection"]
    yield "less", less, "name0"
    first, second = own["param_groups"]
    yield "a group more", own | {"param_groups": [first, second, second | {"params": [3]}]}, "parameter group"
    yield "a group less", own | {"param_groups": [first]}, "parameter group"
    yield "a parameter less", own | {"param_groups": [first | {"params": [0]}, second]}, "size|match"


def test_states_of_others_are_refused_and_harm_nothing():
    problem = Problem("fira", named=True).run(3)
    before = copy.deepcopy(problem.optimizer.state_dict())
    for name, state, says in states_that_are_not_ours(before):
        with pytest.raises(ValueError, match=says):
            problem.optimizer.load_state_dict(state)
            pytest.fail(f"{name} was accepted")
        assert equal(problem.optimizer.state_dict(), before), name


# Hooks


@each_variant
def test_state_dict_hooks(variant):
    optimizer, calls = Problem(variant).run(1).optimizer, []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    handle = optimizer.register_state_dict_post_hook(lambda o, s: {**s, "label": len(s["state"])})
    assert optimizer.state_dict()["label"] == 3
    handle.remove()
    assert "label" not in optimizer.state_dict() and calls == ["before"] * 2


@each_variant
def test_load_state_dict_hooks(variant):
    problem, calls = Problem(variant).run(2), []
    optimizer, saved = problem.optimizer, copy.deepcopy(problem.optimizer.state_dict())

    def before(name, lr):
        def hook(_, state_dict):
            calls.append(name)
            state_dict = copy.deepcopy(state_dict)
            state_dict["param_groups"][0]["lr"] = lr
            state_dict["state"][0]["step"] += 40
            return state_dict

        return hook

    def after(o):  # sees what is loaded, with its dtype, and has the last word
        calls.append((o.param_groups[0]["lr"], int(o.state[problem.params[0]]["step"])))
        assert all(o.state[p]["exp_avg"].dtype == torch.float32 for p in problem.params)
        o.state[problem.params[0]]["step"] -= 1

    optimizer.register_load_state_dict_pre_hook(before("second", 0.25))
    optimizer.register_load_state_dict_pre_hook(before("first", 0.5), prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("zeroth"), prepend=True)
    for _ in range(2):  # a load leaves no hook of its own
        calls.clear()
        optimizer.load_state_dict(saved)
        assert calls == ["first", "second", "zeroth", (0.25, 82)]
        assert optimizer.state[problem.params[0]]["step"] == 81
    assert saved["state"][0]["step"] == 2


@each_variant
def test_step_hooks_run_in_order(variant):
    problem, calls = Problem(variant), []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append("all before")),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append("all after")),
        problem.optimizer.register_step_pre_hook(lambda o, a, k: calls.append("before")),
        problem.optimizer.register_step_post_hook(lambda o, a, k: calls.append(len(o.state))),
    ]
    expected = ["all before", "before", 3, "all after"]
    problem.run(2)
    assert calls == expected * 2
    for handle in handles:
        handle.remove()
    problem.run(1)
    assert calls == expected * 2


# What is refused


def test_constructor_errors():
    def w(*shape):
        return nn.Parameter(torch.randn(*(shape or (4, 4))))

    for options, says in (
        ({"lr": -1.0}, "learning rate"),
        ({"lr": torch.ones(2)}, "1-element"),
        ({"betas": (1.0, 0.9)}, "beta"),
        ({"betas": (0.9, -0.1)}, "beta"),
        ({"eps": -1e-8}, "epsilon"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"scaling": None, "only_scaling": True}, "only_scaling"),
        *(({option: "no"}, f"{option}='no' must be one of") for option in CHOICES),
    ):
        for make in (lambda: Fira([w()], **options), lambda: Fira([{"params": [w()], **options}])):
            with pytest.raises(ValueError, match=says):
                make()
    for key in ("scale", "scale_type", "proj", "projection_type"):
        with pytest.raises(ValueError, match=key):
            Fira([{"params": [w()], key: 1}])
    Fira([{"params": [w()], "name": "blocks", "lr_scale": 2}])
    shared = w()
    for params, error, says in (
        ([], ValueError, "empty parameter list"),
        (w(), TypeError, "iterable"),
        ([w(), "no"], TypeError, "Tensor"),
        ([w() * 2], ValueError, "non-leaf"),
        ([{"params": [shared]}, {"params": [shared]}], ValueError, "more than one parameter group"),
        ([{"params": [w(), w(4)], "rank": 2}], ValueError, "parameter 1 .*whole matrices"),
        ([{"params": [("deep", w(2, 2, 2))], "rank": 2}], ValueError, "deep .*whole matrices"),
        ([nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))], ValueError, "real numbers"),
        ([torch.ones(4, 4, dtype=torch.int64)], ValueError, "real numbers"),
    ):
        with pytest.raises(error, match=says):
            Fira(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Fira([shared, shared])
    assert any("duplicate" in str(w.message) for w in caught)


def test_errors_of_a_step_change_no_weight():
    problem = Problem("mixed").run(2)
    late = nn.Parameter(torch.randn(3))
    problem.optimizer.add_param_group({"params": [late], "rank": 2})  # torch, too, looks at it in the first step only
    before = problem.values()
    problem.closure()
    late.grad = torch.ones(3)
    with pytest.raises(ValueError, match="whole matrices"):
        problem.optimizer.step()
    assert equal(problem.values(), before)
    p = nn.Parameter(torch.randn(5, 3))
    for rank in (None, 2):
        p.grad = torch.randn(5, 3).to_sparse()
        with pytest.raises(RuntimeError):
            Fira([{"params": [p], "rank": rank}]).step()
