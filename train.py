"""Train a small language model with Fira, AdamW, GaLore, LoRA or another of the family, and compare.

    python train.py                                        # a small LLaMA with Fira: minutes on a laptop
    python train.py --optimizer fira galore adamw lora     # one after the other; a table and a picture
    python train.py --lr 0.02 --name fast                  # a changed run, in out/fast
    python train.py --compare fast nano-stdlib-fira-seed0  # runs side by side: a table and a picture, no training
    python train.py --name fast --resume                   # go on from its last checkpoint, bit for bit
    python train.py --name fast --sample "def main("       # let its last checkpoint write
    python train.py --variant variants/rotate.py           # train with your own subclass of Fira

A run writes out/NAME/: config.json, log.jsonl, ckpt.pt, and at its end result.json, sample.txt and curves.png. An earlier
run of its name stays as it is: the new one is called NAME-2, NAME-3 and so on.
"""

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import signal
import sqlite3
import sys
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, fields, replace
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

# Each method is a learning rate and a setting of `Fira`; without a setting, everything is AdamW. α of the APOLLOs is what
# their release's `scale` comes to at the width of nano.
APOLLO = {"only_scaling": True, "proj_method": "random", "alpha": 0.5}
METHODS = {
    "fira": (1e-2, {}),
    "fira_paper": (1e-2, {"proj_method": "svd", "alpha_mode": "paper"}),  # Algorithm 1
    "fira_released": (1e-2, {"proj_method": "svd", "alpha_mode": "released"}),  # the authors' code
    "fira_matrix": (1e-2, {"scaling": "matrix"}),
    "fira_only_scaling": (1e-2, {"only_scaling": True}),
    "galore": (1e-2, {"scaling": None, "proj_method": "svd"}),
    "galore_add": (1e-2, {"scaling": "unit", "gamma": math.inf, "proj_method": "svd"}),
    "apollo": (1e-2, APOLLO),
    "apollo_mini": (1e-2, APOLLO | {"scaling": "matrix", "rank": 1, "alpha": 1.0}),
    "adamw": (2e-3, None),
    "lora": (3e-3, None),
}

# What a model is trained with unless a flag says otherwise: for 60m to 7b the paper's Appendix, for gpt2 nanoGPT's
# batch, for nano what two CPU cores do in a few minutes. "pretrained" is fine-tuning, at a tenth of the learning rate.
PAPER = {"block_size": 256, "batch_size": 32, "grad_accum": 16, "update_proj_gap": 200, "alpha": 0.25}
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
CHOICES = fira.CHOICES | {"optimizer": METHODS, "model": PRESETS, "precision": ("fp32", "amp", "bf16")}
GROUP_FLAGS = ("rank", "update_proj_gap", "alpha", "alpha_mode", "proj_method", "gamma")
CHANGEABLE = "name out steps warmup eval_interval device threads compile checkpointing temperature top_k".split()
LOG_INTERVAL, EVAL_TOKENS, SAMPLE_TOKENS = 10, 2**17, 400  # steps; tokens of the validation split; tokens
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(k) or d) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
UPDATE = fira.fira_update  # which --compile compiles
STOP = []  # the signals that came: the loop saves and ends after the step at hand


