"""The reductions of experiments/ on made-up runs, the coefficients against known values, the memory formula."""

import json
import math
import random

import numpy as np
import pytest
import torch

import fira
import train
from experiments import choices, claims, paper, patches, reductions, report, similarity, stored
from experiments.coefficients import cosine, kendall, pearson, spearman
from experiments.memory import state_bytes
from experiments.recorder import MATRICES, Recorder
from model import ModelConfig, Transformer


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "RESULTS", tmp_path / "runs")
    stored.RESULTS.mkdir()
    return stored.RESULTS


def keep(run, seed, loss, **more):
    result = {
        "run": run,
        "seed": seed,
        "val_loss": loss,
        "code": stored.code_hash(claims.RUNS[run]),
        "data": "d",
        "config": {"lr": 0.01, "alpha": 0.25, "data": "stdlib"},
    }
    result |= {"ms_per_step": 200.0, "state_bytes": 2_600_092}
    result |= {"python": "3", "torch": "2", "flags": claims.RUNS[run], "evaluations": [[750, 1.5], [1500, loss]]} | more
    (stored.RESULTS / f"{run}-seed{seed}.json").write_text(json.dumps(result))


VERDICTS = """
    0.02  0.01  32.22/31.06  0.013 confirmed
    0.005 0.001 37.06/31.06  0.06  confirmed, but under half the size
    -0.02 0.01  32.22/31.06  0.013 **contradicted**
    0.001 0.005 37.06/31.06  0.06  not seen: under half the size
    0.01  0.02  32.22/31.06  0.013 not decidable here
    -0.02 0.01  34.06/34.88  0.01  confirmed
    -0.02 0.01  -            0     confirmed
    0.002 0.005 =            0     confirmed
    0.03  0.005 =            0     **contradicted**
    0.009 0.005 =            0     not decidable here
    0.5   inf   +            0     not decidable: one seed
"""


@pytest.mark.parametrize("line", VERDICTS.strip().splitlines())
def test_verdict(line):
    assert report.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))  # Student's t, deviation 1
    mean, half, paper, least, expected = line.split(maxsplit=4)
    assert report.verdict(float(mean), float(half), paper, float(least)) == expected


def test_a_row_pairs_the_seeds_that_both_have_and_scales_the_papers_effect(results):
    for seed, noise in enumerate((0.0, 0.3, -0.2)):  # shared by both, so the difference has none of it
        keep("fira", seed, 1 + noise)
        keep("no-limiter", seed, 1.05 + noise + 0.001 * seed)
    keep("no-limiter", 3, 99.0)
    row = report.row("T5", ["text", "no-limiter", "fira", "34.88/31.06"], [0, 1, 2, 3], (0.08, 0.02))
    assert "| +0.0800 |" in row and "| +0.0510 ± 0.0025 |" in row and "| 1.0843, 1.0333 | 0 1 2 | confirmed |" in row
    assert "not run" in report.row("T5", ["text", "matrix", "fira", "?"], [0, 1, 2], None)
    row = report.row("T5", ["text", "no-limiter + fira", "fira + fira", "? 2/1"], [0, 1, 2], None)  # sums
    assert "| +0.0510 ± 0.0025 |  | 0 1 2 |" in row  # without the means of sums


def test_a_run_that_diverged_is_named_and_left_out_of_the_interval(results):
    for seed, loss in enumerate((1.3, math.inf, 1.4)):
        keep("fira", seed, 1.1)
        keep("no-limiter", seed, loss)
        keep("default", seed, 1.1)
        keep("variant-spam", seed, loss, state_bytes=None)
    row = report.row("T5", ["text", "no-limiter", "fira", "+"], [0, 1, 2], None)
    assert "| 0 2 | " in row and row.endswith("; no-limiter diverged with seed 1 |")
    assert report.row("T5", ["text", "no-limiter", "fira", "+"], [1], None).endswith(
        " no-limiter diverged with seed 1 |"
    )
    assert "| inf |" in reductions.variants(["variant-spam"], [0, 1, 2])


