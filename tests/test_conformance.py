"""Is `Fira` a torch optimizer? The contract that PyTorch's own optimizer tests check, for eight kinds of Fira.

Of their list these do not apply, for Fira has no such option or promise: capturable, differentiable, foreach, fused
(a group without a rank always is), amsgrad; sparse and complex ones are refused; a closure is never needed.
"""

import copy
import inspect
import io
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.optim.lr_scheduler as S
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fira import CHOICES, PEERS, Fira

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
OPTIONS = set(inspect.signature(Fira).parameters) - {"params"}
LR = 2.0**-6  # the same number in every precision
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


class Problem:
    """Two matrices and a bias, each in a group of the variant's options, and a loss."""

    def __init__(self, variant, named=False, sliced=False, **options):
        torch.manual_seed(0)
        self.variant = variant
        dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
        wide = [torch.randn(*shape, 2).to(dtype) for shape in ((10, 5), (6, 10), (6,))]
        self.params = [nn.Parameter(x[..., 0] if sliced else x[..., 0].contiguous()) for x in wide]
        self.between = [x[..., 1] for x in wide]  # where `sliced`, in memory between their elements
        self.input = torch.randn(16, 5).to(dtype)  # of full rank, or singular vectors would be arbitrary
        self.near = {"rtol": 0.0, "atol": 0.05 if variant == "bfloat16" else 1e-3}
        own, up = VARIANTS[variant], {"maximize": variant == "ascent"}
        groups = [own, {"rank": 8} if variant == "mixed" else own, {"betas": (0.8, 0.99)} | up]
        for i, (group, p) in enumerate(zip(groups, self.params)):
            groups[i] = group | {"params": [(f"name{i}", p) if named else p]}
        self.optimizer = Fira(groups, **{"lr": LR} | options)

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

    def everything(self):
        groups = [{k: v for k, v in g.items() if k != "param_names"} for g in self.optimizer.param_groups]
        return self.values(), self.optimizer.state_dict()["state"], [g | {"params": 0} for g in groups]


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(torch.ones(*(shape or (4, 4)), dtype=dtype), requires_grad=dtype.is_floating_point)


