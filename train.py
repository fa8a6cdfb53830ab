"""Train a small language model with Fira, AdamW, GaLore, LoRA or another of the family, and compare.

python train.py                                        # a small LLaMA with Fira: minutes on a laptop, in out/
python train.py --optimizer fira galore adamw lora     # one after the other; a table and a picture
python train.py --lr 0.02 --name fast                  # a changed run, in out/fast; --resume goes on with it
python train.py --compare fast nano-stdlib-fira-seed0  # runs side by side: a table and a picture, no training
"""

import argparse
import difflib
import importlib.util
import json
import math
import os
import re
import runpy
import signal
import sqlite3
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import fira
import prepare_data
from fira import Fira
from model import PRESETS, ModelConfig, Transformer, add_lora, export, load_pretrained
from prepare_data import InputError, Parser

# Each is a learning rate and a setting of `Fira`; None is AdamW for all. --only_scaling --proj_method random is APOLLO.
METHODS = {
    "fira": (2e-2, {"alpha": 0.0625}),  # the best found at nano; the paper: --lr 0.01 --alpha 0.25
    "fira_paper": (1e-2, {"proj_method": "svd", "alpha_mode": "paper"}),  # Algorithm 1
    "fira_released": (1e-2, {"proj_method": "svd", "alpha_mode": "released"}),  # the authors' code
    "galore": (1e-2, {"scaling": None, "proj_method": "svd"}),
    "adamw": (2e-3, None),
    "lora": (3e-3, None),
}

# What a model is trained with unless a flag says otherwise: for 60m to 7b the paper's Appendix, for gpt2 nanoGPT's
# batch, for nano what two CPU cores do in a few minutes. "pretrained" is fine-tuning, at a tenth of the learning rate.
PAPER = {"block_size": 256, "batch_size": 32, "grad_accum": 16, "update_proj_gap": 200, "alpha": 0.25}
PAPER |= {"alpha_mode": "unscaled", "proj_method": "subspace", "scaling": "column", "gamma": 1.01}
SMALL = PAPER | {"batch_size": 16, "grad_accum": 1, "update_proj_gap": 100}
RANKS = {"9m": 32, "20m": 64, "35m": 96, "60m": 128}
TRAINING = {size: PAPER | {"steps": 10_000, "rank": rank} for size, rank in RANKS.items()} | {
    "nano": SMALL | {"steps": 1500, "rank": 32, "block_size": 128},
    "130m": PAPER | {"steps": 20_000, "rank": 256},
    "350m": PAPER | {"steps": 60_000, "rank": 256},
    "1b": PAPER | {"steps": 100_000, "rank": 512, "alpha": 0.0625},
    "7b": PAPER | {"steps": 150_000, "rank": 1024, "alpha": 0.0625},
    "gpt2": PAPER | {"steps": 100_000, "rank": 256, "block_size": 1024, "batch_size": 12, "grad_accum": 40},
    "pretrained": SMALL | {"steps": 500, "rank": 16, "block_size": None, "batch_size": 8},
}
CHOICES = {"optimizer": METHODS, "model": PRESETS, "precision": ("fp32", "amp", "bf16")}
CHOICES = fira.CHOICES | CHOICES | {"scaling": ("column", "matrix", "unit")}
GROUP_FLAGS = ("rank", "update_proj_gap", "alpha", "alpha_mode", "proj_method", "scaling", "only_scaling", "gamma")
CHANGEABLE = "name steps eval_interval device threads compile checkpointing temperature".split()
MENDABLE = (InputError, OSError, ValueError, FloatingPointError, MemoryError)
LOG_INTERVAL, EVAL_TOKENS, SAMPLE_TOKENS, TOP_K = 10, 2**17, 400, 50  # steps; of validation; of a sample; its choices
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # which sets all three; a RANK alone is somebody else's
RANK, WORLD, LOCAL_RANK = (int(os.environ[k]) for k in TORCHRUN) if os.environ.get("LOCAL_RANK") else (0, 1, 0)
STOP = []  # the signals that came: the loop saves and ends after the step at hand


