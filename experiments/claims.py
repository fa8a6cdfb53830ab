"""The runs of `experiments/paper.py`, and the claims about their differences, which it reads from `claims.txt`.

A run is a name and flags of `train.py`; words before the flags are changes of `experiments/patches.py`. Flags that
decide a comparison are written out, so that a changed default of `train.py` changes no run.
"""

from pathlib import Path

FIRA = "--lr 0.01 --alpha 0.25"  # the paper's, on which all ablations rest
DEFAULT = "--lr 0.02 --alpha 0.0625"  # the default of train.py, as good as what `fair` chose
ONLY = "--only_scaling --lr 0.01 --alpha 1"  # at the default α the update would be a quarter of Fira's
ADAMW = "--optimizer adamw --lr 0.002"
ALPHAS = ("0.0625", "0.125", "0.25", "0.5", "1")
ADAMW_RATES, NOISY = ("0.002", "0.01", "0.03"), {"adamw": ADAMW, "only": ONLY, "fira": FIRA}
RANKS, GAPS = ("2", "8", "32", "64", "128"), ("20", "50", "100", "200", "500")
PROJECTED = {"fira": "", "galore": " --optimizer galore", "galore-add": " --scaling unit --gamma inf"}
SPIKES = {"fira": "", "no-limiter": " --gamma inf", "clipping": " --gamma inf --grad_clip 1"}

RUNS = {
    "fira": FIRA,
    "default": DEFAULT,
    "fira-paper": f"{FIRA} --alpha_mode paper",
    "fira-released": f"{FIRA} --alpha_mode released",
    "galore": f"--optimizer galore {FIRA}",
    "adamw": ADAMW,
    "lora": "--optimizer lora --lr 0.003",
    "fira-random": f"{FIRA} --proj_method random",
    **{f"fira-svd-r{r}": f"record {FIRA} --proj_method svd --rank {r}" for r in ("8", "32", "64")},
    **{f"fira-svd-r{r}": f"{FIRA} --proj_method svd --rank {r}" for r in ("2", "4")},
    "fira-r128": f"record {FIRA} --rank 128",
    "fira-r128-alpha0.2": "record --lr 0.01 --alpha 0.2 --rank 128",
    "fira-random-r32": f"record {FIRA} --proj_method random --rank 32",
    **{f"galore-r{r}": f"--optimizer galore {FIRA} --rank {r}" for r in RANKS if r not in ("32", "128")},
    "no-scaling": f"{FIRA} --scaling unit",
    "matrix": f"{FIRA} --scaling matrix",
    "no-limiter": f"{FIRA} --gamma inf",
    "clipping": f"{FIRA} --gamma inf --grad_clip 1",
    "shrink": f"shrink=0.25 {FIRA}",
    "tensor-wise": f"{FIRA} --alpha_mode paper --gamma inf",
    "released-matrix": f"{FIRA} --scaling matrix --alpha_mode released",
    "released-no-limiter": f"{FIRA} --alpha_mode released --gamma inf",
    **{f"gamma{g}": f"{FIRA} --gamma {g}" for g in ("1.1", "1.001", "1")},
    "only": f"{FIRA} --only_scaling",
    **{f"only-r{r}": f"{ONLY} --rank {r}" for r in RANKS},
    "only-matrix": f"{ONLY} --scaling matrix --rank 32",
    "only-random": f"{ONLY} --proj_method random",
    "apollo": "--only_scaling --proj_method random --lr 0.01 --alpha 0.5",
    "apollo-mini": "--only_scaling --proj_method random --scaling matrix --rank 1 --lr 0.01 --alpha 1",
    **{f"T{gap}": f"--steps 750 {FIRA} --update_proj_gap {gap}" for gap in GAPS},
    **{f"steps-{k}": f"every_step --steps 750 {FIRA} --rank 8 --proj_method svd{v}" for k, v in PROJECTED.items()},
    **{
        f"spike-lr{lr}-{k}": f"every_step --steps 750 --lr {lr} --alpha 0.25 --rank 8{v}"
        for lr in ("0.01", "0.03")
        for k, v in SPIKES.items()
    },
    **{f"spike-lr{lr}-adamw": f"every_step --steps 750 --optimizer adamw --lr {lr}" for lr in ADAMW_RATES},
    "noise0-only": f"--steps 750 {ONLY}",  # and T100 is Fira's, spike-lr0.002-adamw AdamW's
    **{f"noise{s}-{k}": f"noise={s} --steps 750 {v}" for s in ("0.1", "0.5") for k, v in NOISY.items()},
    "noise-blocks0.5-adamw": f"noise_blocks=0.5 --steps 750 {ADAMW}",
    "noise-blocks0.5-only": f"noise_blocks=0.5 --steps 750 {ONLY}",
    "spiked-fira": f"spike=200 --steps 750 {DEFAULT}",
    "spiked-spam": f"spike=200 --steps 750 --variant variants/spam.py {DEFAULT}",
    "short-fira": f"--steps 750 {DEFAULT}",
    "default-bf16": f"{DEFAULT} --precision bf16",
    **{
        f"variant-{path.stem}": f"--variant {path.as_posix()} {DEFAULT}"
        for path in sorted(Path("variants").glob("*.py"))
    },
    "variant-two_sided": f"--variant variants/two_sided.py --optimizer galore {FIRA}",
    "variant-stochastic_rounding": f"--variant variants/stochastic_rounding.py {DEFAULT} --precision bf16",
}