def test_a_run_whose_name_stands_for_other_flags_by_now_is_none(results):
    keep("fira", 0, 1.1)
    keep("matrix", 0, 1.1, flags="--lr 3")
    assert stored.load("fira", 0) and stored.load("matrix", 0) is None


def test_seed_0_chooses_and_runs_of_older_code_are_marked(results):
    for i, run in enumerate(claims.GRIDS["F12"]["sgd"]):
        keep(run, 0, 2.0 - (i == 1))
        assert stored.chosen("F12", "sgd") == (claims.GRIDS["F12"]["sgd"][1] if i == 3 else None)
    best = stored.chosen("F12", "sgd")
    assert (best, 1) in paper.needed("F12", [1]) and ("adamw", 1) in paper.needed("F12", [1])
    keep(best, 1, 1.5)
    keep("adamw", 1, 1.2, code="older")
    keep("fira", 1, 1.1)
    page = report.section("F12", [1])
    assert "| +0.3000 † |" in page and page.count(" † |") == 1 and "**1.0000**" in page and not paper.needed("F12", [1])


def test_a_recorders_run_is_trained_again_where_its_record_is_lost(results, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "OUT", tmp_path)
    run = "fira-svd-r8"
    keep(run, 0, 1.1)
    assert (run, 0) in paper.needed("T1", [0])
    similar = stored.RESULTS.with_name("similarity-seed0.json")
    for path in (tmp_path / f"{run}-seed0" / "record.npz", similar):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert (run, 0) not in paper.needed("T1", [0])
        path.unlink()


@pytest.mark.parametrize(
    "file, old, new, same",
    [
        ("fira.py", '"""One step on one matrix', '"""A step of a matrix', True),
        ("train.py", "  # the best found at nano", "  # the best", True),
        ("fira.py", "+ 1e-8", "+ 1e-7", False),
        ("train.py", "2**17", "2**16", False),
        ("train.py", '"gamma": 1.01}', '"gamma": 1.02}', False),
        ("train.py", '"batch_size": 16, "grad_accum": 1', '"batch_size": 8, "grad_accum": 1', False),
        ("train.py", "0.55 + 0.45", "0.5 + 0.5", False),
        ("train.py", 'GROUP_FLAGS = ("rank", ', "GROUP_FLAGS = (", False),
        ("model.py", '"nano": ("llama", 128', '"nano": ("llama", 64', False),
    ],
)
def test_the_hash_is_of_the_arithmetic_only(file, old, new, same, tmp_path, monkeypatch):
    before = stored.code_hash()
    for name in ("fira.py", "model.py", "train.py"):
        text = open(name, encoding="utf-8").read()
        assert old in text or name != file
        (tmp_path / name).write_text(text.replace(old, new) if name == file else text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert (stored.code_hash() == before) == same


def test_the_whole_page_and_every_picture_from_made_up_runs(results, tmp_path, monkeypatch):
    figures = dict.fromkeys(
        ("step", "loss", "energy_share", "mean_phi", "S_norm", "S_limited", "matrices_limited"), [*range(10, 760, 10)]
    )
    for module in (stored, choices):  # or 1,000 files would be parsed
        monkeypatch.setattr(module, "code_hash", lambda flags="": "x")
    for run in claims.RUNS:
        for seed in range(4):
            keep(run, seed, 1.1 + random.random() / 10, log=figures)
    similar = {f"cosine {pair} by step": [0.5] * 75 for pair in ("R, full", "R, G", "R, X", "G, X")}
    similar |= {"phi of matrices": np.ones((75, 28)).tolist(), "column cosine": 0.9}
    similar |= {f"level {pair}{chance}": 0.7 for pair in ("R/G", "R/X") for chance in ("", " chance")}
    similar = dict.fromkeys(claims.CLAIMS["T1"]["rows"][0][1].split(), similar)
    stored.RESULTS.with_name("similarity-seed0.json").write_text(json.dumps(similar))
    report.write(tmp_path / "RESULTS.md")
    page = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert all(f"## {name}: " in page for name in claims.CLAIMS) and "†" not in page.split("## fair")[1]
    pytest.importorskip("matplotlib")
    from experiments import figures

    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setattr("sys.argv", ["figures"])
    figures.main()
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert all(f"{name} " in figures.__doc__ for name in sizes)
    assert len(sizes) == 12 and max(sizes.values()) < 120_000


def test_spikes_are_found_above_the_other_runs_loss_on_the_same_batches():
    rng = np.random.default_rng(0)
    batches, own = rng.normal(3, 0.5, 750), rng.normal(0, 0.01, 750)
    own[[133, 403]] += 0.5
    own[600:640] += 0.3  # long, and still one
    own[:60] += np.linspace(-1, 0, 60)  # before the warm-up's end anything may happen
    steps, heights, rise = reductions.find_spikes(batches + own, batches)
    assert steps.tolist() == [133, 403, 600] and heights == pytest.approx([0.5, 0.5, 0.3], abs=0.1)
    assert rise == pytest.approx(heights.max() / max(0.05, 6 * 0.01), rel=0.2)


def test_who_leads_on_the_way(results):
    for seed in range(3):
        keep("adamw", seed, 1.2, evaluations=[[187, 2.0 + seed], [375, 1.6], [1500, 1.2]])
        keep("default", seed, 1.1, evaluations=[[187, 1.9 + seed + seed / 1000], [1500, 1.1]])
        keep("fira", seed, 1.1, evaluations=[[187, 2.1 + seed + seed / 1000], [1500, 1.1]])
    lines = reductions.curves(["default", "fira", "adamw"], [0, 1, 2]).splitlines()
    assert lines[0] == "| minus adamw at step | 187 | 1500 | verdict |"
    assert lines[2].startswith("| default | -0.099 ± 0.002 | -0.100 ± 0.000 |") and "**contradicted**" in lines[2]
    assert lines[3].endswith(": confirmed |")


def test_coefficients_have_the_textbooks_values():
    x = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110.0])
    y = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17.0])
    assert spearman(x, y) == pytest.approx(-29 / 165)
    assert kendall(x, y) == pytest.approx(-1 / 9)
    tied = np.array([1, 2, 2, 3.0])
    assert spearman(tied, np.array([1, 2, 3, 4.0])) == pytest.approx(0.9486833)
    assert kendall(tied, np.array([1, 2, 3, 4.0])) == pytest.approx(5 / math.sqrt(5 * 6))
    assert (pearson(x, 3 - 2 * x), cosine(x, 2 * x)) == pytest.approx((-1, 1))