@dataclass
class Config:
    """Every flag, with its help. None means: the model's or the method's own default, from the tables above."""

    optimizer: str = "fira"  # one or several of METHODS
    variant: str | None = None  # train with the subclass of Fira in this Python file
    model: str = "nano"  # one of PRESETS
    init_from: str | None = None  # start from this Hugging Face checkpoint: a folder, or a name on the hub
    data: str = "stdlib"  # stdlib, shakespeare, a text file, or what prepare_data.py has prepared
    name: str | None = None  # the run, its folder in out/ (MODEL-DATA-OPTIMIZER-seedN)
    steps: int | None = None  # optimizer steps
    batch_size: int | None = None  # sequences in a forward pass
    grad_accum: int | None = None  # forward passes in a step
    block_size: int | None = None  # tokens in a sequence
    lr: float | None = None  # peak learning rate
    rank: int | None = None  # rank of the projection, or of LoRA
    update_proj_gap: int | None = None  # T, steps between subspace changes
    alpha: float | None = None  # α, GaLore's factor
    alpha_mode: str | None = None  # what α multiplies: unscaled (default), paper or released
    proj_method: str | None = None  # how the subspace is found: subspace (default), svd or random
    scaling: str | None = None  # φ: one for each column (default) or for the matrix, or unit, 1
    only_scaling: bool = False  # the update is α φ∘G alone
    gamma: float | None = None  # γ of the norm-growth limiter, inf for none (1.01)
    layerwise: bool = False  # update each weight during backward and free its gradient at once
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float = 0.0  # largest norm of the gradient, 0 for no clipping
    seed: int = 0  # seed of the weights and the batches
    device: str | None = None  # cpu, cuda, cuda:1 or mps (the fastest that is there)
    threads: int | None = None  # CPU threads (as many as cores)
    precision: str | None = None  # fp32, amp or bf16 (amp on CUDA, else fp32)
    compile: bool = False  # compile the model and the optimizer's update
    checkpointing: bool = False  # compute activations again in backward, not to keep them
    temperature: float = 0.8  # of sampling; 0 takes the likeliest token
    eval_interval: int | None = None  # steps between evaluations, each with a checkpoint (an eighth of all)

    def resolve(self) -> "Config":
        """Check the flags and fill in the defaults. Raises InputError."""
        for name, value in asdict(self).items():
            if value is not None and value not in CHOICES.get(name, [value]):
                near = difflib.get_close_matches(value, CHOICES[name], 1, 0)[0]
                raise InputError(f"unknown {name} {value!r}: did you mean {near}? ({', '.join(CHOICES[name])})")
            low = 0 if type(value) is float or name == "seed" else 1
            if type(value) in (int, float) and not (low <= value <= 1e9 or name == "gamma"):
                raise InputError(f"--{name} {value} must be from {low} to 1e9")
        if self.init_from and self.model != Config.model:
            raise InputError("--model goes without --init_from, which brings its own")
        (lr, setting), usual = METHODS[self.optimizer], TRAINING["pretrained" if self.init_from else self.model]
        if self.layerwise and (self.grad_accum or usual["grad_accum"], self.grad_clip, WORLD) != (1, 0, 1):
            raise InputError("--layerwise frees each gradient at once: --grad_accum 1, no --grad_clip, no torchrun")
        if (batch_size := self.batch_size or usual["batch_size"]) % WORLD:
            raise InputError(f"--batch_size {batch_size} must be a multiple of the {WORLD} processes")
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["mps"] * torch.backends.mps.is_available()
        device = self.device or (gpus or ["cpu"])[0].removesuffix(":0")
        device = f"cuda:{LOCAL_RANK}" if device == "cuda" else device
        if device not in (there := [*gpus, "cpu"]):
            raise InputError(f"no device {device!r} here, only {', '.join(there)}")
        steps = self.steps or usual["steps"]
        parts = Path(self.init_from or self.model).name, Path(self.data).stem, Path(self.variant or self.optimizer).stem
        defaults = usual | (setting or {}) | {"lr": lr / 10 if self.init_from else lr}
        defaults |= {"eval_interval": min(1000, max(1, steps // 8)), "name": f"{'-'.join(parts)}-seed{self.seed}"}
        defaults["precision"] = "amp" if device.startswith("cuda") else "fp32"
        return replace(self, device=device, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    @property
    def folder(self) -> Path:
        return Path(self.name) if Path(self.name).parts[:1] == ("out",) else Path("out", self.name)


def batch(tokens: np.ndarray, config: Config, step: int) -> torch.Tensor:
    """Random windows of a step, (grad_accum, batch_size, block_size + 1): a function of (seed, step) alone."""
    rng = np.random.default_rng((config.seed, step, 0))
    starts = rng.integers(len(tokens) - config.block_size, size=(config.grad_accum, config.batch_size))
    return torch.from_numpy(tokens[starts[..., None] + np.arange(config.block_size + 1)].astype(np.int64))


def schedule(step: int, config: Config) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine to 10 % at the last step."""
    if step <= (warmup := config.steps // 10):
        return step / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (config.steps - warmup))


def build(config: Config, vocab_size: int, checkpoint: dict | None = None) -> tuple[Transformer, Fira]:
    """The model and its optimizer, new or as in the checkpoint. Raises ValueError."""
    torch.manual_seed(config.seed)
    if checkpoint:
        model = Transformer(ModelConfig(**checkpoint["shape"]))
    elif config.init_from:
        model = load_pretrained(config.init_from, config.block_size)
        config.block_size = config.block_size or min(256, model.config.block_size)
    else:
        model = Transformer(ModelConfig.preset(config.model, vocab_size, config.block_size))
    if vocab_size > model.config.vocab_size:
        raise InputError(f"data/{config.data} has tokens that {config.init_from} has not: prepare it with its own")
    if config.optimizer == "lora":
        add_lora(model, config.rank)
    model.checkpointing = config.checkpointing
    model.to(config.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    setting = METHODS[config.optimizer][1]
    options = {"rank": None} if setting is None else setting | {name: getattr(config, name) for name in GROUP_FLAGS}
    found = {Fira}
    if config.variant:
        classes = runpy.run_path(config.variant, run_name="variant").values()
        found = {c for c in classes if isinstance(c, type) and issubclass(c, Fira) and c.__module__ == "variant"}
    if len(found) != 1:
        raise InputError(f"--variant {config.variant} must define one subclass of Fira, but defines {len(found)}")
    optimizer = found.pop()(fira.param_groups(model, **options), lr=config.lr, weight_decay=config.weight_decay)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    for p in model.parameters():
        if config.layerwise and p.requires_grad:  # step at once: no other weight has a gradient
            p.register_post_accumulate_grad_hook(lambda p: optimizer.step() or setattr(p, "grad", None))
    return model, optimizer


@torch.no_grad()
def evaluate(forward, tokens: np.ndarray, meta: dict, config: Config, autocast) -> dict:
    """The loss over fixed windows, evenly spaced in the validation split, and what follows from it."""
    n = min(EVAL_TOKENS // config.block_size or 1, (len(tokens) - 1) // config.block_size)
    starts = np.linspace(0, len(tokens) - config.block_size - 1, n).astype(np.int64)
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(config.block_size + 1)].astype(np.int64))
    loss, windows = 0.0, windows.to(config.device).split(config.batch_size)  # nats a token
    for w in tqdm(windows, "evaluating", leave=False, disable=bool(RANK) or None, ncols=79):
        with autocast:
            loss += forward(w[:, :-1], w[:, 1:]).item() * len(w) / n
    return {"val_loss": loss, "bits_per_byte": loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]}


def read_run(config: Config, given: dict) -> tuple[Config, dict]:
    """The run in the configuration's folder at its last checkpoint, with flags given anew. Raises InputError."""
    path = config.folder / "ckpt.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**checkpoint["config"] | {"name": config.name, "device": config.device})
    except Exception as error:  # torch raises half a dozen kinds
        near = difflib.get_close_matches(config.name, [p.parent.name for p in Path("out").glob("*/ckpt.pt")], 3, 0)
        raise InputError(f"cannot go on with {path}: {error}; the nearest runs: {', '.join(near) or 'none'}") from None
    for flag, value in given.items():
        if flag not in CHANGEABLE and value != getattr(config, flag):
            raise InputError(f"{path.parent} was trained with --{flag} {getattr(config, flag)}, not {value}")
    return replace(config, **given).resolve(), checkpoint


def write(path: Path, content: str | dict) -> None:
    """Text, or what torch.save takes, to a temporary file that then takes the name: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(content, encoding="utf-8") if isinstance(content, str) else torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch has its own name for a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} (is the disk full?): {error}") from None


def train(config: Config, checkpoint: dict | None = None) -> None:
    """One run, from its first step or from its checkpoint on."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    meta, train_tokens, val_tokens = prepare_data.load(prepare_data.ensure(config.data))
    tokenizer = prepare_data.get_tokenizer(meta["tokenizer"])  # now, so that none misses at the end
    if checkpoint and checkpoint["data"] != meta:
        raise InputError(f"data/{meta['name']} is not what {config.folder} was trained on: prepare that again")
    if min(len(train_tokens), len(val_tokens)) <= (config.block_size or 1):
        raise InputError(f"data/{meta['name']} is shorter than --block_size {config.block_size}: use a longer text")
    model, optimizer = build(config, meta["vocab_size"], checkpoint)
    start, log = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, [])
    lr_schedule = LambdaLR(optimizer, lambda done: schedule(done + 1, config), last_epoch=start - 1)
    autocast = torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.precision == "amp")
    forward = torch.compile(model) if config.compile else model
    if config.compile:
        fira.fira_update = torch.compile(fira.fira_update, dynamic=False)
    forward = torch.nn.parallel.DistributedDataParallel(forward) if WORLD > 1 else forward
    if not RANK:  # one process writes for all
        lock = begin(config, meta, optimizer, log)

    losses, tokens, clock = [], batch(train_tokens, config, start + 1), time.perf_counter()
    bar = tqdm(total=config.steps, initial=start, ncols=79, disable=bool(RANK) or None)
    for step in range(start + 1, config.steps + 1):
        # 1. The gradients of grad_accum forward and backward passes add up.
        losses.append(0.0)  # stays on the device
        for i, w in enumerate(tokens[:, RANK::WORLD].to(config.device), 1):  # (batch_size / processes, block_size + 1)
            if WORLD > 1:  # average over the processes once a step
                forward.require_backward_grad_sync = i == config.grad_accum
            with autocast:
                loss = forward(w[:, :-1], w[:, 1:]) / config.grad_accum
            loss.backward()
            losses[-1] += loss.detach()
        tokens = batch(train_tokens, config, step + 1)  # while the device works

        # 2. The update.
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()

        # 3. In every tenth step the host waits for the device, and looks.
        evaluating = step % config.eval_interval == 0 or step == config.steps
        if not (step % LOG_INTERVAL == 0 or evaluating or STOP and WORLD == 1):
            continue
        figures = torch.stack([*losses, losses[0].new_tensor(len(STOP))])
        if WORLD > 1:
            torch.distributed.all_reduce(figures)
        *losses, stopping = (figures / WORLD).tolist()
        saving = evaluating or stopping
        if not math.isfinite(sum(losses)) or saving and not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"the loss or a weight is not finite at step {step}: try a lower --lr")
        entry = {"step": step, "loss": sum(losses) / len(losses), "lr": config.lr * schedule(step, config)}
        entry["ms_per_step"] = 1000 * (time.perf_counter() - clock) / len(losses)
        if (seen := [x for x in optimizer.seen.values() if x]) and not config.layerwise:  # what `fira_update` returned
            G, R, phi, S, limited = (torch.cat([x[k].flatten() for x in seen]) for k in "G R phi S limited".split())
            entry |= {"energy_share": (R.norm() / G.norm()).item() ** 2, "mean_phi": phi.mean().item()}
            entry |= {"S_norm": S.norm().item(), "S_limited": limited.norm().item()}
            entry["matrices_limited"] = (limited < S * (1 - 1e-6)).sum().item()
        bar.update(len(losses))
        bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['ms_per_step']:.0f} ms/step")
        if evaluating:
            entry |= evaluate(forward, val_tokens, meta, config, autocast)
            states = [x for state in optimizer.state.values() for x in state.values()]
            entry["state_bytes"] = sum(getattr(x, "nbytes", 0) for x in states)
            if config.device.startswith("cuda"):
                entry["peak_bytes"] = torch.cuda.max_memory_allocated(config.device)
                torch.cuda.reset_peak_memory_stats(config.device)  # for the next evaluation
            say(f"step {step}: validation loss {entry['val_loss']:.4f}, {entry['bits_per_byte']:.4f} bits a byte")
        log.append(entry)
        if not RANK:
            with open(config.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            if saving:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "log": log}
                facts = {"config": asdict(config), "shape": asdict(model.config), "data": meta}
                write(config.folder / "ckpt.pt", states | facts)
        if stopping:
            say(f"stopped and saved; go on with: python train.py --name {config.folder} --resume")
            raise KeyboardInterrupt
        losses, clock = [], time.perf_counter()
    bar.close()
    if not RANK:
        lock.close()
        write(config.folder / "sample.txt", text := sample(model, tokenizer, "\n", config))
        say(f"sample     {'-' * 60}\n{text}\n{'-' * 71}")
        compare([config.folder])


