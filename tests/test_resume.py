"""Tests of train.py: kills, Ctrl-C, full disks, readers that go, other processes; and that a run goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import ROOT, SMALL, checkpoint, fails, log, process, runs, same_weights, workplace  # noqa: F401

import train


def start(*arguments, **options):
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options)


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def lines(name):
    path = Path("out", name, "log.jsonl")
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_killed_runs_resume_bit_for_bit(precision):
    flags = [*SMALL, "--steps", 120, "--eval_interval", 40, "--precision", precision]
    runs(*flags, "--name", "straight")
    flags += ["--name", "broken"]
    first = start(*flags)
    wait_for(lambda: lines("broken") >= 1, first)
    first.send_signal(signal.SIGINT)
    last = first.communicate()[0].splitlines()[-1]
    assert first.returncode == 130 and last.startswith("stopped and saved; go on with: python train.py --data")
    assert 10 <= checkpoint("broken")["step"] < 120
    second = start(*last.split("train.py ")[1].split())
    wait_for(lambda: checkpoint("broken")["step"] >= 40 and lines("broken") >= 5, second)
    second.kill()
    second.communicate()
    assert 40 <= checkpoint("broken")["step"] < 120
    with open("out/broken/log.jsonl", "a") as file:
        file.write('{"step": 119')  # half a line, as a kill can leave
    runs(*flags, "--resume")
    assert checkpoint("broken")["step"] == 120 and same_weights("straight", "broken")
    a, b = (checkpoint(name)["optimizer"]["state"].values() for name in ("straight", "broken"))
    assert all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for s, t in zip(a, b) for k in s)
    evaluated = [{e["step"]: e["val_loss"] for e in log(name) if "val_loss" in e} for name in ("straight", "broken")]
    steps = [entry["step"] for entry in log("broken")]
    assert evaluated[0].items() <= evaluated[1].items() and steps == sorted(set(steps))


def test_what_does_not_fit_is_not_resumed():
    flags = [*SMALL, "--name", "run"]
    runs(*flags)
    fails(*flags, "--resume", says="at step 20 already")
    fails(*flags, "--resume", "--rank", 16, says="was trained with --rank 8, not 16")
    fails(*flags, "--resume", "--optimizer", "adamw", says="was trained with --optimizer fira, not adamw")
    path = Path("out/run/ckpt.pt")
    good, middle = path.read_bytes(), path.stat().st_size // 2
    for damaged in (good[:middle], b"", b"not a checkpoint", good[:middle] + bytes(1000) + good[middle + 1000 :]):
        path.write_bytes(damaged)
        fails(*flags, "--resume", "--steps", 30, says="ckpt.pt is missing, damaged or not")
        fails("--name", "run", "--sample", "x", says="ckpt.pt is missing, damaged or not")
    path.write_bytes(good)
    whole = checkpoint("run")
    for change in (
        {"model": {}},
        {"optimizer": {}},
        {"shape": {"a": 1}},
        {"optimizer": {"state": {}, "param_groups": []}},
    ):
        torch.save(whole | change, path)
        fails(*flags, "--resume", "--steps", 30, says="ckpt.pt")
    path.write_bytes(good)
    meta = json.loads(Path("data/text/meta.json").read_text())
    Path("data/text/meta.json").write_text(json.dumps(meta | {"sha256": "0"}))
    fails("--name", "run", "--resume", "--steps", 30, says="data/text is not what out/run was trained on")
    Path("data/text/meta.json").write_text(json.dumps(meta))
    Path("out/run/result.json").unlink()  # killed after the last checkpoint
    runs(*flags, "--resume")
    assert Path("out/run/result.json").exists()
    path.unlink()
    fails(*flags, "--resume", says="ckpt.pt is missing")


def test_two_runs_of_one_name():
    first = start(*SMALL, "--steps", 5000, "--eval_interval", 5000, "--name", "run")
    wait_for(lambda: lines("run") >= 1, first)
    config = Path("out/run/config.json").read_text()
    fails(*SMALL, "--lr", 1, "--name", "run", says="another process is at work in out/run")
    assert Path("out/run/config.json").read_text() == config
    first.kill()  # which frees the folder
    first.communicate()
    runs(*SMALL, "--name", "run")


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(monkeypatch):
    runs(*SMALL, "--name", "run")
    before, size = Path("out/run/ckpt.pt").read_bytes(), Path("out/run/ckpt.pt").stat().st_size // 2
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); import sys; "
    limited += (
        f"sys.path.insert(0, {str(ROOT)!r}); import train; sys.argv[1:] = {[*SMALL, '--name', 'run', '--resume']}; "
    )
    limited += "sys.argv += ['--steps', '30']; train.main()"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: cannot write out/run/ckpt.pt")
    assert "Traceback" not in done.stderr and Path("out/run/ckpt.pt").read_bytes() == before
    assert not list(Path("out/run").glob("*.tmp"))


def test_a_reader_that_goes_does_not_stop_a_run():
    process = start(*SMALL, "--name", "run")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and checkpoint("run")["step"] == 20 and Path("out/run/result.json").exists()


def test_ctrl_c_stops_all_optimizers_and_the_command_goes_on(capsys):
    flags = [*SMALL, "--steps", 60, "--optimizer", "fira", "adamw", "--name", "two"]
    both = start(*flags)
    wait_for(lambda: lines("two-fira") >= 2, both)
    both.send_signal(signal.SIGTERM)
    last = both.communicate()[0].splitlines()[-1]
    assert both.returncode == 143 and not Path("out/two-adamw").exists()
    runs(*last.split("train.py ")[1].split())
    assert "adamw" in capsys.readouterr().out.split("val loss")[-1]
    assert log("two-fira")[-1]["step"] == log("two-adamw")[-1]["step"] == 60


def test_two_processes_train_as_one():
    """Up to rounding, which the second change of the subspaces amplifies; one process writes."""
    flags = [*SMALL, "--grad_accum", "2"]
    runs(*flags, "--name", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run([*command, *flags, "--name", "two"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20:") == 1
    for name, value in checkpoint("one")["model"].items():
        difference = (checkpoint("two")["model"][name] - value).abs()
        assert (difference > 2e-4).float().mean() < 1e-4 and difference.mean() < 1e-5
    assert [e["loss"] for e in log("two")] == pytest.approx([e["loss"] for e in log("one")], abs=1e-4)
    wrong = subprocess.run([*command, *flags, "--batch_size", "3"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode and "error: --batch_size 3 must be a multiple of the 2 processes" in wrong.stderr


def test_out_of_memory_is_one_line():
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
                  RuntimeError("Storage size calculation overflowed with sizes=[9]")):  # fmt: skip
        assert train.explain(error).startswith("out of memory: try a smaller")
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**55, dtype=torch.uint8)
    assert train.explain(real.value).startswith("out of memory")