@dataclass
class Config:
    """Every flag, with its help. None means: the model's or the method's own default, from the tables above."""

    optimizer: str = "fira"  # one or several of METHODS
    variant: str | None = None  # train with the subclass of Fira in this Python file
    model: str = "nano"  # one of PRESETS
    init_from: str | None = None  # start from this Hugging Face checkpoint: a folder, or a name on the hub
    data: str = "stdlib"  # stdlib, shakespeare, a text file, or what prepare_data.py has prepared
    name: str | None = None  # the run: its folder in --out (MODEL-DATA-OPTIMIZER-seedN)
    out: str = "out"  # folder for the runs
    steps: int | None = None  # optimizer steps
    batch_size: int | None = None  # sequences in a forward pass
    grad_accum: int | None = None  # forward passes in a step
    block_size: int | None = None  # tokens in a sequence
    lr: float | None = None  # peak learning rate
    warmup: int | None = None  # steps of linear warm-up (a tenth of the steps)
    rank: int | None = None  # rank of the projection, or of LoRA
    update_proj_gap: int | None = None  # T, steps between subspace changes
    alpha: float | None = None  # α, GaLore's factor
    alpha_mode: str | None = None  # what α multiplies: unscaled (default), paper or released
    proj_method: str | None = None  # how the subspace is found: subspace (default), svd or random
    gamma: float | None = None  # γ of the norm-growth limiter, inf for none (1.01)
    layerwise: bool = False  # update each weight during backward and free its gradient at once
    weight_decay: float = 0.0  # decoupled weight decay
    grad_clip: float = 0.0  # largest norm of the gradient, 0 for no clipping
    seed: int = 0  # seed of the weights and the batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    threads: int | None = None  # CPU threads (as many as cores)
    precision: str | None = None  # fp32, amp or bf16 (amp on CUDA, else fp32)
    compile: bool = False  # compile the model and the optimizer's update
    checkpointing: bool = False  # compute activations again in backward, not to keep them
    temperature: float = 0.8  # of sampling; 0 takes the likeliest token
    top_k: int = 50  # sample among this many tokens
    eval_interval: int | None = None  # steps between evaluations, each with a checkpoint (an eighth of all)

    def resolve(self) -> "Config":
        """Check the flags and fill in the defaults. Raises InputError."""
        for name, value in asdict(self).items():
            low = 0 if isinstance(value, float) or name in ("seed", "warmup") else 1
            if value is not None and value not in CHOICES.get(name, [value]):
                raise InputError(f"unknown {name} {value!r}: {nearest(str(value), [str(x) for x in CHOICES[name]])}")
            if type(value) in (int, float) and not (low <= value <= 1e9 or name == "gamma"):
                raise InputError(f"--{name} {value} must be from {low} to 1e9")
        if self.init_from and self.model != Config.model:
            raise InputError("--model goes without --init_from, which brings its own")
        if self.layerwise and (self.grad_accum or 1, self.grad_clip, WORLD) != (1, 0, 1):
            raise InputError("--layerwise frees each gradient at once: not with --grad_accum, --grad_clip or torchrun")
        (lr, setting), usual = METHODS[self.optimizer], TRAINING["pretrained" if self.init_from else self.model]
        steps, cuda = self.steps or usual["steps"], f"cuda:{LOCAL_RANK}"
        auto = cuda if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = {"auto": auto, "cuda": cuda}.get(self.device, self.device)
        parts = Path(self.init_from or self.model).name, Path(self.data).stem, Path(self.variant or self.optimizer).stem
        defaults = {"lr": lr / 10 if self.init_from else lr, "gamma": 1.01, "proj_method": "subspace"}
        defaults |= {"alpha_mode": "unscaled", "warmup": steps // 10, "eval_interval": min(1000, max(1, steps // 8))}
        defaults |= {"precision": "amp" if device.startswith("cuda") else "fp32", **usual, **(setting or {})}
        defaults |= {"name": f"{'-'.join(parts)}-seed{self.seed}"}
        given = {name: value for name, value in asdict(self).items() if value is not None} | {"device": device}
        return Config(**{f.name: given.get(f.name, defaults.get(f.name)) for f in fields(Config)})

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name


def nearest(name: str, choices) -> str:
    return f"did you mean {(difflib.get_close_matches(name, choices, 1, 0) or [None])[0]}? ({', '.join(choices)})"


def batch(tokens: np.ndarray, config: Config, step: int) -> torch.Tensor:
    """Random windows of a step, (grad_accum, batch_size, block_size + 1): a function of (seed, step) alone."""
    rng = np.random.default_rng((config.seed, step, 0))
    starts = rng.integers(len(tokens) - config.block_size, size=(config.grad_accum, config.batch_size))
    return torch.from_numpy(tokens[starts[..., None] + np.arange(config.block_size + 1)].astype(np.int64))


def schedule(step: int, config: Config) -> float:
    """The factor of the learning rate: linear warm-up, then a cosine to 10 % at the last step."""
    if step <= config.warmup:
        return step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * progress)


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
    optimizer_class = load_variant(config.variant) if config.variant else Fira
    optimizer = optimizer_class(param_groups(model, **options), lr=config.lr, weight_decay=config.weight_decay)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer


