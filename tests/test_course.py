"""The course: unsolved files fail, wrong answers fail with their sentence, right ones pass."""

import math
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from course import check, training
from course.oracles import Fault
from course.wrong import WRONG

SOLUTIONS = check.HERE / "solutions.py"
needs_solutions = pytest.mark.skipif(not SOLUTIONS.exists(), reason="a teacher deleted the solutions")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def solutions(folder, changes):
    """What solutions.py defines, with a few words of it replaced."""
    text, path = SOLUTIONS.read_text(encoding="utf-8"), folder / "solutions.py"
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} must be in solutions.py once, so that this changes one thing"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return SimpleNamespace(**runpy.run_path(str(path)))


@pytest.mark.parametrize("number", check.NUMBERS)
def test_unsolved_file_names_the_functions_to_write(number, capsys):
    # This fails for a solved file in the repository, too: solve the exercises on a branch.
    assert not check.check(number)
    printed = capsys.readouterr().out
    assert str(check.path_of(number)) in printed and "not yet: write " in printed
    text, names = check.path_of(number).read_text(encoding="utf-8"), check.check_of(number)[1]
    assert all(name in printed for name in names)
    assert text.count("    raise NotImplementedError\n") == len(names)


@needs_solutions
@pytest.mark.parametrize("number, what, changes, sentence", WRONG, ids=[f"{row[0]}: {row[1]}" for row in WRONG])
def test_wrong_answer_fails_with_its_sentence(number, what, changes, sentence, tmp_path):
    with pytest.raises(Fault) as fault:
        list(check.run(number, solutions(tmp_path, changes)))
    assert sentence in str(fault.value)
    assert "?" in str(fault.value) and "\n" not in str(fault.value)


def test_there_are_enough_wrong_answers():
    assert len(WRONG) >= 25
    assert all(sum(row[0] == number for row in WRONG) >= 2 for number in check.NUMBERS)


