"""Train a small language model with Fira, AdamW, GaLore, LoRA or another of the family, and compare.

    python train.py                                        # a small LLaMA with Fira: minutes on a laptop
    python train.py --optimizer fira galore adamw lora     # one after the other; a table and a picture
    python train.py --lr 0.02 --name fast                  # a changed run of your own, in out/fast
    python train.py --compare fast nano-stdlib-fira-seed0  # beside another: nothing is trained
    python train.py --name fast --resume                   # go on from its last checkpoint, bit for bit
    python train.py --name fast --sample "def main("       # let its last checkpoint write
    python train.py --variant variants/rotate.py           # train with your own subclass of Fira
    torchrun --nproc_per_node=2 train.py                   # on two GPUs

A run writes out/NAME/: config.json, log.jsonl, ckpt.pt, and at its end result.json, sample.txt and curves.png.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import math
import os
import shlex
import signal
import sqlite3
import sys
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import fira
import prepare_data
from fira import Fira, param_groups
from model import PRESETS, ModelConfig, Transformer, add_lora, export, load_pretrained
from prepare_data import InputError, Parser

# Each method is a learning rate and a setting of `Fira`; without a setting, everything is AdamW.
APOLLO = {"only_scaling": True, "proj_method": "random", "alpha": None}  # its α depends on the model's width
METHODS = {
    "fira": (1e-2, {}),
    "fira_paper": (1e-2, {"proj_method": "svd", "alpha_mode": "paper"}),  # Algorithm 1
    "fira_released": (1e-2, {"proj_method": "svd", "alpha_mode": "released"}),  # the authors' code
    "fira_matrix": (1e-2, {"scaling": "matrix"}),
    "fira_only_scaling": (1e-2, {"only_scaling": True}),
    "galore": (1e-2, {"scaling": None, "proj_method": "svd"}),
    "galore_add": (1e-2, {"scaling": "unit", "gamma": math.inf, "proj_method": "svd"}),
    "apollo": (1e-2, APOLLO),
    "apollo_mini": (1e-2, APOLLO | {"scaling": "matrix", "rank": 1}),
    "adamw": (2e-3, None),
    "lora": (3e-3, None),
}

# What a model is trained with unless a flag says otherwise: the paper's Appendix for 60m to 7b, with its
# batch of 131k tokens; nanoGPT's batch for gpt2; and what two CPU cores do in a few minutes for nano.
PAPER = {"block_size": 256, "batch_size": 32, "grad_accum": 16, "update_proj_gap": 200, "alpha": 0.25}
TINY = PAPER | {"batch_size": 16, "grad_accum": 1, "update_proj_gap": 100}
TRAINING = {
    "nano": TINY | {"steps": 1500, "rank": 32, "block_size": 128},
    **{k: PAPER | {"steps": 10_000, "rank": r} for k, r in (("9m", 32), ("20m", 64), ("35m", 96), ("60m", 128))},
    "130m": PAPER | {"steps": 20_000, "rank": 256},
    "350m": PAPER | {"steps": 60_000, "rank": 256},
    "1b": PAPER | {"steps": 100_000, "rank": 512, "alpha": 0.0625},
    "7b": PAPER | {"steps": 150_000, "rank": 1024, "alpha": 0.0625},
    "gpt2": PAPER | {"steps": 100_000, "rank": 256, "block_size": 1024, "batch_size": 12, "grad_accum": 40},
    # --init_from: fine-tuning, at a tenth of the method's learning rate
    "pretrained": TINY | {"steps": 500, "rank": 16, "block_size": None, "batch_size": 8},
}
LOG_INTERVAL, EVAL_TOKENS = 10, 2**17  # in steps; of the validation split, the same at every evaluation
UPDATE = fira.fira_update  # which --compile compiles
CHOICES = fira.CHOICES | {"optimizer": METHODS, "model": PRESETS, "precision": ("fp32", "amp", "bf16")}
CHANGEABLE = "name out steps warmup eval_interval device threads compile checkpointing temperature top_k".split()
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # processes, of which this is number RANK; set by torchrun
RANK, LOCAL_RANK = (int(os.environ.get(name) or 0) if WORLD > 1 else 0 for name in ("RANK", "LOCAL_RANK"))
STOP = []  # the signals that came: the loop saves and ends after the step at hand


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every flag. None means: the model's or the method's own default, from the tables above."""

    optimizer: str = flag("fira", f"one or several of {', '.join(METHODS)}")
    variant: str | None = flag(None, "train with the subclass of Fira in this Python file")
    model: str = flag("nano", f"one of {', '.join(PRESETS)}")
    init_from: str | None = flag(None, "start from this Hugging Face checkpoint: a folder, or a name on the hub")
    data: str = flag("stdlib", "stdlib, shakespeare, a text file, or what prepare_data.py has prepared")
    name: str | None = flag(None, "the run: its folder in --out (default MODEL-DATA-OPTIMIZER-seedN)")
    out: str = flag("out", "folder for the runs")
    steps: int | None = flag(None, "optimizer steps")
    batch_size: int | None = flag(None, "sequences in a forward pass")
    grad_accum: int | None = flag(None, "forward passes in a step")
    block_size: int | None = flag(None, "tokens in a sequence")
    lr: float | None = flag(None, "peak learning rate")
    warmup: int | None = flag(None, "steps of linear warm-up (a tenth of the steps)")
    rank: int | None = flag(None, "rank of the projection, or of LoRA")
    update_proj_gap: int | None = flag(None, "T, steps between subspace changes")
    alpha: float | None = flag(None, "α, GaLore's factor")
    alpha_mode: str | None = flag(None, "what α multiplies: unscaled (default), paper or released")
    proj_method: str | None = flag(None, "how the subspace is found: subspace (default), svd or random")
    gamma: float | None = flag(None, "γ of the norm-growth limiter, inf for none (1.01)")
    layerwise: bool = flag(False, "update each weight during backward and free its gradient at once")
    weight_decay: float = flag(0.0, "decoupled weight decay")
    grad_clip: float = flag(0.0, "largest norm of the gradient, 0 for no clipping")
    seed: int = flag(0, "seed of the weights and the batches")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int | None = flag(None, "CPU threads (as many as cores)")
    precision: str | None = flag(None, "fp32, amp or bf16 (amp on CUDA, else fp32)")
    compile: bool = flag(False, "compile the model and the optimizer's update")
    checkpointing: bool = flag(False, "compute activations again in backward, not to keep them")
    temperature: float = flag(0.8, "of sampling; 0 takes the likeliest token")
    top_k: int = flag(50, "sample among this many tokens")
    eval_interval: int | None = flag(None, "steps between evaluations, each with a checkpoint (an eighth of all)")

    def resolve(self) -> "Config":
        """Check the flags and fill in the defaults. Raises InputError."""
        for name, value in asdict(self).items():
            if name in CHOICES and value is not None and value not in CHOICES[name]:
                raise InputError(f"unknown {name} {value!r}: {nearest(value, CHOICES[name])}")
            low = 1 if isinstance(value, int) and name not in ("seed", "warmup") else 0
            if type(value) in (int, float) and not (low <= value <= 1e9 or value == math.inf):
                raise InputError(f"--{name} {value} must be from {low} to 1e9")
        if self.init_from and self.model != Config.model:
            raise InputError("--model goes without --init_from, which brings its own")
        if self.layerwise and (self.grad_accum or 1, self.grad_clip, WORLD) != (1, 0, 1):
            raise InputError("--layerwise frees each gradient at once: not with --grad_accum, --grad_clip or torchrun")
        if 0 < self.temperature < 1e-3:
            raise InputError(f"--temperature {self.temperature} must be 0, or at least 0.001")
        device = self.device
        if device in ("auto", "cuda"):
            device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
            device = f"cuda:{LOCAL_RANK}" if "cuda" in (device, self.device) else device
        (lr, setting), usual = METHODS[self.optimizer], TRAINING["pretrained" if self.init_from else self.model]
        steps = self.steps or usual["steps"]
        name = [Path(self.init_from or self.model).name, Path(self.data).name.split(".")[0], self.optimizer]
        name += [Path(self.variant or "").stem, f"seed{self.seed}", f"{steps}steps" * (steps < usual["steps"])]
        defaults = {"lr": lr / 10 if self.init_from else lr, "gamma": 1.01, "proj_method": "subspace"}
        defaults |= {"alpha_mode": "unscaled", "warmup": steps // 10, "eval_interval": min(1000, max(1, steps // 8))}
        defaults["precision"] = "amp" if device[:4] == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
        defaults |= {"name": "-".join(part for part in name if part), **usual, **(setting or {})}
        given = {k: v for k, v in asdict(self).items() if v is not None}
        return replace(self, **{k: v for k, v in (defaults | given | {"device": device}).items() if hasattr(self, k)})

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


def nearest(name: str, choices) -> str:
    near = difflib.get_close_matches(str(name), choices, 1, 0)
    return f"did you mean {near[0]}? ({', '.join(choices)})" if near else "there is none"


# Data, model and optimizer


def batch(tokens: np.ndarray, config: Config, step: int) -> torch.Tensor:
    """Random windows of a step, (grad_accum, batch_size, block_size + 1): a function of (seed, step) alone."""
    rng = np.random.default_rng((config.seed, step, 0))
    starts = rng.integers(len(tokens) - config.block_size, size=(config.grad_accum, config.batch_size))
    return torch.from_numpy(tokens[starts[..., None] + np.arange(config.block_size + 1)].astype(np.int64))


def build(config: Config, vocab_size: int, checkpoint: dict | None = None) -> tuple[Transformer, Fira]:
    """The model and its optimizer, new or as in the checkpoint. Raises InputError."""
    try:
        torch.zeros((), device=config.device)
    except (RuntimeError, AssertionError):
        raise InputError(f"device {config.device!r} is not there") from None
    torch.manual_seed(config.seed)
    cls, setting = load_variant(config.variant) if config.variant else Fira, METHODS[config.optimizer][1]
    flags = {k: getattr(config, k) for k in ("rank", "update_proj_gap", "alpha", "alpha_mode", "proj_method", "gamma")}
    try:
        if checkpoint:
            model = Transformer(ModelConfig(**checkpoint["shape"]))
        elif config.init_from:
            model = load_pretrained(config.init_from, config.block_size)
            config.block_size = config.block_size or min(256, model.config.block_size)
        else:
            model = Transformer(ModelConfig.preset(config.model, vocab_size, config.block_size))
        if vocab_size > model.config.vocab_size:
            raise ValueError(f"data/{config.data} has tokens that {config.init_from} has not: prepare it with its own")
        if config.optimizer == "lora":
            add_lora(model, config.rank)
        model.checkpointing = config.checkpointing
        model.to(config.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        if config.alpha is None:  # what APOLLO's release does with its Gaussian projection and its `scale`
            d_model, scale = model.config.d_model, 128 if config.optimizer == "apollo_mini" else 1
            flags["alpha"] = math.sqrt(scale * min(config.rank, d_model) / d_model)
        groups = param_groups(model, **{"rank": None} if setting is None else setting | flags)
        optimizer = cls(groups, lr=config.lr, weight_decay=config.weight_decay)
        if checkpoint:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{f'{config.folder}/ckpt.pt does not fit: ' if checkpoint else ''}{error}") from None
    return model, optimizer


def load_variant(path: str) -> type[Fira]:
    """The one subclass of Fira that a Python file defines. Raises InputError."""
    try:
        spec = importlib.util.spec_from_file_location(f"variant_{Path(path).stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--variant {path} does not load: {type(error).__name__}: {error}") from None
    here = {c for c in vars(module).values() if getattr(c, "__module__", "") == spec.name}
    found = [c for c in here if isinstance(c, type) and issubclass(c, Fira)]
    if len(found) != 1:
        raise InputError(f"--variant {path} must define one subclass of Fira, but defines {len(found)}")
    return found[0]


def schedule(step: int, config: Config) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine to 10 % at the last step."""
    if step <= config.warmup:
        return step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def inside_subspaces(seen: list[dict]) -> dict:
    """What the last step saw of the projected matrices, of what `fira_update` returned; empty where there are none."""
    keys = ("G", "R", "phi", "S", "limited")
    seen = [s for s in seen if isinstance(s, dict) and s.keys() >= {*keys}]
    if not seen:
        return {}
    G, R, phi, S, limited = (torch.cat([s[k].flatten().float() for s in seen]) for k in keys)
    values = R.square().sum() / G.square().sum(), phi.mean(), S.norm(), limited.norm(), (limited < S * (1 - 1e-6)).sum()
    names = ("energy_share", "mean_phi", "S_norm", "S_limited", "matrices_limited")
    return dict(zip(names, torch.stack(values).tolist()))  # the host waits for the device, once


# A run's folder


def read_run(name: str, out: str) -> tuple[Config, list[dict]]:
    """The configuration and the log of a run, by its name or its folder, finished or not. Raises InputError."""
    folder = next((f for f in (Path(out) / name, Path(name)) if (f / "config.json").is_file()), None)
    if folder is None:
        there = sorted(path.parent.name for path in Path(out).glob("*/config.json"))
        raise InputError(f"no run {name!r} in {out}: {nearest(name, there)}")
    try:
        config = Config(**json.loads((path := folder / "config.json").read_text(encoding="utf-8"))).resolve()
        lines = (path := folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # a kill leaves half a line
        log = [entry for entry in map(json.loads, lines) if entry["step"] + entry["loss"] + entry["ms_per_step"]]
    except (ValueError, LookupError, TypeError, AttributeError, OSError, InputError) as error:
        raise InputError(f"{path} is damaged, or not of this train.py ({error})") from None
    return replace(config, out=str(folder.parent), name=folder.name), log


def saved_run(config: Config, given: dict) -> tuple[Config, list[dict], dict]:
    """The run of that name with its checkpoint, to go on with what was given anew. Raises InputError."""
    saved, log = read_run(config.name, config.out)
    path, anew = saved.folder / "ckpt.pt", {name: getattr(config, name) for name in given}
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not check
            raise ValueError("it has another CRC")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        log = [entry for entry in log if entry["step"] <= checkpoint["step"]]
    except Exception as error:  # torch raises half a dozen kinds
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is missing, damaged or not of this train.py ({reason})") from None
    for name in anew.keys() - set(CHANGEABLE):
        if anew[name] != getattr(saved, name):
            raise InputError(f"{saved.folder} was trained with --{name} {getattr(saved, name)}, not {anew[name]}")
    say(f"using      {saved.folder} at step {checkpoint['step']}")
    return replace(saved, **anew | {"name": saved.name, "out": saved.out}), log, checkpoint


def write(path: Path, content) -> None:
    """Text, or what torch.save takes, to a temporary file that then takes the name: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch has its own name for a full disk
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} (is the disk full?): {str(error).splitlines()[0]}") from None


def lock(folder: Path) -> sqlite3.Connection:
    """Keep others out of the folder until this process ends, however it ends. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)  # a file lock on every system
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise InputError(f"another process is at work in {folder}") from None
    return connection


# Training


def train(config: Config, log: list[dict], checkpoint: dict | None) -> None:
    """One run, from its first step or from its checkpoint on. Raises InputError."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    meta, train_tokens, val_tokens = prepare_data.load(config.data)
    tokenizer = prepare_data.get_tokenizer(meta["tokenizer"])  # now, so that none misses at the end
    if checkpoint and checkpoint["data"] != meta:
        raise InputError(f"data/{config.data} is not what {config.folder} was trained on: prepare that again")
    if min(len(train_tokens), len(val_tokens)) <= (config.block_size or 1):
        raise InputError(f"data/{config.data} is shorter than --block_size {config.block_size}: use a longer text")
    model, optimizer = build(config, meta["vocab_size"], checkpoint)
    start, folder = checkpoint["step"] if checkpoint else 0, config.folder
    lr_schedule = LambdaLR(optimizer, lambda done: schedule(done + 1, config), last_epoch=start - 1)
    autocast = torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.precision == "amp")
    for p in model.parameters():
        if config.layerwise and p.requires_grad:  # step at once: no other weight has a gradient
            p.register_post_accumulate_grad_hook(lambda p: (optimizer.step(), setattr(p, "grad", None)))
    fira.fira_update = torch.compile(UPDATE, dynamic=False) if config.compile else UPDATE
    forward = torch.compile(model) if config.compile else model
    forward = DistributedDataParallel(forward) if WORLD > 1 else forward
    if not RANK:  # one process writes for all
        locked = lock(folder)  # noqa: F841
        write(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
        write(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    describe(config, model, optimizer, start)

    losses, tokens = [], batch(train_tokens, config, start + 1)
    form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=config.steps, initial=start, bar_format=form, dynamic_ncols=True, disable=True if RANK else None)
    clock = time.perf_counter()
    for step in range(start + 1, config.steps + 1):
        # 1. The gradients of grad_accum forward and backward passes add up.
        losses.append(0.0)  # stays on the device
        for i, w in enumerate(tokens[:, RANK::WORLD].to(config.device), 1):  # (batch_size / processes, block_size + 1)
            average = WORLD == 1 or i == config.grad_accum  # the processes' gradients, once a step
            with contextlib.nullcontext() if average else forward.no_sync():
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
        lr = lr_schedule.get_last_lr()[0]
        lr_schedule.step()

        # 3. In every tenth step the host waits for the device, and looks.
        logging, evaluating = step % LOG_INTERVAL == 0, step % config.eval_interval == 0 or step == config.steps
        if not (logging or evaluating or STOP and WORLD == 1):
            continue
        figures = torch.stack([*losses, losses[0].new_tensor(len(STOP))])
        if WORLD > 1:
            dist.all_reduce(figures)
        *losses, stopping = (figures / WORLD).tolist()
        if not math.isfinite(sum(losses)):
            raise FloatingPointError(f"the loss is not finite in a step from {step + 1 - len(losses)} to {step}")
        ms = 1000 * (time.perf_counter() - clock) / len(losses)
        entry = {"step": step, "loss": sum(losses) / len(losses), "lr": lr, "ms_per_step": ms}
        if logging and not config.layerwise:
            entry |= inside_subspaces(optimizer.seen.values())
        bar.set_postfix_str(f"loss {entry['loss']:.3f}, {ms:.0f} ms/step", refresh=False)
        bar.update(len(losses))
        if evaluating:
            entry |= evaluate(forward, optimizer, val_tokens, meta, config, autocast)
        if (evaluating or stopping) and not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"a weight is not finite after step {step}")
        log.append(entry)
        if not RANK:
            save(folder, entry, evaluating or stopping, model, optimizer, meta)
        if evaluating:
            say(f"step {step}: validation loss {entry['val_loss']:.4f}, {entry['bits_per_byte']:.4f} bits a byte")
        if stopping:
            bar.close()
            raise KeyboardInterrupt
        losses, clock = [], time.perf_counter()
    bar.close()
    if not RANK:
        finish(config, model, tokenizer, log)