def begin(config: Config, meta: dict, optimizer: Fira, log: list[dict]) -> sqlite3.Connection:
    """Say what is trained, and keep other processes out of the run's folder until this one ends, however it ends."""
    ranks = [(group["rank"] or 0, min(p.shape)) for group in optimizer.param_groups for p in group["params"]]
    low, narrow = sum(0 < r < short for r, short in ranks), sum(r >= short for r, short in ranks)
    kinds = f"{low} matrices at rank {config.rank}, " * bool(low) + f"{len(ranks) - low - narrow} others AdamW"
    count, step = sum(p.numel() for g in optimizer.param_groups for p in g["params"]), log[-1]["step"] if log else 0
    say(f"data       {meta['name']}: {meta['source']}, {meta['train_tokens']:,} tokens")
    say(f"model      {config.init_from or config.model}: {count:,} parameters, context {config.block_size}")
    say(f"optimizer  {config.variant or config.optimizer}, lr {config.lr:g}: {kinds}")
    say(f"run        {config.folder}, step {step} of {config.steps} ({config.device}, {config.precision})")
    if (config.variant or METHODS[config.optimizer][1] is not None) and (narrow or not low):
        say(f"note       {low} matrices have a subspace; {narrow} are not wider than --rank {config.rank}")
    if config.model == "nano" and not config.init_from and config.steps < 1500:
        say("note       the learning rates are tuned for 1,500 steps, not for fewer")
    config.folder.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(config.folder / "lock", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise InputError(f"another process is at work in {config.folder}") from None
    write(config.folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    write(config.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    return lock


def sample(model: Transformer, tokenizer, prompt: str, config: Config) -> str:
    """The prompt and what the model writes after it; an empty prompt starts a new document."""
    torch.manual_seed(config.seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    return tokenizer.decode([*tokens * bool(prompt), *model.generate(tokens, SAMPLE_TOKENS, config.temperature, TOP_K)])


def compare(folders: list[Path]) -> None:
    """The table and the picture of runs, finished or not: validation losses, and training losses pale."""
    if missing := [folder.name for folder in folders if not (folder / "config.json").exists()]:
        near = difflib.get_close_matches(missing[0], [p.parent.name for p in Path("out").glob("*/config.json")], 3, 0)
        raise InputError(f"no run {missing[0]!r}; the nearest runs: {', '.join(near) or 'none'}")
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    logs = [[json.loads(x) for x in (f / "log.jsonl").read_text().splitlines() if x[-1:] == "}"] for f in folders]
    differ = [k for k in configs[0] if k not in CHANGEABLE and len({str(config.get(k)) for config in configs}) > 1]
    labels = [", ".join([f.name, *(f"{k} {c.get(k)}" for k in differ[:2])])[-30:] for f, c in zip(folders, configs)]
    say(f"{'':30} {'step':>6} {'val loss':>8} {'bits/byte':>9} {'state bytes':>13} {'ms/step':>8}")
    row = "{:30} {step:6} {val_loss:8.4f} {bits_per_byte:9.4f} {state_bytes:13,} {:8.1f}"
    for label, log in zip(labels, logs):
        evaluated, speed = [e for e in log if "val_loss" in e], [e["ms_per_step"] for e in log]
        say(row.format(label, np.median(speed), **evaluated[-1]) if evaluated else f"{label:30} not yet evaluated")
    if not importlib.util.find_spec("matplotlib"):
        return say('note       no pictures without matplotlib: pip install -e ".[plot]"')
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot(xlabel="step", ylabel="loss (pale: training)")
    for i, (label, log) in enumerate(zip(labels, logs)):
        for key, style in ("loss", {"alpha": 0.3}), ("val_loss", {"marker": ".", "label": label}):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*np.reshape(points, (-1, 2)).T, color=f"C{i}", **style)
    axes.legend()
    picture = folders[0] / "curves.png" if len(folders) == 1 else Path("out/compare.png")
    axes.figure.savefig(picture, dpi=150)
    say(f"wrote      {picture}")


def say(text: str) -> None:
    """Print above the bar; when nobody reads any more (`| head`), go on, and print to nobody."""
    try:
        tqdm.write(text) if not RANK else None
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Do what the flags ask for; their kinds, defaults and help are those of `Config`."""
    sys.stdout.reconfigure(errors="replace")  # not every code page has an α
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    pattern = r"^    (\w+): (\w+).* = (.*)  # (.*)$"
    for name, kind, default, text in re.findall(pattern, Path(__file__).read_text("utf-8"), re.M):  # of Config
        options = {"type": {"int": int, "float": float}.get(kind, str), "metavar": kind.upper()}
        options |= {"nargs": "+"} if name == "optimizer" else {}
        text += "" if default in ("None", "False") else f" (default {default})"
        parser.add_argument(f"--{name}", help=text, **({"action": "store_true"} if kind == "bool" else options))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run --name")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compare", nargs="+", metavar="RUN", help="only show runs side by side: names or folders")
    only.add_argument("--sample", metavar="PROMPT", help="only print what the run --name writes after PROMPT")
    only.add_argument("--export", metavar="FOLDER", help="only write the run's model, for transformers")
    given = vars(parser.parse_args())
    resume, runs, prompt, target = (given.pop(name, None) for name in ("resume", "compare", "sample", "export"))
    flags = [given | {"optimizer": name} for name in given["optimizer"]] if "optimizer" in given else [given]
    try:
        configs, done = [Config(**given).resolve() for given in flags], []
        if runs:
            return compare([replace(configs[0], name=run).folder for run in runs])
        if prompt is not None or target:
            config, checkpoint = read_run(configs[0], flags[0])
            say(f"using      {config.folder} at step {checkpoint['step']}")
            model, source = build(config, 0, checkpoint)[0], checkpoint["data"]["tokenizer"]
            tokenizer = prepare_data.get_tokenizer(source)
            if prompt is not None:
                return say(sample(model, tokenizer, prompt, config))
            return export(model, target, source[3:] if source.startswith("hf:") else None, tokenizer.end_of_text)
        if WORLD > 1:
            torch.distributed.init_process_group()
        # At a signal the loop ends after the step at hand; a second one ends at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: STOP.append(number) or signal.signal(number, signal.SIG_DFL))
        for config, given in zip(configs, flags):
            try:
                if resume:
                    config, checkpoint = read_run(config, given)
                else:  # an earlier run stays as it is
                    first, checkpoint, number = config.name, None, 1
                    while (config.folder / "ckpt.pt").exists():
                        config.name = f"{first}-{(number := number + 1)}"
                train(config, checkpoint)
                done.append(config.folder)
            except Exception as error:
                if len(configs) == 1:
                    raise
                say(f"{config.optimizer} failed: {type(error).__name__}: {error}")
        if len(done) > 1:
            compare(done)
        sys.exit(len(done) < len(configs))
    except KeyboardInterrupt:
        sys.exit(128 + max(STOP, default=signal.SIGINT))
    except (*MENDABLE, RuntimeError) as error:
        line = (str(error).splitlines() or [""])[0]
        if re.search("of memory|allocate|MemoryError|overflowed", repr(error)) and not isinstance(error, InputError):
            line = "out of memory: try a smaller --batch_size (with more --grad_accum), --block_size or --model"
        elif not isinstance(error, MENDABLE):
            raise
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    main()
