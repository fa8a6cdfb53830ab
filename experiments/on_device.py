"""Whether Fira is right on a device: the tests of fira.py with their tensors there.

    python -m experiments.on_device cuda

They draw random numbers on the CPU, where their generators are.
"""

import subprocess
import sys

import torch

import fira
from model import ModelConfig, Transformer
from train import METHODS


def ten_steps(device: torch.device) -> str:
    """Each method's ten steps on the device beside the same on the CPU, and no waiting for the device in a step."""
    lines = [
        "| method | largest difference to the CPU, of the update | waits for the device in a step |",
        "| --- | --- | --- |",
    ]
    for method, (_, options) in METHODS.items():
        if options is None:
            continue
        weights, waits = {}, "no"
        for place in (torch.device("cpu"), device):
            torch.manual_seed(0)
            model = Transformer(ModelConfig.preset("nano", 256, 64)).to(place)
            start = [p.detach().cpu().clone() for p in model.parameters()]
            groups = fira.param_groups(model, **{"rank": 16, "update_proj_gap": 4} | options | {"alpha": 0.25})
            optimizer = fira.Fira(groups, lr=1e-3)
            for step in range(10):
                for i, p in enumerate(model.parameters()):  # the same gradients, drawn on the CPU
                    generator = torch.Generator().manual_seed(100 * step + i)
                    p.grad = torch.randn(p.shape, generator=generator).to(place)
                if place.type == "cuda" and step % 4:  # no subspace changes, which may wait
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    optimizer.step()
                except RuntimeError as error:
                    waits = f"**yes**: {str(error).splitlines()[0]}"
                finally:
                    if place.type == "cuda":
                        torch.cuda.set_sync_debug_mode("default")
            weights[place] = torch.cat([(p.detach().cpu() - w).flatten() for p, w in zip(model.parameters(), start)])
        one, other = weights[torch.device("cpu")], weights[device]
        lines.append(f"| {method} | {((one - other).abs().max() / one.abs().max()).item():.1e} | {waits} |")
    return "\n".join(lines)


def suite(device: torch.device, seconds: float) -> str:
    """The end of what test_fira.py prints with its tensors on the device."""
    command = [sys.executable, "-m", "experiments.on_device", str(device)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"Stopped after {seconds:.0f} s."
    return "```text\n" + "\n".join((done.stdout + done.stderr).splitlines()[-20:]) + "\n```"


def placed(draw, device: str):
    """`draw`, but on the CPU, and what it drew on the device."""
    return lambda *args, **options: draw(*args, **options | {"device": "cpu"}).to(options.get("device", device))


def main() -> None:
    import pytest

    torch.set_default_device(device := sys.argv[1])
    for name in ("rand", "randn", "randint"):
        setattr(torch, name, placed(getattr(torch, name), device))
    # Left out: the test of temporaries, which counts the CPU's allocations.
    sys.exit(pytest.main(["test_fira.py", "-q", "--tb=line", "--no-header", "-k", "not no_temporary"]))


if __name__ == "__main__":
    main()