def test_similarity_of_a_run_with_itself_and_the_level_where_all_entries_have_one_size():
    rng = np.random.default_rng(0)
    R, X = rng.uniform(1, 2, (2, 12, 28 * 16))
    norms = [R, np.hypot(R, X), X, *(np.full_like(R, math.sqrt(n)) for n in (8, 32, 32))]
    figures = similarity.reduce(*2 * [{"norms": np.stack(norms, 1), "shapes": np.array([[8, 32, 16]] * 28)}])
    assert [figures[k] for k in ("column cosine", "within R, full", "matrix Kendall")] == pytest.approx([1, 1, 1])
    assert figures["level R/X"] == pytest.approx(figures["level R/X one size"])


def test_the_level_of_a_random_subspace_is_chance():
    """What the recorder keeps of independent entries and a random P: R/G 1, R/X √(1 − r/m)."""
    recorder, generator, shape, r = Recorder(), torch.Generator().manual_seed(0), (32, 48), 8
    P = torch.linalg.qr(torch.randn(32, r, generator=generator)).Q
    moments = [[torch.zeros(r, 48) for _ in range(2)] for _ in range(MATRICES)]
    for _ in range(240):
        for M, V in moments:
            G = torch.randn(shape, generator=generator)
            R = P.T @ G
            M.lerp_(R, 0.1)
            V.mul_(0.999).addcmul_(R, R, value=0.001)
            recorder.update(None, G, P, R, M / V.sqrt(), None, original=lambda *args: {})
    record = {"norms": np.stack(recorder.rows), "shapes": np.array([recorder.shapes[i] for i in range(MATRICES)])}
    figures = similarity.reduce(record, record)
    assert figures["level R/G"] == pytest.approx(1, abs=0.02)
    assert figures["level R/X"] == pytest.approx(figures["level R/X chance"], abs=0.02)
    assert figures["level R/X chance"] == pytest.approx(math.sqrt(0.75))


