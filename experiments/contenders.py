"""The optimizers that `benchmark.py` compares: ours, torch's, and the releases of others where they are installed."""

import importlib.util
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from fira import Fira

FAMILY = {
    "Fira, svd": {"proj_method": "svd"},
    "Fira, subspace": {"proj_method": "subspace"},
    "Fira, random": {"proj_method": "random"},
    "Fira-matrix": {"scaling": "matrix"},
    "GaLore": {"scaling": None, "proj_method": "svd"},
    "APOLLO": {"only_scaling": True, "proj_method": "random"},
}


def load(path: Path, name: str):
    """A module under another name than its own: the release's and older files are called fira, too."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contenders(rank: int, gap: int, old: Path | None) -> dict:
    """name: function from parameters to an optimizer."""
    rows = {f"AdamW, {kind}": partial(torch.optim.AdamW, **{kind: True}) for kind in ("fused", "foreach")}
    options = {"rank": rank, "update_proj_gap": gap}
    rows |= {name: partial(Fira, **options, **setting) for name, setting in FAMILY.items()}
    if old:
        before = load(old, "fira_before").Fira
        rows |= {f"{name}, old": partial(before, **options, **FAMILY[name]) for name in ("Fira, svd", "Fira, subspace")}
    try:
        release = load(Path(distribution("fira").locate_file("fira/__init__.py")), "fira_release")
        import apollo_torch
        import galore_torch
        import pytorch_optimizer
    except (PackageNotFoundError, ImportError) as error:
        print(f'without the peers ({error}): pip install -e ".[peers]"')
        return rows
    options["proj_type"] = "std"
    for name, make, more in (
        ("fira's release", release.FiraAdamW, {"alpha": 0.25}),
        ("galore-torch", galore_torch.GaLoreAdamW, {"scale": 0.25}),
        ("apollo-torch", apollo_torch.APOLLOAdamW, {"scale": 1.0, "scale_type": "channel", "proj": "random"}),
        ("pytorch_optimizer", pytorch_optimizer.Fira, {"scale": 0.25, "projection_type": "std"}),
    ):
        rows[name] = lambda params, make=make, more=more: make([{"params": params} | options | more])
    return rows