def equal(a, b):
    """Bit for bit, tensors in any nest of dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b)


LAYOUTS = {  # of gradients; a weight is a slice of `wide`
    "dense": lambda g: g,
    "transposed": lambda g: g.T.contiguous().T if g.dim() == 2 else g,
    "expanded": lambda g: g.flatten()[0].expand_as(g),
}


@each_variant
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_any_layout(variant, layout):
    sliced, dense = Problem(variant, sliced=True), Problem(variant)
    first, between = dense.closure().item(), [x.clone() for x in sliced.between]
    for _ in range(8):
        for problem in (sliced, dense):
            problem.closure()
            for p in problem.params:
                p.grad = LAYOUTS[layout](p.grad)
                p.grad = p.grad if problem is sliced else p.grad.contiguous()
            before = [p.grad.clone() for p in problem.params]
            problem.optimizer.step()
            assert equal([p.grad for p in problem.params], before)
    torch.testing.assert_close(sliced.values(), dense.values(), **dense.near)
    assert equal(sliced.between, between)
    assert layout == "expanded" or (dense.closure().item() > first) == (variant == "ascent")


SCHEDULERS = {
    "step": lambda o: S.StepLR(o, 3),
    "steps": lambda o: S.MultiStepLR(o, [3, 6]),
    "constant": S.ConstantLR,
    "linear": S.LinearLR,
    "exponential": lambda o: S.ExponentialLR(o, 0.9),
    "polynomial": lambda o: S.PolynomialLR(o, 8),
    "cosine": lambda o: S.CosineAnnealingLR(o, 8),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4),
    "lambda": lambda o: S.LambdaLR(o, lambda t: 0.95**t),
    "multiplicative": lambda o: S.MultiplicativeLR(o, lambda t: 0.95),
    "cyclic": lambda o: S.CyclicLR(o, LR / 8, LR, step_size_up=3, cycle_momentum=True),
    "one cycle": lambda o: S.OneCycleLR(o, LR, total_steps=20),  # cycles the momentum too
    "plateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], milestones=[4]),
    "chained": lambda o: S.ChainedScheduler([S.ConstantLR(o), S.ExponentialLR(o, 0.9)]),
    "swa": lambda o: SWALR(o, LR / 4, anneal_epochs=5),
}


@each_variant
def test_schedulers_drive_it_as_they_drive_adamw(variant):
    for name, scheduler in SCHEDULERS.items():
        problem, rates = Problem(variant), set()
        groups = problem.optimizer.param_groups
        other = torch.optim.AdamW([{"params": [torch.zeros(1)], "betas": g["betas"]} for g in groups], lr=LR)
        schedulers, first = [scheduler(problem.optimizer), scheduler(other)], problem.closure().item()
        for _ in range(10):
            problem.run(1), other.step()
            for each in schedulers:
                each.step(*([1.0] if name == "plateau" else []))
            for ours, theirs in zip(groups, other.param_groups):
                assert (ours["lr"], ours["betas"]) == (theirs["lr"], theirs["betas"]), name
            rates.add(groups[0]["lr"])
        assert len(rates) > 1 and (problem.closure().item() > first) == (variant == "ascent"), name


@each_variant
def test_a_tensor_learning_rate_is_the_number(variant):
    problem, plain = Problem(variant, lr=torch.tensor(LR)), Problem(variant)
    schedulers = [S.ExponentialLR(x.optimizer, 0.5) for x in (problem, plain)]
    for _ in range(4):
        problem.run(1), plain.run(1)
        for each in schedulers:
            each.step()
    torch.testing.assert_close(problem.values(), plain.values(), **plain.near)
    assert [float(x.optimizer.param_groups[0]["lr"]) for x in (problem, plain)] == [LR / 16] * 2


@each_variant
def test_a_group_is_as_good_as_an_optimizer(variant):
    together, apart = Problem(variant), Problem(variant)
    alone = [Fira([dict(group)]) for group in apart.optimizer.param_groups]
    still = nn.Parameter(torch.randn(4, 6))
    together.optimizer.add_param_group({"params": [still], "lr": 1e-28, "rank": 2})
    for group in together.optimizer.param_groups:
        assert group.keys() == OPTIONS | {"params"}
    assert together.optimizer.defaults.keys() == OPTIONS and "update_proj_gap: " in repr(together.optimizer)
    before = still.detach().clone()
    for _ in range(6):
        together.closure(), apart.closure()
        still.grad = torch.randn_like(still)
        for optimizer in (together.optimizer, *alone):
            optimizer.step()
    assert equal(together.values(), apart.values()) and torch.equal(still, before)


# Gradients and parameters of every kind


@each_variant
def test_gradients_that_are_missing_or_zero(variant):
    problem = Problem(variant)
    before = problem.values()
    assert problem.optimizer.step(lambda: 7) == 7 and not problem.optimizer.state
    for group in problem.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for set_to_none in (False, True):
        problem.closure()
        problem.optimizer.zero_grad(set_to_none)
        problem.optimizer.step()
    assert equal(problem.values(), before) and all(problem.optimizer.state[p]["step"] == 1 for p in problem.params)
    problem.closure()
    problem.params[0].grad = None
    problem.optimizer.step()
    assert [not torch.equal(p, old) for p, old in zip(problem.params, before)] == [False, True, True]
    first = problem.closure().item()
    assert (problem.run(10).closure().item() > first) == (variant == "ascent")  # zeros have done no harm


@each_variant
def test_parameters_with_few_elements(variant):
    matrices = [weight(m, n) for m in (0, 1, 5) for n in (0, 1, 5)]
    others = [weight(0), weight(1, 2, 0), nn.Parameter(torch.tensor(1.0))]
    optimizer = Fira([{"params": matrices, **VARIANTS[variant]}, {"params": others}])
    for _ in range(3):
        for p in matrices + others:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(p.isfinite().all() and not (p == 1).any() for p in matrices + others)


@each_variant
def test_the_default_dtype_changes_nothing(variant):
    problem, plain = Problem(variant), Problem(variant).run(4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        problem.run(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(problem.everything(), plain.everything())


# Graphs, closures, profiles, memory


@each_variant
def test_closures_and_graphs(variant):
    problem = Problem(variant)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert problem.optimizer.step(problem.closure).requires_grad and torch.is_grad_enabled() == enabled
    assert all(p.is_leaf and p.requires_grad for p in problem.params)
    for p in problem.params:  # each keeps its graph's tensors, and the graph notices
        loss = p.square().sum()
        problem.run(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.profiler.profile() as profile:
        problem.run(1)
    assert "Optimizer.step#Fira.step" in {event.key for event in profile.key_averages()}


class Largest(TorchDispatchMode):
    size = 0  # of the largest new tensor, in elements

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if torch.is_tensor(x)}
        if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in old:
            self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("full_rank", "bfloat16")])
def test_a_step_makes_nothing_of_the_size_of_a_weight(variant):
    p = nn.Parameter(torch.randn(512, 1024))
    optimizer = Fira([{"params": [p], **VARIANTS[variant] | {"update_proj_gap": 100}}])
    for _ in range(2):
        p.grad = torch.randn_like(p)
        with Largest() as largest:
            optimizer.step()
    assert largest.size < p.numel() // 4


# What is saved, loaded and copied


def loaded(problem, named=False, edit=lambda state: state):
    """A fresh problem with the weights and the loaded state of this one."""
    twin, file = Problem(problem.variant, named), io.BytesIO()
    torch.save(edit(problem.optimizer.state_dict()), file)
    state, again = (torch.load(io.BytesIO(file.getvalue()), weights_only=True) for _ in range(2))
    twin.optimizer.load_state_dict(state)
    assert equal(state, again)  # a load changes nothing in what is loaded
    for p, value in zip(twin.params, problem.values()):
        p.data = value
    return twin


def older(state):
    """Without options; `step` as a number where it is a tensor, and the other way round."""
    groups = [{k: v for k, v in g.items() if "param" in k} for g in state["param_groups"]]
    state = copy.deepcopy(state) | {"param_groups": groups}
    for s in state["state"].values():
        s["step"] = float(s["step"]) if torch.is_tensor(s["step"]) else torch.tensor(float(s["step"]))
    return state


COPIES = {
    "loaded": loaded,
    "loaded_by_names": lambda problem: loaded(problem, named=True),
    "loaded_from_older": lambda problem: loaded(problem, edit=older),
    "deepcopy": copy.deepcopy,
    "pickle": lambda problem: pickle.loads(pickle.dumps(problem)),
}


@each_variant
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_continues_bit_for_bit(variant, how):
    for named in (False, True):
        problem = Problem(variant, named).run(5)
        twin = COPIES[how](problem)
        if named or how == "loaded_by_names":
            assert [g["param_names"] for g in twin.optimizer.param_groups] == [["name0"], ["name1"], ["name2"]]
        assert equal(problem.run(6).everything(), twin.run(6).everything())
    assert COPIES[how](Problem(variant)).optimizer.step() is None  # with no state yet


@each_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_moves_to_parameters_of_another_precision(variant, dtype):
    problem, other = Problem(variant).run(5), Problem(variant)
    for p in other.params:
        p.data = p.to(dtype)
    other.optimizer.load_state_dict(problem.optimizer.state_dict())
    for p, q in zip(problem.params, other.params):
        M, moved, q.grad = problem.optimizer.state[p]["exp_avg"], other.optimizer.state[q]["exp_avg"], p.grad.to(dtype)
        assert torch.equal(M.to(torch.promote_types(dtype, torch.float32)), moved)
    other.optimizer.step()


def test_states_of_others_are_refused_by_name_and_change_nothing():
    problem = Problem("fira", named=True).run(3)
    before, states = copy.deepcopy(problem.optimizer.state_dict()), []
    for make in (torch.optim.AdamW, lambda g: torch.optim.SGD(g, momentum=0.9), lambda g: Fira(g, rank=2)):
        optimizer = make([{"params": [weight(*p.shape)]} for p in problem.params[:2]])
        optimizer.add_param_group({"params": [weight(6)], "rank": None})
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        optimizer.step()
        states.append((optimizer.state_dict(), "state of name0"))
    for key, value in (("exp_avg", torch.zeros(3, 5)), ("projection", 0.0), ("extra", 1)):
        states.append((copy.deepcopy(before), "state of name0"))
        states[-1][0]["state"][0][key] = value
    groups = before["param_groups"]
    for wrong in (groups + [groups[0] | {"params": [7]}], groups[:2], [groups[0] | {"params": [0, 7]}, *groups[1:]]):
        states.append((before | {"param_groups": wrong}, "parameter group"))
    for state, says in states:
        with pytest.raises(ValueError, match=says):
            problem.optimizer.load_state_dict(state)
        assert equal(problem.optimizer.state_dict(), before)


@each_variant
def test_hooks(variant):
    problem, calls = Problem(variant), []
    optimizer, p = problem.optimizer, problem.params[0]

    def noting(name, result=lambda *_: None):
        def hook(*args):
            calls.append(f"{name} {len(optimizer.state)}")
            return result(*args)

        return hook

    def edited(lr):
        return lambda _, state: state | {"param_groups": [g | {"lr": lr} for g in state["param_groups"]]}

    handles = [
        register_optimizer_step_pre_hook(noting("all before")),
        register_optimizer_step_post_hook(noting("all after")),
        optimizer.register_step_pre_hook(noting("before")),
        optimizer.register_step_post_hook(noting("after")),
        optimizer.register_state_dict_pre_hook(noting("saving")),
        optimizer.register_state_dict_post_hook(noting("saved", lambda _, state: state | {"label": 1})),
        optimizer.register_load_state_dict_pre_hook(noting("second", edited(0.25))),
        optimizer.register_load_state_dict_pre_hook(noting("first", edited(0.5)), prepend=True),
        optimizer.register_load_state_dict_post_hook(noting("loaded", lambda o: o.state[p]["exp_avg"].fill_(9))),
        optimizer.register_load_state_dict_post_hook(
            noting("prepended", lambda o: calls.append(o.state[p]["exp_avg"].dtype)), prepend=True
        ),
    ]
    problem.run(1)
    state = optimizer.state_dict()
    assert state["label"] == 1
    loading = ["first 3", "second 3", "prepended 3", torch.float32, "loaded 3"]
    for _ in range(2):
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.25 and (optimizer.state[p]["exp_avg"] == 9).all()
    expected = ["all before 0", "before 0", "after 3", "all after 3", "saving 3", "saved 3", *loading, *loading]
    assert calls == expected
    for handle in handles:
        handle.remove()
    problem.run(1).optimizer.load_state_dict(optimizer.state_dict())
    assert calls == expected and not optimizer._optimizer_load_state_dict_pre_hooks


# What is refused


def test_errors_of_the_constructor():
    for name, values, says in (
        ("lr", (-1.0, math.nan, torch.ones(2)), "learning rate|1-element"),
        ("betas", ((1.0, 0.9), (0.9, -0.1)), "beta"),
        ("eps", (-1.0, math.nan), "epsilon"),
        ("weight_decay", (-1.0, math.nan), "weight_decay"),
        ("rank", (0, -1, 2.5, math.nan, math.inf), "rank=.* must be a whole number"),
        ("update_proj_gap", (0, -1, 2.5, math.nan, math.inf), "update_proj_gap=.* must be a whole number"),
        ("alpha", (0.0, -1.0, math.nan, math.inf), "alpha=.* must be finite"),
        ("gamma", (0.0, 0.5, math.nan), "gamma=.* must be at least 1"),
        *((name, ("no", 0), f"{name}=.* must be one of") for name in CHOICES),
        *((name, (1,), f"{name}=1 must be called '{ours}'") for name, ours in PEERS.items()),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"(?i){says}"):
                Fira([{"params": [weight()], name: value}])
    Fira([{"params": [weight()], "name": "a label", "lr_scale": 2}])
    shared = weight()
    for params, error, says in (
        ([], ValueError, "empty parameter list"),
        (weight(), TypeError, "iterable"),
        ([weight(), "no"], TypeError, "Tensor"),
        ([weight() * 2], ValueError, "non-leaf"),
        ([{"params": [shared]}, {"params": [shared]}], ValueError, "more than one parameter group"),
        ([{"params": [weight(), weight(4)], "rank": 2}], ValueError, "parameter 1 .*whole matrices"),
        ([{"params": [("deep", weight(2, 2, 2))], "rank": 2}], ValueError, "deep .*whole matrices"),
        ([weight(dtype=torch.complex64)], ValueError, "real numbers"),
        ([weight(dtype=torch.int64)], ValueError, "real numbers"),
    ):
        with pytest.raises(error, match=says):
            Fira(params)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        Fira([shared, shared])


def test_a_step_that_fails_changes_nothing():
    """Neither a weight nor, for the parameters that were in order, what comes of the next step."""
    problem, plain, late = Problem("fira"), Problem("fira").run(3), weight(8, 8)
    problem.optimizer.add_param_group({"params": [late], "rank": 2})
    before = problem.values()
    for bad, error in ((torch.eye(8) / 0, FloatingPointError), (torch.eye(8).to_sparse(), RuntimeError)):
        problem.closure()
        late.grad = bad
        with pytest.raises(error):
            problem.optimizer.step()
        assert equal(problem.values(), before)
    late.grad = None
    assert equal(problem.run(3).values(), plain.values())
    problem.optimizer.add_param_group({"params": [weight(3)], "rank": 2})  # which torch, too, checks in the first step
    problem.optimizer.param_groups[-1]["params"][0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="whole matrices"):
        problem.optimizer.step()
