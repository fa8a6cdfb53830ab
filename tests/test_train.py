"""Tests of train.py: what a run learns, writes and says, runs by name, comparisons, and a user's mistakes."""

import gc
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fira
import model
import train
from fira import Fira

ROOT = Path(train.__file__).resolve().parent
SMALL = "--data text.txt --steps 20 --eval_interval 10 --block_size 32 --batch_size 4 --rank 8 --update_proj_gap 15"
SMALL = [*SMALL.split(), "--device", "cpu"]
UPDATE = fira.fira_update


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in, with a text of 20 kB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 20)
    Path("text.txt").write_text(((ROOT / "fira.py").read_text() + (ROOT / "model.py").read_text())[:20_000])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    train.STOP.clear()
    fira.fira_update = UPDATE
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def runs(*arguments, code=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            train.main()
        except SystemExit as stopped:
            assert (stopped.code or 0) == code, stopped.code


def fails(*arguments, says):
    """The run must stop with one line that holds `says`. Returns the line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            train.main()
    line = str(stopped.value.code)
    del stopped
    gc.collect()  # the frames that the error kept, and with them the lock
    assert line.startswith("error: ") and "\n" not in line and says in line, line
    return line


def log(name):
    return [json.loads(line) for line in Path("out", name, "log.jsonl").read_text().splitlines()]


def checkpoint(name):
    return torch.load(Path("out", name, "ckpt.pt"), weights_only=True)


def same_weights(a, b):
    return all(torch.equal(value, checkpoint(b)["model"][name]) for name, value in checkpoint(a)["model"].items())


def process(*arguments, **options):
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


# A run


@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
def test_a_run_learns_and_writes_what_it_says(capsys, precision):
    runs(*SMALL, "--steps", 40, "--precision", precision, "--name", "run")
    printed = capsys.readouterr().out
    for words in ("869,760 parameters", "28 matrices at rank 8, 11 others AdamW", "tuned for 1,500 steps", "out/run"):
        assert words in printed
    entries = log("run")
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40]
    assert entries[-1]["val_loss"] < entries[0]["val_loss"] < math.log(257) and entries[-1]["loss"] < entries[0]["loss"]
    assert entries[-1]["bits_per_byte"] == pytest.approx(entries[-1]["val_loss"] / math.log(2), rel=1e-3)
    assert json.loads(Path("out/run/config.json").read_text())["rank"] == 8
    assert Path("out/run/sample.txt").read_text() and Path("out/run/curves.png").stat().st_size > 10_000
    saved, result = checkpoint("run"), entries[-1]
    assert saved["step"] == 40 and saved["shape"]["d_model"] == 128 and saved["log"] == entries
    assert {v.dtype for v in saved["model"].values()} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    state = [v for s in saved["optimizer"]["state"].values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in state) == result["state_bytes"] and "peak_bytes" not in result
    assert f" {result['val_loss']:.4f} " in printed and f" {result['state_bytes']:,} " in printed  # in the table


def test_a_run_of_any_length_is_evaluated_eight_times():
    for steps in (8, 9, 31, 150, 1500, 100_000):
        config = train.Config(steps=steps).resolve()
        assert steps // config.eval_interval + bool(steps % config.eval_interval) >= 8
        assert config.eval_interval <= 1000
    runs(*SMALL, "--eval_interval", 3, "--name", "run")
    assert [entry["step"] for entry in log("run") if "val_loss" in entry] == [3, 6, 9, 12, 15, 18, 20]


def test_batches_and_initial_weights_are_those_of_the_seed():
    configs = [train.Config(optimizer=name, seed=3).resolve() for name in ("fira", "adamw", "lora")]
    weights = [train.build(config, 257)[0].state_dict() for config in configs]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
        assert torch.equal(weight, weights[2].get(name, weights[2].get(name.replace(".weight", ".linear.weight"))))
    tokens = np.arange(10_000) % 257
    a, b = (train.batch(tokens, config, step=5) for config in configs[:2])
    assert torch.equal(a, b) and a.shape == (1, 16, 129) and not torch.equal(a, train.batch(tokens, configs[0], step=6))
    other = train.Config(seed=4).resolve()
    assert not torch.equal(a, train.batch(tokens, other, step=5))
    assert torch.equal(train.batch(np.arange(129), configs[0], step=1)[0, 0], torch.arange(129))  # the shortest text


def test_the_learning_rate_warms_up_and_decays_to_a_tenth(monkeypatch):
    config = train.Config(steps=100).resolve()
    rates = [train.schedule(step, config) for step in range(1, 101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[99] == pytest.approx(0.1) and max(rates) == 1.0
    assert rates[54] == pytest.approx(0.55) and all(a > b for a, b in zip(rates[9:], rates[10:]))
    used, step = [], Fira.step
    monkeypatch.setattr(Fira, "step", lambda self: used.append(self.param_groups[0]["lr"]) or step(self))
    runs(*SMALL, "--lr", 0.004, "--name", "run")
    rates = [0.004 * train.schedule(step, train.Config(steps=20).resolve()) for step in range(1, 21)]
    assert used == pytest.approx(rates, rel=1e-12) and [e["lr"] for e in log("run")] == [used[9], used[19]]


def test_a_group_keeps_its_own_learning_rate(monkeypatch):
    seen, groups, step = [], fira.param_groups, Fira.step
    own = lambda *a, **k: [group | {"lr": 0.5 / (i + 1)} for i, group in enumerate(groups(*a, **k))]
    monkeypatch.setattr(fira, "param_groups", own)
    monkeypatch.setattr(Fira, "step", lambda self: seen.append([g["lr"] for g in self.param_groups]) or step(self))
    runs(*SMALL, "--steps", 20)
    assert seen[:2] == [[0.25, 0.125, 0.5 / 6], [0.5, 0.25, 0.5 / 3]]


@pytest.mark.parametrize(
    "flags",
    [*train.METHODS, "fira --scaling matrix", "fira --scaling unit --gamma inf", "fira --only_scaling --rank 1"],
)
def test_every_method_trains(flags):
    runs(*SMALL, "--steps", 10, "--name", "run", "--optimizer", *flags.split())
    assert log("run")[-1]["val_loss"] < 5.4
    assert ("energy_share" in log("run")[-1]) == (flags not in ("adamw", "lora", "galore"))


def test_gradient_accumulation_is_a_larger_batch():
    for name, batch_size, grad_accum in (("whole", 8, 1), ("parts", 2, 4)):
        sizes = ["--batch_size", batch_size, "--grad_accum", grad_accum]
        runs(*SMALL, "--steps", 3, "--eval_interval", 1, *sizes, "--name", name)
    assert [e["loss"] for e in log("whole")] == pytest.approx([e["loss"] for e in log("parts")], rel=1e-4)


def test_clipping_and_decay_change_the_weights():
    runs(*SMALL, "--steps", 2, "--optimizer", "adamw", "--name", "plain")
    for flag in ("--grad_clip", "--weight_decay"):
        runs(*SMALL, "--steps", 2, "--optimizer", "adamw", flag, 0.01, "--name", flag[2:])
        assert not same_weights("plain", flag[2:])


def test_layerwise_and_checkpointing_train_the_same(monkeypatch):
    steps, step, calls = [], Fira.step, []
    recompute = model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *a, **k: calls.append(1) or recompute(*a, **k))
    runs(*SMALL, "--name", "plain")
    assert not calls
    runs(*SMALL, "--checkpointing", "--name", "checkpointing")
    assert len(calls) >= 4 * 20 and same_weights("plain", "checkpointing")

    def count(self):
        steps.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
        step(self)

    monkeypatch.setattr(Fira, "step", count)
    runs(*SMALL, "--layerwise", "--name", "layerwise")
    assert max(steps) == 1 and steps.count(1) == 39 * 20 and same_weights("plain", "layerwise")


def test_compile_compiles_the_model_and_the_update(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append((f, options)) or f)
    runs(*SMALL, "--compile", "--steps", 2)
    assert compiled[1] == (UPDATE, {"dynamic": False}) and isinstance(compiled[0][0], model.Transformer)


def test_the_figures_of_the_subspaces_are_read_in_every_tenth_step_alone(monkeypatch):
    class Seen(dict):
        def values(self):
            reads.append(1)
            return super().values()

    t, reads, step = torch.tensor, [], Fira.step
    a = {"G": t([3.0, 4.0]), "R": t([0.0, 3.0]), "phi": t([1.0, 2.0]), "S": t(4.0), "limited": t(3.0)}
    b = {"G": t([5.0]), "R": t([4.0]), "phi": t([6.0]), "S": t(3.0), "limited": t(3.0)}
    monkeypatch.setattr(Fira, "step", lambda self: step(self) or setattr(self, "seen", Seen({0: a, 1: b, 2: {}})))
    runs(*SMALL, "--steps", 25, "--eval_interval", 25, "--name", "run")
    assert len(reads) == 3 and [entry["step"] for entry in log("run")] == [10, 20, 25]
    expected = {"energy_share": 0.5, "mean_phi": 3.0, "S_norm": 5.0, "S_limited": 18**0.5, "matrices_limited": 1}
    assert [{k: e[k] for k in expected} for e in log("run")] == [pytest.approx(expected)] * 3


def test_warnings(capsys):
    runs(*SMALL, "--steps", 2, "--rank", 200)
    printed = capsys.readouterr().out
    assert "0 matrices have a subspace; 28 are not wider than --rank 200" in printed and "tuned for 1,500" in printed
    runs(*SMALL, "--steps", 2, "--optimizer", "adamw")
    assert "have a subspace" not in capsys.readouterr().out


def test_a_terminal_of_80_columns_is_wide_enough():
    import fcntl
    import pty
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, np.array([24, 80, 0, 0], np.uint16).tobytes())
    flags = [*SMALL, "--eval_interval", "5", "--optimizer", "fira_released", "adamw", "--threads", "1"]
    command = [sys.executable, ROOT / "train.py", *flags]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=child, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    os.close(child)
    drawn = b""
    try:
        while part := os.read(parent, 4096):
            drawn += part
    except OSError:  # the terminal's way to say that nobody writes any more
        pass
    os.close(parent)
    out = running.communicate(timeout=60)[0]
    lines = re.sub(r"sample     -+\n.*?\n-{71}\n", "", out, flags=re.S).splitlines()
    bars = re.sub(r"\x1b\[\w", "", drawn.decode()).replace("\n", "\r").split("\r")
    assert running.returncode == 0, drawn
    assert max(len(line) for line in lines if not line.startswith("data ")) <= 80 and max(map(len, bars)) <= 80
    assert any("evaluating" in bar and "%" in bar for bar in bars), bars
    assert any("ms/step" in bar for bar in bars), bars


# Names


def test_a_run_never_displaces_another():
    assert train.Config(steps=1500).resolve().folder == Path("out/nano-stdlib-fira-seed0")
    runs(*SMALL, "--steps", 2)
    first = Path("out/nano-text-fira-seed0/ckpt.pt").read_bytes()
    for name in ("nano-text-fira-seed0-2", "nano-text-fira-seed0-3"):
        runs(*SMALL, "--steps", 2, "--lr", 0.001)
        assert json.loads(Path("out", name, "config.json").read_text())["name"] == name
    assert Path("out/nano-text-fira-seed0/ckpt.pt").read_bytes() == first
    fails(*SMALL, "--name", "bad", "--lr", 1e6, says="not finite")
    runs(*SMALL, "--steps", 2, "--name", "bad")  # a run that failed before its first checkpoint has nothing to keep
    assert checkpoint("bad")["step"] == 2 and not Path("out/bad-2").exists()


def test_resume_sample_and_export_take_a_name_or_a_folder(capsys):
    pytest.importorskip("transformers")
    runs(*SMALL, "--name", "one")
    capsys.readouterr()
    for name in ("one", "out/one", Path("out/one").resolve()):
        runs("--name", name, "--sample", "def main(")
        printed = capsys.readouterr().out
        assert re.match(r"using +\S*out/one at step 20\ndef main\(", printed) and len(printed) > 45
    runs("--name", "one", "--resume", "--steps", 30)
    assert "out/one, step 20 of 30" in capsys.readouterr().out and checkpoint("one")["step"] == 30
    runs("--name", "out/one", "--export", "exported")
    assert json.loads(Path("exported/config.json").read_text())["eos_token_id"] == 256
    fails("--name", "oen", "--sample", "x", says="cannot go on with out/oen/ckpt.pt: ")
    fails("--name", "oen", "--sample", "x", says="the nearest runs: one")
    runs(*SMALL, "--init_from", "exported", "--lr", 1e-6, "--name", "tuned")
    assert log("tuned")[-1]["val_loss"] == pytest.approx(log("one")[-1]["val_loss"], abs=5e-3)
    assert train.Config(init_from="exported").resolve().lr == pytest.approx(2e-3)  # a tenth
    fails(*SMALL, "--init_from", "exported", "--model", "60m", says="--model goes without --init_from")
    fails(*SMALL, "--init_from", "nowhere/at/all", says="nowhere")


# Comparing


def test_compare_shows_what_differs_and_trains_nothing(capsys, monkeypatch):
    runs(*SMALL, "--name", "a")
    runs(*SMALL, "--name", "b", "--lr", 0.03)
    runs(*SMALL, "--name", "c", "--optimizer", "galore", "--lr", 0.02, "--rank", 4)
    capsys.readouterr()
    monkeypatch.setattr(train, "train", None)
    runs("--compare", "a", "out/b")
    table = capsys.readouterr().out
    for name, label in (("a", "a, lr 0.02 "), ("b", "b, lr 0.03 ")):
        assert re.search(rf"^{label} +20 +{log(name)[-1]['val_loss']:.4f} ", table, flags=re.M)
    assert Path("out/compare.png").stat().st_size > 10_000
    with open("out/c/log.jsonl", "r+") as file:  # killed after step 10, in the middle of a line
        file.truncate(len(file.readline()) + 30)
    runs("--compare", "a", "c")
    table = capsys.readouterr().out
    assert (
        re.search(r"^c, optimizer galore, rank 4 +10 +\d", table, flags=re.M) and "a, optimizer fira, rank 8" in table
    )
    Path("out/b/config.json").write_text("nonsense")
    fails("--compare", "a", "b", says="Expecting value")
    fails("--compare", "a", "bb", says="no run 'bb'; the nearest runs: b, ")
    Path("out/a/log.jsonl").write_text('{"step": 10, "loss": 3.0, "ms_per_step": 80.0}\n')  # killed soon
    runs("--compare", "a", "c")
    assert re.search(r"^a, optimizer fira, rank 8 +not yet evaluated$", capsys.readouterr().out, flags=re.M)


def test_several_optimizers_one_after_the_other(capsys, monkeypatch):
    build = train.build

    def sick(config, *arguments):
        if config.optimizer == "galore":
            raise RuntimeError("no memory left")
        return build(config, *arguments)

    monkeypatch.setattr(train, "build", sick)
    runs(*SMALL, "--optimizer", "fira", "galore", "adamw", code=1)
    printed = capsys.readouterr().out
    assert "galore failed: RuntimeError: no memory left" in printed
    table = printed[printed.rindex("val loss") :]
    assert "seed0, optimizer fira, lr 0.02 " in table and "galore" not in table
    assert "optimizer adamw, lr 0.002 " in table
    assert Path("out/compare.png").exists()
    fails(*SMALL, "--optimizer", "fira", "glore", says="did you mean galore?")  # before any training
    assert not Path("out/nano-text-fira-seed0-2").exists()


def test_without_matplotlib_it_says_so_before_training(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    runs(*SMALL, "--steps", 2, "--name", "run")
    printed = capsys.readouterr().out
    assert "without matplotlib" in printed.split("step 1")[0] and not Path("out/run/curves.png").exists()
    assert Path("out/run/sample.txt").exists()


# Variants

VARIANT = """
from fira import Fira
class Mine(Fira):
    def inner(self, R, state, group):
        return R.sign(), 0.01
Same = Mine
"""


def test_a_variant_trains_and_resumes():
    Path("mine.py").write_text(VARIANT)
    runs(*SMALL, "--variant", "mine.py")
    name = "nano-text-mine-seed0"
    assert json.loads(Path("out", name, "config.json").read_text())["variant"] == "mine.py"
    for arguments in ([], ["--name", name, "--resume", "--steps", 22]):
        runs(*arguments) if arguments else None
        state = checkpoint(name)["optimizer"]["state"]
        assert not any(s["exp_avg"].any() for s in state.values() if "projection" in s)  # its own inner ran
    assert checkpoint(name)["step"] == 22


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "No such file"),
        ("from fira import Fira", "must define one subclass of Fira, but defines 0"),
        (VARIANT + "class Other(Fira):\n    pass\n", "must define one subclass of Fira, but defines 2"),
    ],
)
def test_a_bad_variant_is_one_line(content, says):
    if content:
        Path("bad.py").write_text(content)
    fails(*SMALL, "--variant", "bad.py", says=says)
    assert not Path("out").exists()


# A user's mistakes


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "60n"], "did you mean 60m?"),
        (["--optimizer", "adam"], "did you mean adamw?"),
        (["--data", "shakespear"], "shakespeare"),
        (["--device", "cuda:77"], "no device 'cuda:77' here, only cpu"),
        (["--device", "gpu"], "no device 'gpu'"),
        (["--rank", "0"], "--rank 0 must be from 1"),
        (["--lr", "-1"], "--lr -1.0 must be from 0"),
        (["--lr", "nan"], "--lr nan must be from 0"),
        (["--alpha", "1e300"], "--alpha 1e+300 must be from 0 to 1e9"),
        (["--gamma", "0.9"], "gamma=0.9"),
        (["--steps", "0"], "--steps 0"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--alpha_mode", "papr"], "did you mean paper?"),
        (["--scaling", "row"], "unknown scaling 'row'"),
        (["--block_size", "99999"], "shorter than --block_size 99999"),
        (["--resume"], "cannot go on with out/nano-text-fira-seed0/ckpt.pt"),
        (["--sample", "x"], "No such file or directory"),
        (["--seed", "99999999999999999999999"], "--seed"),
        (["--layerwise", "--grad_accum", "2"], "--layerwise frees each gradient at once"),
        (["--layerwise", "--grad_clip", "1"], "--layerwise frees each gradient at once"),
        (["--layerwise", "--model", "9m"], "--layerwise frees each gradient at once"),  # whose grad_accum is 16
        (["--data", "memory.txt"], "no data 'memory.txt'"),  # the word alone is no lack of memory
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_flags_are_named_in_one_line(arguments, says):
    data = [] if "--data" in arguments else ["--data", "text.txt"]
    fails(*data, *arguments, says=says)
    assert not Path("out").exists()


def test_wrong_types_and_unknown_flags_are_one_line(capsys):
    for arguments in (["--steps", "many"], ["--stepps", "3"], ["what"]):
        runs(*arguments, code=2)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and arguments[-1] in error


def test_output_that_is_not_utf8():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "RANK": "abc"}  # not torchrun's
    help = process("--help", env=environment)
    assert help.returncode == 0 and "?, GaLore's factor" in help.stdout and "(default 0.8)" in help.stdout
    for name in train.Config.__dataclass_fields__:
        assert f"--{name} " in help.stdout
    Path("text.txt").write_text("äöü αβγ\n" * 5000, encoding="utf-8")
    run = process(*SMALL, "--steps", 1, "--name", "run", env=environment | {"LC_ALL": "C"})
    assert run.returncode == 0, run.stderr
    Path("out/run/sample.txt").read_text(encoding="utf-8")


def test_a_loss_or_a_weight_that_is_not_finite_is_not_saved(monkeypatch):
    forward, calls = model.Transformer.forward, []

    def sick(self, tokens, targets=None, **options):
        loss = forward(self, tokens, targets, **options)
        calls.append(torch.is_grad_enabled())
        return loss * math.nan if sum(calls) == 17 and calls[-1] else loss

    monkeypatch.setattr(model.Transformer, "forward", sick)
    fails(*SMALL, "--optimizer", "adamw", "--name", "loss", says="the loss or a weight is not finite at step 20")
    assert checkpoint("loss")["step"] == 10 and all(v.isfinite().all() for v in checkpoint("loss")["model"].values())
    monkeypatch.setattr(model.Transformer, "forward", forward)
    steps, step = [], Fira.step

    def broken(self):
        step(self)
        steps.append(1)
        if len(steps) == 20:
            self.param_groups[0]["params"][0].data[0, 0] = math.nan

    monkeypatch.setattr(Fira, "step", broken)
    fails(*SMALL, "--name", "weight", says="the loss or a weight is not finite at step 20")
    assert checkpoint("weight")["step"] == 10


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs(*SMALL)


def test_out_of_memory_is_one_line(monkeypatch):
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")):
        with monkeypatch.context() as patch:
            patch.setattr(train, "build", lambda *a: exec("raise error", {"error": error}))
            fails(*SMALL, says="out of memory")


def test_out_of_memory_on_the_cpu_is_one_line(monkeypatch):
    def build(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(train, "build", build)
    fails(*SMALL, says="out of memory: try a smaller --batch_size")