def save(folder: Path, entry: dict, checkpoint: bool, model: Transformer, optimizer: Fira, meta: dict) -> None:
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    if checkpoint:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        write(folder / "ckpt.pt", states | {"shape": asdict(model.config), "step": entry["step"], "data": meta})


@torch.no_grad()
def evaluate(forward, optimizer: Fira, tokens: np.ndarray, meta: dict, config: Config, autocast) -> dict:
    """The loss over fixed windows, evenly spaced in the validation split, and what follows from it."""
    n = min(EVAL_TOKENS // config.block_size or 1, (len(tokens) - 1) // config.block_size)
    starts = np.linspace(0, len(tokens) - config.block_size - 1, n).astype(np.int64)
    loss, hide = 0.0, True if RANK else None  # None: without a terminal
    for i in tqdm(range(0, n, config.batch_size), "evaluating", leave=False, disable=hide, dynamic_ncols=True):
        w = tokens[starts[i : i + config.batch_size, None] + np.arange(config.block_size + 1)].astype(np.int64)
        w = torch.from_numpy(w).to(config.device)
        with autocast:
            loss += forward(w[:, :-1], w[:, 1:]).item() * len(w) / n  # nats a token
    return {
        "val_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"],
        "state_bytes": sum(v.nbytes for s in optimizer.state.values() for v in s.values() if hasattr(v, "nbytes")),
        "peak_bytes": torch.cuda.max_memory_allocated() if config.device.startswith("cuda") else None,
    }