def rates(name: str, flags: str, values: tuple) -> list[str]:
    """The names of runs with each of the values in these flags, added to RUNS where no run has such flags yet."""
    known = {flags: run for run, flags in RUNS.items()}
    runs = {known.get(flags.format(value)) or f"{name}{value}": flags.format(value) for value in values}
    RUNS.update(runs)
    return list(runs)


# A claim's methods, each with the runs of which seed 0 chooses one.
TUNED = {  # for fine-tuning
    "fira": ("--rank 16 --alpha 0.0625", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)),
    "galore": ("--rank 16 --alpha 0.25", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "adamw": ("", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
    "lora": ("--rank 16", (3e-4, 1e-3, 3e-3, 1e-2)),
}
GRIDS = {
    "fair": {  # α at one learning rate, then the learning rate at the best α and, for Fira, at the paper's
        "fira": [
            *rates("fira-lr0.02-alpha", "--lr 0.02 --alpha {}", ("0.03125", *ALPHAS)),
            *rates("fira-alpha0.0625-lr", "--lr {} --alpha 0.0625", ("0.01", "0.04", "0.08")),
            "fira",
        ],
        "galore": [
            *rates("galore-lr0.02-alpha", "--optimizer galore --lr 0.02 --alpha {}", ALPHAS),
            *rates("galore-alpha0.25-lr", "--optimizer galore --lr {} --alpha 0.25", ("0.005", "0.01", "0.04")),
        ],
        "algorithm1": rates(  # its α and its learning rate are one factor but for embeddings and head
            "fira-paper-lr", "--lr {} --alpha 0.25 --alpha_mode paper", ("0.005", "0.01", "0.02", "0.04")
        ),
        "adamw": rates("adamw-lr", "--optimizer adamw --lr {}", ("0.001", "0.002", "0.003", "0.005")),
        "lora": rates("lora-lr", "--optimizer lora --lr {}", ("0.001", "0.003", "0.005", "0.01")),
    },
    "finetune": {
        m: rates(f"finetune-{m}-lr", f"finetune --steps 500 --optimizer {m} {flags} " + "--lr {}", values)
        for m, (flags, values) in TUNED.items()
    },
    "T17": {  # the factor is of the matrices' learning rate: embeddings and head stay AdamW at lr 0.01
        m: rates(f"adagrad-{m}-", "inside=adagrad,{} --steps 750 " + flags, factors)
        for m, flags, factors in (
            ("fira", FIRA, ("0.3", "1", "3", "10")),
            ("galore", f"--optimizer galore {FIRA}", ("0.3", "1", "3", "10", "30")),
            ("full", "--lr 0.01 --alpha 1 --rank 128", ("0.3", "1", "3", "10")),
        )
    },
    "kinds": {
        kind: rates(f"inner-{kind}-", f"inside={kind}," + "{} --steps 750 " + DEFAULT, factors)
        for kind, factors in {
            "momentum": ("3", "10", "30", "100"),
            "adagrad": ("1", "3", "10"),
            "rmsprop": ("0.1", "0.3", "1"),
            "lion": ("0.03", "0.1", "0.3"),
        }.items()
    },
    "F12": {"sgd": rates("sgd-lr", "sgd --optimizer adamw --lr {}", ("0.1", "0.3", "1", "3"))},
}


def read(table: str) -> dict[str, dict]:
    """The claims of a table: their title, their seeds and their rows."""
    claims = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if not line or line[0] == "#":
            continue
        if line[0] != " ":
            claims[cells[0]] = {"title": cells[1], "seeds": [int(s) for s in cells[2].split()], "rows": []}
        else:
            list(claims.values())[-1]["rows"].append(cells)
    return claims


CLAIMS = read(Path(__file__).with_name("claims.txt").read_text(encoding="utf-8"))
VARIANTS = [run for run in RUNS if run.startswith("variant-")]
CLAIMS["variants"]["rows"] = [["!variants", " ".join(["default", "galore", "default-bf16", *VARIANTS])]]