@needs_solutions
def test_solved_files_are_right_where_they_lie(tmp_path, capsys):
    for number in check.NUMBERS:
        path = check.path_of(number)
        text, solved = path.read_text(encoding="utf-8"), SOLUTIONS.read_text(encoding="utf-8")
        for name in check.check_of(number)[1]:
            whole = re.compile(rf"^def {name}\(.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
            text = text.replace(whole.search(text)[0], whole.search(solved)[0])
        (tmp_path / path.name).write_text(text, encoding="utf-8")
        assert check.check(number, tmp_path), capsys.readouterr().out
    assert capsys.readouterr().out.count("   right") == len(check.NUMBERS)


def eigh_with_signs(G, r):
    G = G if len(G) <= G.shape[1] else G.T
    P = torch.linalg.eigh(G @ G.T).eigenvectors.flip(1)[:, :r] * -1
    return P


def other_project(G, r):  # the Gram matrix's eigenvectors, with other signs
    P = eigh_with_signs(G, r)
    return (P, P.T @ G) if len(G) <= G.shape[1] else (P, (P.T @ G.T).T)


def turned_project(G, r):  # another basis of the same space
    P = eigh_with_signs(G, r) @ torch.linalg.qr(torch.ones(r, r).to(G).tril()).Q
    return (P, P.T @ G) if len(G) <= G.shape[1] else (P, G @ P)


def other_galore_step(W, G, P, M, V, t, lr=0.01, alpha=0.25, beta1=0.9, beta2=0.999, eps=1e-8):  # in place, bottom up
    R = (G.T @ P).T
    M.lerp_(R, 1 - beta1)
    V.mul_(beta2).addcmul_(R, R, value=1 - beta2)
    step = M.div(V.sqrt().add_(eps)).mul_(alpha * lr / (1 - beta1**t)).mul_((1 - beta2**t) ** 0.5)
    W -= P @ step
    return [W, M, V]


def other_fused_step(W, G, P, N, phi, lr, alpha):
    inside = torch.einsum("mr,mn->rn", P, G).mul_(phi).sub_(N, alpha=alpha)
    W.t().addmm_(inside.t(), P.t(), alpha=lr)
    W.addcmul_(G, -lr * phi[None, :])


def other_counterexample():
    return (
        torch.eye(3, dtype=torch.float64)[:, :1] * 0.6 + torch.eye(3)[:, 1:2] * 0.8,
        torch.ones(1, 5),
        torch.arange(3),
    )


def other_scaling(N, R, eps=1e-8):
    return (N * N).sum(0, keepdim=True).sqrt() / (torch.linalg.vector_norm(R, dim=0, keepdim=True) + eps)


def other_limit(S, prev_norm, gamma=1.01):  # tensors of one number, no ε, min for max
    norm = torch.linalg.matrix_norm(S)
    if not norm > 0:
        return S, prev_norm
    s = 1 if prev_norm is None else torch.clamp(gamma * torch.as_tensor(prev_norm) / norm, max=1)
    return s * S, s * norm


def other_spike(G, P, factor):
    return factor * G + (1 - factor) * P @ (P.T @ G)


def other_align(P_new, P_old):
    return torch.stack([b if torch.dot(a, b) >= 0 else -b for a, b in zip(P_old.T, P_new.T)]).T


def other_rotate(M, P_old, P_new):
    return torch.linalg.lstsq(P_new, P_old @ M).solution


LEVELS = (torch.arange(256) / 255) ** 2


def other_pack(V):  # a table of 256 levels, float32 inside
    parts = [x.float() for x in V.flatten().split(256)]
    scales = torch.stack([x.max() for x in parts])
    codes = [torch.searchsorted(LEVELS, x / s if s > 0 else x) for x, s in zip(parts, scales)]
    return torch.cat(codes).clamp(max=255).to(torch.uint8), scales


def other_unpack(codes, scales, shape):
    return (LEVELS[codes.long()] * scales.repeat_interleave(256)[: codes.numel()]).view(shape)


def other_rank_for(G, q):  # float32 inside
    s2 = (torch.linalg.svd(G.float() / G.abs().max()).S ** 2).tolist()
    return next((r for r in range(1, len(s2)) if sum(s2[:r]) >= (q - 1e-7) * sum(s2)), len(s2))


def other_ranks_within(Gs, budget):  # halving the interval
    def ranks(q):
        return [int(((s := torch.linalg.svdvals(G) ** 2).cumsum(0) < (q - 1e-13) * s.sum()).sum()) + 1 for G in Gs]

    def cost(q):
        return sum(sum(G.shape) * r + max(G.shape) * r + 1 for G, r in zip(Gs, ranks(q)))

    low, high = 0.0, 1.0
    if cost(low) > budget:
        raise ValueError("the budget is too small")
    if cost(high) <= budget:
        return ranks(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return ranks(low)


def other_similarity(low, full):  # the formula with squared differences; numbers as tensors
    a, b = ((x[:, None] > x).sum(1).double() for x in (low, full))
    k = len(low)
    return 1 - 6 * ((a - b) ** 2).sum() / (k * (k * k - 1)), torch.quantile(low / full, 0.5)


OTHER = SimpleNamespace(**{name[6:]: f for name, f in list(vars().items()) if name.startswith("other_")})
OTHER.state_numbers = lambda m, n, r: (n + 2 * m if m > n else m + 2 * n) * r + 1 if r < min(m, n) else 2 * m * n + 1
OTHER.break_even = lambda m, n: 2 / (1 / max(m, n) + 2 / min(m, n))


@pytest.mark.parametrize("number", check.NUMBERS)
def test_right_but_different_answer_passes(number):
    if number == 10:  # without the training, which the solution does
        assert next(check.run(number, OTHER))
    else:
        assert list(check.run(number, OTHER))


def infinite_limit(S, prev_norm, gamma=1.01):  # no step before is a norm of infinity
    prev_norm, norm = math.inf if prev_norm is None else prev_norm, S.norm().item()
    s = min(1.0, gamma * prev_norm / norm) if norm else 1.0
    return s * S, s * norm or prev_norm


def test_another_basis_infinity_and_float32_pass():
    assert list(check.run(1, SimpleNamespace(project=turned_project)))
    assert list(check.run(5, SimpleNamespace(limit=infinite_limit, spike=other_spike)))
    places = lambda x: x.argsort().argsort().float()
    rho = lambda low, full: torch.corrcoef(torch.stack([places(low), places(full)]))[0, 1]
    assert next(check.run(10, SimpleNamespace(similarity=lambda a, b: (rho(a, b), (a / b).float().median()))))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("def project(G, r):\n    return G.nothing\n", "line 2: AttributeError"),
        ("def project(G, r):\n    exit()\n", "line 2: SystemExit"),
        ("def project(G, r):\n    return G^2, G\n", '"bitwise_xor_cpu" not implemented'),
        ("def project(G, r)\n    return G\n", "line 1: SyntaxError"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
        (
            "def project(G, r):\n    G @ G.T\n",
            "TypeError: cannot unpack non-iterable NoneType object, with what project returned: is a `return` missing?",
        ),
        ("def project(G, r):\n    return G\n", "with what project returned: is it"),
        ("def projekt(G, r):\n    return G\n", "has no attribute 'project', with what project returned"),
        ("def project(G):\n    return G, G\n", "TypeError"),
        (None, "No such file"),
    ],
)
def test_a_crash_is_one_line_with_the_line_of_their_file(text, sentence, tmp_path, capsys):
    if text:
        (tmp_path / "ex01_project.py").write_text(text)
    assert not check.check(1, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == f"1. {check.path_of(1, tmp_path)}" and printed[1].startswith(f"1. {tmp_path}")
    assert len(printed) == 3 and sentence in printed[2] and "?" in printed[2]


def test_three_hints_for_each_exercise(monkeypatch, capsys):
    shown = set()
    for number in check.NUMBERS:
        for hint in ([], ["2"], ["3"]):
            monkeypatch.setattr(sys, "argv", ["check.py", str(number), "--hint", *hint])
            assert not check.main()
            shown.add(capsys.readouterr().out)
    assert len(shown) == 30 and all(len(text) > 30 for text in shown)


@needs_solutions
@pytest.mark.parametrize("number, near", [(2, 1e-5), (4, 1e-5), (5, 1e-5), (8, 0.3), (9, float("inf"))])
def test_function_in_the_place_of_its_seam(number, near, tmp_path):
    """With the solution inside, the optimizer of --train is the one that it is compared with."""
    from fira import Fira

    place = training.PLACES[number]
    names = ["pack_M", "unpack_M", "numbers", *check.check_of(number)[1]]
    found = runpy.run_path(str(check.path_of(number))) | vars(solutions(tmp_path, {}))
    its = SimpleNamespace(**{name: found[name] for name in names if name in found})
    ends = []
    for cls in (Fira, type("Yours", (place,), {"its": its})):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((12, 16), (20, 12), (12, 12))]
        options = {"scaling": None} if number == 2 else {}
        optimizer = cls([{"params": weights, "rank": 3, "update_proj_gap": 5, **options}], lr=0.01)
        for _ in range(12):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator)
            weights[0].grad[2:] *= 0.1  # of fewer directions than the others
            optimizer.step()
        ends.append(torch.cat([w.detach().flatten() for w in weights]))
    assert ends[1].isfinite().all() and (ends[1] - ends[0]).norm() < near * ends[0].norm()
    if number in (8, 9):  # the seam was used
        assert not torch.equal(*ends)


def test_a_mistake_that_only_training_meets_is_one_line_too(tmp_path):
    path = tmp_path / "ex04_scaling.py"
    path.write_text("def scaling(N, R, eps=1e-8):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError) as error:
        runpy.run_path(str(path))["scaling"](None, None)
    assert check.told(error.value, 4, path).startswith("ex04_scaling.py, line 2: ZeroDivisionError: ")