def describe(config: Config, model: Transformer, optimizer: Fira, start: int) -> None:
    ranks = [(group["rank"] or 0, min(p.shape)) for group in optimizer.param_groups for p in group["params"]]
    low, wide = sum(0 < r < short for r, short in ranks), sum(r >= short for r, short in ranks)
    kinds = f"{low} matrices at rank {config.rank}, " * bool(low) + f"{len(ranks) - low - wide} others AdamW"
    n = sum(p.numel() for p in model.parameters())
    say(f"model      {config.init_from or config.model}: {n:,} parameters, context {config.block_size}")
    say(f"optimizer  {config.optimizer}, lr {config.lr:g}: {kinds}")
    say(f"device     {config.device}, {config.precision}, {torch.get_num_threads()} threads")
    say(f"run        {config.folder}, {f'after step {start}' if start else 'from the beginning'}")
    if wide:
        say(f"note       --rank {config.rank} is not below the width of {wide} matrices: no subspace there")
    if not low + wide and (config.variant or METHODS[config.optimizer][1] is not None):
        say("note       no group has a rank: everything is trained with AdamW")
    if config.model == "nano" and not config.init_from and config.steps < 1500:
        say("note       the learning rates are tuned for 1,500 steps: with fewer, compare with care")


def finish(config: Config, model: Transformer, tokenizer, log: list[dict]) -> None:
    """The result, a sample and the picture of a run that is at its end."""
    write(config.folder / "result.json", json.dumps({"optimizer": config.optimizer, **log[-1]}, indent=2) + "\n")
    write(config.folder / "sample.txt", text := written(model, tokenizer, "", config))
    say(f"sample     {'-' * 60}\n{text}\n{'-' * 71}")
    adamw = 8 * sum(p.numel() for p in model.parameters())
    say(f"state      {log[-1]['state_bytes'] / 1e6:,.1f} MB; AdamW's for all weights is {adamw / 1e6:,.1f} MB")
    draw({config.name: log}, config.folder / "curves.png")