def load_variant(path: str) -> type[Fira]:
    """The one subclass of Fira that a Python file defines. Raises InputError; what the file raises shows its place."""
    spec = importlib.util.spec_from_file_location(f"variant_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Fira) and c is not Fira}
    if len(found) != 1:
        raise InputError(f"--variant {path} must define one subclass of Fira, but defines {len(found)}")
    return found.pop()


def inside_subspaces(seen: list[dict]) -> dict:
    """For the log, what `fira_update` returned for the projected matrices of the step at hand."""
    seen = [figures for figures in seen if figures]
    if not seen:
        return {}
    G, R, phi, S, limited = (torch.cat([s[key].flatten() for s in seen]) for key in ("G", "R", "phi", "S", "limited"))
    values = R.square().sum() / G.square().sum(), phi.mean(), S.norm(), limited.norm(), (limited < S * (1 - 1e-6)).sum()
    names = ("energy_share", "mean_phi", "S_norm", "S_limited", "matrices_limited")
    return dict(zip(names, torch.stack(values).tolist()))  # the host waits for the device, once


@torch.no_grad()
def evaluate(forward, tokens: np.ndarray, meta: dict, config: Config, autocast) -> dict:
    """The loss over fixed windows, evenly spaced in the validation split, and what follows from it."""
    n = min(EVAL_TOKENS // config.block_size or 1, (len(tokens) - 1) // config.block_size)
    starts = np.linspace(0, len(tokens) - config.block_size - 1, n).astype(np.int64)
    loss = 0.0  # nats a token
    for i in tqdm(range(0, n, config.batch_size), "evaluating", leave=False, disable=bool(RANK) or None, ncols=79):
        w = tokens[starts[i : i + config.batch_size, None] + np.arange(config.block_size + 1)].astype(np.int64)
        w = torch.from_numpy(w).to(config.device)
        with autocast:
            loss += forward(w[:, :-1], w[:, 1:]).item() * len(w) / n
    bits = loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}


def read_run(name: str, out: str) -> tuple[Config, list[dict]]:
    """The configuration and the log of a run, finished or not, by its name or its folder. Raises InputError."""
    folder = next((f for f in (Path(out) / name, Path(name)) if (f / "config.json").is_file()), None)
    if folder is None:
        there = sorted(path.parent.name for path in Path(out).glob("*/config.json"))
        raise InputError(f"no run {name!r} in {out}: {nearest(name, there)}")
    try:
        config = Config(**json.loads((folder / "config.json").read_text(encoding="utf-8"))).resolve()
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # a kill leaves half a line
        log = [entry for entry in map(json.loads, lines) if entry["step"] + entry["loss"] + entry["ms_per_step"]]
    except (ValueError, LookupError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{folder} is damaged, or not of this train.py ({error})") from None
    return replace(config, out=str(folder.parent), name=folder.name), log


def read_checkpoint(config: Config, given: dict) -> tuple[Config, list[dict], dict]:
    """A run's configuration with what was given anew, its log and its checkpoint. Raises InputError."""
    saved, log = read_run(config.name, config.out)
    path = saved.folder / "ckpt.pt"
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not check
            raise ValueError("it has another CRC")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        log = [entry for entry in log if entry["step"] <= checkpoint["step"]]
    except Exception as error:  # torch raises half a dozen kinds
        raise InputError(f"{path} is missing, damaged or not of this train.py ({first_line(error)})") from None
    for name in given.keys() - {*CHANGEABLE}:
        if getattr(config, name) != getattr(saved, name):
            raise InputError(f"{saved.folder} was trained with --{name} {getattr(saved, name)}, not {given[name]}")
    say(f"using      {saved.folder} at step {checkpoint['step']}")
    return replace(saved, **{name: getattr(config, name) for name in given.keys() - {"name", "out"}}), log, checkpoint


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
        raise InputError(f"cannot write {path} (is the disk full?): {first_line(error)}") from None


def train(config: Config, log: list[dict], checkpoint: dict | None) -> None:
    """One run, from its first step or from its checkpoint on."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    meta, train_tokens, val_tokens = prepare_data.load(config.data)
    tokenizer = prepare_data.get_tokenizer(meta["tokenizer"])  # now, so that none misses at the end
    if checkpoint and checkpoint["data"] != meta:
        raise InputError(f"data/{config.data} is not what {config.folder} was trained on: prepare that again")
    if min(len(train_tokens), len(val_tokens)) <= (config.block_size or 1):
        raise InputError(f"data/{config.data} is shorter than --block_size {config.block_size}: use a longer text")
    if config.batch_size % WORLD:
        raise InputError(f"--batch_size {config.batch_size} must be a multiple of the {WORLD} processes")
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
    describe(config, meta, model, optimizer, start)
    if not RANK:  # one process writes for all, and keeps others out of the folder until it ends, however it ends
        folder.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)  # a file lock on every system
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            raise InputError(f"another process is at work in {folder}") from None
        write(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
        write(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))

    losses, tokens = [], batch(train_tokens, config, start + 1)
    form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=config.steps, initial=start, bar_format=form, ncols=79, disable=bool(RANK) or None)
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
        evaluating = step % config.eval_interval == 0 or step == config.steps
        if not (step % LOG_INTERVAL == 0 or evaluating or STOP and WORLD == 1):
            continue
        figures = torch.stack([*losses, losses[0].new_tensor(len(STOP))])
        if WORLD > 1:
            dist.all_reduce(figures)
        *losses, stopping = (figures / WORLD).tolist()
        if not math.isfinite(sum(losses)):
            raise FloatingPointError(f"the loss is not finite in a step from {step + 1 - len(losses)} to {step}")
        entry = {"step": step, "loss": sum(losses) / len(losses), "lr": lr}
        entry["ms_per_step"] = 1000 * (time.perf_counter() - clock) / len(losses)
        if not config.layerwise:
            entry |= inside_subspaces(optimizer.seen.values())
        bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['ms_per_step']:.0f} ms/step", refresh=False)
        bar.update(len(losses))
        if evaluating:
            entry |= evaluate(forward, val_tokens, meta, config, autocast)
            say(f"step {step}: validation loss {entry['val_loss']:.4f}, {entry['bits_per_byte']:.4f} bits a byte")
        if (evaluating or stopping) and not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(f"a weight is not finite after step {step}")
        log.append(entry)
        if not RANK:
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            if evaluating or stopping:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                write(folder / "ckpt.pt", states | {"shape": asdict(model.config), "step": step, "data": meta})
        if stopping:
            bar.close()
            raise KeyboardInterrupt
        losses, clock = [], time.perf_counter()
    bar.close()
    if not RANK:
        lock.close()
        finish(config, model, optimizer, tokenizer, log)


def describe(config: Config, meta: dict, model: Transformer, optimizer: Fira, start: int) -> None:
    ranks = [(group["rank"] or 0, min(p.shape)) for group in optimizer.param_groups for p in group["params"]]
    low, wide = sum(0 < r < short for r, short in ranks), sum(r >= short for r, short in ranks)
    kinds = f"{low} matrices at rank {config.rank}, " * bool(low) + f"{len(ranks) - low - wide} others AdamW"
    n = sum(p.numel() for p in model.parameters())
    say(f"data       {meta['name']}: {meta['source']}, {meta['train_tokens']:,} tokens")
    say(f"model      {config.init_from or config.model}: {n:,} parameters, context {config.block_size}")
    say(f"optimizer  {config.variant or config.optimizer}, lr {config.lr:g}: {kinds}")
    say(f"device     {config.device}, {config.precision}, {torch.get_num_threads()} threads")
    say(f"run        {config.folder}, {f'after step {start}' if start else 'from the beginning'}")
    if wide:
        say(f"note       --rank {config.rank} is not below the width of {wide} matrices: no subspace there")
    if not low + wide and METHODS[config.optimizer][1] is not None:
        say("note       no group has a rank: everything is trained with AdamW")
    if config.model == "nano" and not config.init_from and config.steps < 1500:
        say("note       the learning rates are tuned for 1,500 steps: with fewer, compare with care")


def finish(config: Config, model: Transformer, optimizer: Fira, tokenizer, log: list[dict]) -> None:
    """The result, a sample and the picture of a run that is at its end."""
    state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    result = {"optimizer": config.optimizer, "lr": config.lr, "seed": config.seed, **log[-1], "state_bytes": state}
    result["ms_per_step"] = float(np.median([entry["ms_per_step"] for entry in log]))
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if config.device.startswith("cuda") else None
    write(config.folder / "result.json", json.dumps(result, indent=2) + "\n")
    write(config.folder / "sample.txt", text := written(model, tokenizer, "", config))
    say(f"sample     {'-' * 60}\n{text}\n{'-' * 71}")
    adamw = 8 * sum(p.numel() for p in model.parameters())
    say(f"state      {state / 1e6:,.1f} MB; AdamW's for all weights is {adamw / 1e6:,.1f} MB")
    draw({config.name: log}, config.folder / "curves.png")


def written(model: Transformer, tokenizer, prompt: str, config: Config) -> str:
    """The prompt and what the model writes after it; an empty prompt starts a new document."""
    torch.manual_seed(config.seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    new = list(model.generate(tokens, SAMPLE_TOKENS, config.temperature, config.top_k))
    return tokenizer.decode(tokens * bool(prompt) + new)


def show(names: list[str], out: str) -> None:
    """The table and the picture of runs, finished or not, with what differs between them as labels."""
    runs = [read_run(name, out) for name in names]
    flags = [asdict(config) for config, _ in runs]
    differ = [k for k in flags[0] if len({str(f[k]) for f in flags}) > 1 and (k == "steps" or k not in CHANGEABLE)]
    if "optimizer" in differ:  # what follows from it says nothing more
        differ = [k for k in differ if k not in GROUP_FLAGS or k == "rank"]
    labels = [", ".join(f[k] if isinstance(f[k], str) else f"{k} {f[k]}" for k in differ) for f in flags]
    labels = labels if len({*labels}) == len(labels) else [f["name"] for f in flags]
    say(f"{'':40} {'step':>6} {'val loss':>9} {'bits/byte':>10} {'ms/step':>8}")
    for label, (_, log) in zip(labels, runs):
        ms = np.median([entry["ms_per_step"] for entry in log])
        for entry in [entry for entry in log if "val_loss" in entry][-1:]:
            say(f"{label[-40:]:40} {entry['step']:6} {entry['val_loss']:9.4f} {entry['bits_per_byte']:10.4f} {ms:8.1f}")
    draw({label: log for label, (_, log) in zip(labels, runs)}, Path(out) / "compare.png")


def draw(logs: dict[str, list[dict]], path: Path) -> None:
    """Validation losses, and training losses pale, if there is matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot(xlabel="step", ylabel="loss (pale: training)")
    for i, (label, log) in enumerate(logs.items()):
        for key, style in ("loss", {"alpha": 0.3}), ("val_loss", {"marker": ".", "label": label}):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*np.reshape(points, (-1, 2)).T, color=f"C{i}", **style)
    axes.legend()
    axes.figure.savefig(path, dpi=150)
    say(f"wrote      {path}")


def say(text: str) -> None:
    """Print above the bar; when nobody reads any more (`| head`), go on, and print to nobody."""
    try:
        tqdm.write(text) if not RANK else None
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def explain(error: Exception) -> str:
    """One line for what a user can mend; the traceback for the rest."""
    line = first_line(error)
    if isinstance(error, FloatingPointError):
        return line + "; the last good checkpoint, if there is one, stays. Try a lower --lr"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "CPUAllocator" in line or "overflowed" in line:
        return "out of memory: try a smaller --batch_size (with more --grad_accum), --block_size or --model"
    return line if isinstance(error, (InputError, OSError, ValueError)) else traceback.format_exc()


def parse(arguments: list[str]) -> dict:
    """The flags that were given, and only those."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    helps = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    for f in fields(Config):
        kind = next(t for t in (bool, int, float, str) if t.__name__ in str(f.type))
        options = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
        options |= {"nargs": "+", "choices": METHODS} if f.name == "optimizer" else {}
        default = "" if f.default in (None, False) else f" (default {f.default})"
        parser.add_argument(f"--{f.name}", help=helps[f.name] + default, **options)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run --name")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="only show runs side by side: names or folders")
    parser.add_argument("--sample", metavar="PROMPT", help="only print what the run --name writes after PROMPT")
    parser.add_argument("--export", metavar="FOLDER", help="only write the run's model, for transformers")
    return vars(parser.parse_args(arguments))


def use(config: Config, given: dict, prompt: str | None, folder: str | None) -> None:
    """--sample and --export: let a run's last checkpoint write, or write it for transformers."""
    config, _, checkpoint = read_checkpoint(config, given)
    name, model = checkpoint["data"]["tokenizer"], build(config, 0, checkpoint)[0]
    tokenizer = prepare_data.get_tokenizer(name)
    if prompt is not None:
        say(written(model, tokenizer, prompt, config))
    if folder is not None:
        export(model, folder, name[3:] if name.startswith("hf:") else None, tokenizer.end_of_text)
        say(f"wrote      {folder}")


def command(given: dict) -> None:
    resume, names, prompt, folder = (given.pop(name, None) for name in ("resume", "compare", "sample", "export"))
    configs = [Config(**given | {"optimizer": name}).resolve() for name in given.get("optimizer", ["fira"])]
    if prompt is not None or folder is not None:
        return use(configs[0], given, prompt, folder)
    if not importlib.util.find_spec("matplotlib"):
        say('no pictures of the losses without matplotlib: pip install -e ".[plot]"')
    if names:
        return show(names, configs[0].out)
    if WORLD > 1:
        dist.init_process_group()
    elif not resume:
        given["data"] = prepare_data.ensure(configs[0].data)
    for number in (signal.SIGINT, signal.SIGTERM):  # the loop ends after the step at hand; the second one ends at once
        signal.signal(number, lambda number, _: STOP.append(number) or signal.signal(number, signal.SIG_DFL))
    done = []
    for config in configs:
        try:
            log, checkpoint, config.data = [], None, given.get("data", config.data)
            config.name += f"-{config.optimizer}" * (len(configs) > 1 and "name" in given)
            while (config.folder / "ckpt.pt").exists() and not resume:  # an earlier run stays as it is
                name, _, number = config.name.rpartition("-")
                config.name = f"{name}-{int(number) + 1}" if number.isdigit() else f"{config.name}-2"
            if resume:
                config, log, checkpoint = read_checkpoint(config, given)
                if checkpoint["step"] >= config.steps:
                    raise InputError(f"{config.folder} is at its last step already: go on with more --steps")
            train(config, log, checkpoint)
            done.append(config.name)
        except Exception as error:
            if len(configs) == 1:
                raise
            say(f"{config.optimizer} failed: {explain(error)}")
    if len(configs) > 1 and done:
        show(done, config.out)
    sys.exit(len(done) < len(configs))


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # not every code page has an α
    try:
        command(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        go_on = shlex.join(["python", "train.py", *(argument for argument in sys.argv[1:] if argument != "--resume")])
        say(f"stopped and saved; go on with: {go_on} --resume" if STOP else "stopped")
        sys.exit(128 + max(STOP, default=signal.SIGINT))
    except Exception as error:
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    main()