def test_shrink_is_its_formula():
    """S ← S (μ ‖S‖ + (1 − μ) ‖S_prev‖) / ‖S‖ with every matrix written out."""
    original, rng = fira.fira_update, torch.Generator().manual_seed(0)
    try:
        patches.shrink("0.25")
        P, W = torch.linalg.qr(torch.randn(8, 3, generator=rng, dtype=torch.float64)).Q, torch.zeros(8, 12).double()
        slow, prev, prev_norm = W.clone(), None, torch.tensor(math.inf, dtype=torch.float64)
        for size in (1.0, 5.0, 0.1):
            G = size * torch.randn(8, 12, generator=rng, dtype=torch.float64)
            R = P.T @ G
            N = R.sign() * R.abs().sqrt()
            options = {"scaling": "column", "gamma": 1.01, "alpha": 0.25, "b": 1.0, "k": 1.0}
            fira.fira_update(W, G, P, R, N, prev_norm, torch.tensor(0.01).double(), **options)
            S = N.norm(dim=0) / R.norm(dim=0) * (G - P @ R)
            S *= 1 if prev is None else 0.25 + 0.75 * prev / S.norm()
            prev, slow = S.norm(), slow - 0.01 * (0.25 * P @ N + S)
            torch.testing.assert_close(W, slow, rtol=1e-6, atol=1e-9)
    finally:
        fira.fira_update = original


def gradients_seen(monkeypatch, change, *words, steps=3):
    """What the step of a Fira sees of gradients of ones, of a matrix and of a vector, with a change of patches.py."""
    matrix, vector = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((8, 12), (3,)))
    optimizer, seen = fira.Fira([{"params": [matrix], "rank": 4}, {"params": [vector]}]), []
    monkeypatch.setattr(train, "build", lambda *args: (None, optimizer))
    change(*words)
    assert train.build() == (None, optimizer)
    for _ in range(steps):
        matrix.grad, vector.grad = torch.ones(8, 12), torch.ones(3)
        optimizer.step()
        seen.append([matrix.grad.clone(), vector.grad.clone()])
    return seen


def test_a_spike_is_planted_in_one_step_and_in_the_matrices_only(monkeypatch):
    seen = gradients_seen(monkeypatch, patches.spike, "2")
    assert [[x.unique().item() for x in pair] for pair in seen] == [[1, 1], [1000, 1], [1, 1]]


@pytest.mark.parametrize("change, of_vector", [(patches.noise, True), (patches.noise_blocks, False)])
def test_noise_has_the_size_asked_for_and_is_new_in_each_step(change, of_vector, monkeypatch):
    seen = gradients_seen(monkeypatch, change, "0.5", steps=30)
    noise = torch.stack([matrix - 1 for matrix, _ in seen])
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(noise[0], noise[1])
    assert all(bool((vector != 1).any()) == of_vector for _, vector in seen)


def test_inside_takes_the_kind_and_the_rate_of_the_matrices(monkeypatch):
    monkeypatch.setattr(train, "Fira", fira.Fira)
    patches.inside("lion", "0.3")
    matrix, vector = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((8, 12), (3,)))
    optimizer = train.Fira([{"params": [matrix], "rank": 4}, {"params": [vector]}], lr=0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3 * 0.02, 0.02]
    assert optimizer.defaults["kind"] == "lion"


@pytest.mark.parametrize("rank", [None, 16, 128])
def test_the_formula_of_the_state_counts_what_there_is(rank):
    model = Transformer(ModelConfig.preset("9m", 64, 16))
    groups = fira.param_groups(model, rank)
    optimizer = fira.Fira(groups)
    model(*torch.zeros(2, 1, 16, dtype=torch.long)).backward()
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in tensors) == state_bytes(groups)