def written(model: Transformer, tokenizer, prompt: str, config: Config) -> str:
    """The prompt and what the model writes after it; an empty prompt starts a new document."""
    torch.manual_seed(config.seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    return prompt + tokenizer.decode(list(model.generate(tokens, 400, config.temperature, config.top_k)))


# Comparing runs


def show(names: list[str], out: str, path: Path) -> None:
    """The table and the picture of runs, finished or not, with what differs between them as labels."""
    configs, logs = zip(*(read_run(name, out) for name in names))
    flags = [asdict(config) for config in configs]
    differ = [k for k in flags[0] if len({str(f[k]) for f in flags}) > 1 and (k == "steps" or k not in CHANGEABLE)]
    if "optimizer" in differ:  # what follows from it says nothing more
        differ = [k for k in differ if k not in ("alpha", "alpha_mode", "proj_method", "gamma")]
    labels = [", ".join(f[k] if isinstance(f[k], str) else f"{k} {f[k]}" for k in differ) for f in flags]
    labels = labels if len(set(labels)) == len(labels) else [f["name"] for f in flags]
    say(f"{'':24} {'step':>6} {'val loss':>9} {'bits/byte':>9} {'state MB':>8} {'ms/step':>8} {'peak MB':>8}")
    for label, log in zip(labels, logs):
        say(label) if len(label) > 24 else None
        row = f"{label * (len(label) <= 24):24}"
        if evaluated := [entry for entry in log if "val_loss" in entry]:
            e, ms = evaluated[-1], np.median([entry["ms_per_step"] for entry in log])
            row += f" {e['step']:6} {e['val_loss']:9.4f} {e['bits_per_byte']:9.4f} {e['state_bytes'] / 1e6:8.1f}"
            row += f" {ms:8.1f} " + (f"{e['peak_bytes'] / 1e6:8.0f}" if e["peak_bytes"] else 7 * " " + "-")
        say(row)
    draw(dict(zip(labels, logs)), path)


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    """Validation losses, and training losses pale."""
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token (pale: training)")
        for i, (label, log) in enumerate(logs.items()):
            for key, style in ("loss", {"alpha": 0.3}), ("val_loss", {"marker": ".", "label": label}):
                points = [(entry["step"], entry[key]) for entry in log if key in entry]
                axes.plot(*np.reshape(points, (-1, 2)).T, color=f"C{i}", **style)
        axes.legend()
        figure.savefig(path, dpi=150)
        say(f"wrote      {path}")


# Command line


def say(text: str) -> None:
    """Print above the bar; when nobody reads any more (`| head`), go on, and print to nobody."""
    try:
        tqdm.write(text) if not RANK else None
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: Exception) -> str:
    """One line for what a user can mend; the traceback for the rest."""
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, FloatingPointError):
        return f"{line}; the last good checkpoint, if there is one, stays. Try a lower --lr"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "CPUAllocator" in line or "overflowed" in line:
        return "out of memory: try a smaller --batch_size (with more --grad_accum), --block_size or --model"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch cannot compile here: {line}; leave out --compile"
    return line if isinstance(error, (InputError, OSError)) else traceback.format_exc()


