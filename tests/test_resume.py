"""Tests of train.py: kills, Ctrl-C, full disks, readers that go, other processes; a run goes on bit for bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import ROOT, SMALL, checkpoint, fails, log, runs, same_weights, workplace  # noqa: F401


def start(*arguments):
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for(condition, process):
    until = time.monotonic() + 90
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def lines(name):
    path = Path("out", name, "log.jsonl")
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_killed_runs_resume_bit_for_bit(precision):
    flags = [*SMALL, "--steps", 80, "--eval_interval", 30, "--precision", precision]
    runs(*flags, "--name", "straight")
    first = start(*flags, "--name", "broken")
    wait_for(lambda: lines("broken") >= 1, first)
    first.send_signal(signal.SIGINT)
    last = first.communicate(timeout=60)[0].splitlines()[-1]
    assert (
        first.returncode == 130 and last == "stopped and saved; go on with: python train.py --name out/broken --resume"
    )
    assert 10 <= checkpoint("broken")["step"] < 80
    second = start("--name", "out/broken", "--resume")
    wait_for(lambda: checkpoint("broken")["step"] >= 30 and lines("broken") >= 4, second)
    second.kill()
    second.communicate(timeout=60)
    assert 30 <= checkpoint("broken")["step"] <= 60
    with open("out/broken/log.jsonl", "a") as file:
        file.write('{"step": 79')  # half a line, as a kill can leave
    runs(*flags, "--name", "broken", "--resume")
    assert checkpoint("broken")["step"] == 80 and same_weights("straight", "broken")
    a, b = (checkpoint(name)["optimizer"]["state"].values() for name in ("straight", "broken"))
    assert all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for s, t in zip(a, b) for k in s)
    evaluated = [{e["step"]: e["val_loss"] for e in log(name) if "val_loss" in e} for name in ("straight", "broken")]
    steps = [entry["step"] for entry in log("broken")]
    assert evaluated[0] == evaluated[1] and steps == sorted(set(steps)) and {*range(10, 81, 10)} <= {*steps}
    assert [e["lr"] for e in log("straight")] == [e["lr"] for e in log("broken") if e["step"] % 10 == 0]


def test_what_does_not_fit_is_not_resumed():
    flags = [*SMALL, "--name", "run"]
    runs(*flags)
    fails(*flags, "--resume", "--rank", 16, says="was trained with --rank 8, not 16")
    fails(*flags, "--resume", "--optimizer", "adamw", says="was trained with --optimizer fira, not adamw")
    path = Path("out/run/ckpt.pt")
    good, whole = path.read_bytes(), checkpoint("run")
    for damaged in (good[: len(good) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        fails(*flags, "--resume", "--steps", 30, says="cannot go on with out/run/ckpt.pt")
    torch.save(whole | {"optimizer": {"state": {}, "param_groups": []}}, path)
    fails(*flags, "--resume", "--steps", 30, says="error: ")
    path.write_bytes(good)
    meta = Path("data/text/meta.json").read_text()
    Path("data/text/meta.json").write_text(json.dumps(json.loads(meta) | {"sha256": "0"}))
    fails("--name", "run", "--resume", "--steps", 30, says="data/text is not what out/run was trained on")
    Path("data/text/meta.json").write_text(meta)
    sample = Path("out/run/sample.txt").read_text()
    Path("out/run/sample.txt").unlink()  # killed after the last checkpoint
    runs(*flags, "--resume")
    assert Path("out/run/sample.txt").read_text() == sample and path.exists()
    path.unlink()
    fails(*flags, "--resume", says="cannot go on with out/run/ckpt.pt")


def test_two_runs_of_one_name():
    first = start(*SMALL, "--steps", 5000, "--eval_interval", 5000, "--name", "run")
    wait_for(lambda: lines("run") >= 1, first)
    config = Path("out/run/config.json").read_text()
    fails(*SMALL, "--lr", 1, "--name", "run", says="another process is at work in out/run")
    assert Path("out/run/config.json").read_text() == config
    first.kill()  # which frees the folder
    first.communicate(timeout=60)
    runs(*SMALL, "--name", "run")
    assert checkpoint("run")["step"] == 20 and not Path("out/run-2").exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint():
    runs(*SMALL, "--name", "run")
    before, size = Path("out/run/ckpt.pt").read_bytes(), Path("out/run/ckpt.pt").stat().st_size // 2
    limited = f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import train; "
    limited += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    limited += "sys.argv[1:] = ['--name', 'run', '--resume', '--steps', '30']; train.main()"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: cannot write out/run/ckpt.pt")
    assert "Traceback" not in done.stderr and Path("out/run/ckpt.pt").read_bytes() == before
    assert not list(Path("out/run").glob("*.tmp"))


def test_a_reader_that_goes_does_not_stop_a_run():
    process = start(*SMALL, "--name", "run")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=90) == 0 and checkpoint("run")["step"] == 20 and Path("out/run/sample.txt").exists()


def test_a_signal_stops_all_optimizers():
    both = start(*SMALL, "--steps", 5000, "--eval_interval", 5000, "--optimizer", "fira", "adamw", "--name", "two")
    wait_for(lambda: lines("two") >= 1, both)
    both.send_signal(signal.SIGTERM)
    assert "stopped and saved" in both.communicate(timeout=60)[0]
    assert both.returncode == 143 and not Path("out/two-2").exists() and checkpoint("two")["step"] >= 10


def test_two_processes_train_as_one():
    """Up to rounding, which the second change of the subspaces amplifies; one process writes."""
    flags = [*SMALL, "--grad_accum", "2"]
    runs(*flags, "--name", "one")
    flags[1] = "text"  # as it is prepared
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run([*command, *flags, "--name", "two"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20:") == 1
    for name, value in checkpoint("one")["model"].items():
        difference = (checkpoint("two")["model"][name] - value).abs()
        assert (difference > 2e-4).float().mean() < 1e-3 and difference.mean() < 1e-5
    assert [e["loss"] for e in log("two")] == pytest.approx([e["loss"] for e in log("one")], abs=1e-4)