def parse(arguments: list[str]) -> dict:
    """The flags that were given, and only those."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(Config):
        help = f.metadata["help"] + ("" if f.default in (None, False) else f" (default {f.default})")
        kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
        options = {"type": kind, "metavar": kind.__name__.upper(), "nargs": "+" if f.name == "optimizer" else None}
        parser.add_argument(f"--{f.name}", help=help, **({"action": "store_true"} if kind is bool else options))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run (--name RUN)")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="only show runs side by side: names or folders")
    parser.add_argument("--sample", metavar="PROMPT", help="only print what the run (--name RUN) writes after PROMPT")
    parser.add_argument("--export", metavar="FOLDER", help="only write the run's model (--name RUN) for transformers")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = nearest(unknown[0].split("=")[0], parser._option_string_actions).split(" (")[0]
        parser.error(f"unknown argument {unknown[0]}: {near}")
    return vars(given)


def command(given: dict) -> None:
    resume, names, prompt, folder = (given.pop(name, None) for name in ("resume", "compare", "sample", "export"))
    optimizers, training = dict.fromkeys(given.get("optimizer", ["fira"])), prompt is None and folder is None
    configs, several = [Config(**given | {"optimizer": name}).resolve() for name in optimizers], len(optimizers) > 1
    if training and not importlib.util.find_spec("matplotlib"):
        say('there will be no pictures of the losses without matplotlib: pip install -e ".[plot]"')
    if names:
        return show(names, configs[0].out, Path(configs[0].out) / f"{given.get('name', 'compare')}.png")
    if WORLD > 1:
        if several or not training:
            raise InputError("several processes train with one --optimizer, and do nothing else")
        dist.init_process_group()
        if RANK:
            dist.barrier()  # the first process prepares the data
    if "data" in given or training and not resume:
        data = prepare_data.ensure(configs[0].data)
        configs = [replace(config, data=data) for config in configs]
    if WORLD > 1 and not RANK:
        dist.barrier()
    if not training:
        return use(*saved_run(configs[0], given), prompt, folder)
    done = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    for config in configs:
        try:
            if several:
                say(f"\n=== {config.optimizer} ===")
                config.name += f"-{config.optimizer}" * ("name" in given)
            there = any((config.folder / file).exists() for file in ("ckpt.pt", "result.json"))
            if there and not resume and not several:
                raise InputError(f"{config.folder} holds a run: go on by --resume, or give this one a --name")
            config, log, checkpoint = saved_run(config, given) if resume or there else (config, [], None)
            ended = checkpoint and checkpoint["step"] >= config.steps and (config.folder / "result.json").exists()
            if ended and not several:
                raise InputError(f"{config.folder} is at step {checkpoint['step']} already: go on with more --steps")
            if not ended:
                train(config, log, checkpoint)
            done.append(config.name)
        except Exception as error:
            if not several:
                raise
            say(f"{config.optimizer} failed: {explain(error)}")
    if several and done:
        show(done, config.out, Path(config.out) / "compare.png")
    if WORLD > 1:
        dist.destroy_process_group()
    sys.exit(1 if len(done) < len(configs) else 0)


def use(config: Config, _, checkpoint: dict, prompt: str | None, folder: str | None) -> None:
    """--sample and --export: let a run's last checkpoint write, or write it in Hugging Face's format."""
    model, name = build(config, 0, checkpoint)[0], checkpoint["data"]["tokenizer"]
    tokenizer = prepare_data.get_tokenizer(name)
    if prompt is not None:
        say(written(model, tokenizer, prompt, config))
    if folder is not None:
        export(model, folder, name[3:] if name.startswith("hf:") else None, tokenizer.end_of_text)
        say(f"wrote      {folder}")


def on_signal(number, frame):
    """Ctrl-C: the loop saves after the step at hand and ends. The second one ends at once."""
    STOP.append(number)
    signal.signal(number, signal.SIG_DFL)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every code page has an α
    try:
        command(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        if STOP:
            arguments = shlex.join(argument for argument in sys.argv[1:] if argument != "--resume")
            say(f"stopped and saved; go on with: python train.py {arguments} --resume")
        sys.exit(128 + max(STOP, default=signal.SIGINT))
    except Exception as error:
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    main()
