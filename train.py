"""Train a small language model with Fira, AdamW, GaLore, LoRA or another of the family.

    python train.py                                          # a small LLaMA with Fira: minutes on a laptop
    python train.py --optimizer fira galore adamw lora       # the same for each, and a table
    python train.py --model 60m --data notes.txt             # a larger model on your own text
    python train.py --resume                                 # go on from the last checkpoint, bit for bit
    python train.py --sample "def main("                     # let the last checkpoint write
    python train.py --init_from gpt2 --data prepared         # fine-tune a Hugging Face GPT-2 or LLaMA checkpoint
    python train.py --export folder                          # the last checkpoint in Hugging Face's format

A run writes out/<run>/: config.json, log.jsonl, ckpt.pt, result.json and sample.txt.
"""

import argparse
import codecs
import difflib
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fira
import prepare_data
from fira import Fira, param_groups, state_bytes
from model import PRESETS, ModelConfig, Transformer, add_lora, export, load_pretrained
from prepare_data import InputError, Parser

# Each method is a learning rate and a setting of `Fira`; without a setting, everything is AdamW.
METHODS = {
    "fira": (1e-2, {}),
    "fira_matrix": (1e-2, {"scaling": "matrix"}),
    "fira_only_scaling": (1e-2, {"only_scaling": True}),
    "galore": (1e-2, {"scaling": None, "proj_method": "svd"}),
    "galore_add": (1e-2, {"scaling": "unit", "gamma": math.inf, "proj_method": "svd"}),
    "apollo": (1e-2, {"only_scaling": True, "proj_method": "random"}),
    "apollo_mini": (1e-2, {"only_scaling": True, "proj_method": "random", "scaling": "matrix", "rank": 1}),
    "adamw": (2e-3, None),
    "lora": (3e-3, None),
}

# What a model is trained with unless a flag says otherwise: the paper's Appendix for 60m to 7b, with its
# batch of 131k tokens; nanoGPT's batch for gpt2; and what two CPU cores do in a few minutes for nano.
PAPER = {"block_size": 256, "batch_size": 32, "grad_accum": 16, "update_proj_gap": 200, "alpha": 0.25}
TRAINING = {
    "nano": PAPER
    | {"steps": 1500, "rank": 32, "block_size": 128, "batch_size": 16, "grad_accum": 1, "update_proj_gap": 100},
    "9m": PAPER | {"steps": 10_000, "rank": 32},
    "20m": PAPER | {"steps": 10_000, "rank": 64},
    "35m": PAPER | {"steps": 10_000, "rank": 96},
    "60m": PAPER | {"steps": 10_000, "rank": 128},
    "130m": PAPER | {"steps": 20_000, "rank": 256},
    "350m": PAPER | {"steps": 60_000, "rank": 256},
    "1b": PAPER | {"steps": 100_000, "rank": 512, "alpha": 0.0625},
    "7b": PAPER | {"steps": 150_000, "rank": 1024, "alpha": 0.0625},
    "gpt2": PAPER | {"steps": 100_000, "rank": 256, "block_size": 1024, "batch_size": 12, "grad_accum": 40},
    # --init_from: fine-tuning, at a tenth of the method's learning rate
    "pretrained": PAPER
    | {"steps": 500, "rank": 16, "block_size": None, "batch_size": 8, "grad_accum": 1, "update_proj_gap": 100},
}
GPT2_URL = "https://huggingface.co/openai-community/gpt2/resolve/main/"
TOKENIZERS = {257: "bytes", 50257: "gpt2"}  # by vocabulary, to sample from a pretrained model
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
ALPHA_MODES, PROJ_METHODS, MOMENTS = (fira.CHOICES[name] for name in ("alpha_mode", "proj_method", "moments"))
GROUP_FLAGS = ("rank", "update_proj_gap", "alpha", "alpha_mode", "proj_method", "moments", "spread", "gamma")
LOG_INTERVAL = 10  # steps
EVAL_TOKENS = 2**17  # of the validation split, the same at every evaluation
SAMPLE_TOKENS = 400


def flag(default, help, **checks):
    return field(default=default, metadata={"help": help, **checks})


@dataclass
class Config:
    """Every flag. None means: the model's or the method's own default, from the tables above."""

    optimizer: str = flag("fira", f"one or several of {', '.join(METHODS)}", choices=METHODS)
    model: str = flag("nano", f"one of {', '.join(PRESETS)}", choices=PRESETS)
    init_from: str | None = flag(None, "start from this folder's Hugging Face checkpoint, or from gpt2, downloaded")
    data: str = flag("stdlib", "stdlib, shakespeare, a text file, or what prepare_data.py has prepared")
    steps: int | None = flag(None, "optimizer steps", min=1)
    batch_size: int | None = flag(None, "sequences in a forward pass", min=1)
    grad_accum: int | None = flag(None, "forward passes in a step", min=1)
    block_size: int | None = flag(None, "tokens in a sequence", min=1)
    lr: float | None = flag(None, "peak learning rate", min=0)
    warmup: int | None = flag(None, "steps of linear warm-up (a tenth of the steps)", min=0)
    rank: int | None = flag(None, "rank of the projection, or of LoRA", min=1)
    update_proj_gap: int | None = flag(None, "T, steps between subspace changes", min=1)
    alpha: float | None = flag(None, "α, GaLore's factor")
    alpha_mode: str = flag("unscaled", "what α multiplies: unscaled, paper or released", choices=ALPHA_MODES)
    proj_method: str | None = flag(None, "how the subspace is found: svd, subspace or random", choices=PROJ_METHODS)
    moments: str = flag("align", "Adam's moments at a subspace change: keep, align or rotate", choices=MOMENTS)
    spread: bool = flag(False, "change the matrices' subspaces one after the other, not all in one step")
    layerwise: bool = flag(False, "update each weight during backward and free its gradient at once")
    gamma: float | None = flag(None, "γ of the norm-growth limiter, inf for none (1.01)", min=1)
    weight_decay: float = flag(0.0, "decoupled weight decay", min=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient, 0 for no clipping", min=0)
    seed: int = flag(0, "seed of the weights and the batches", min=0, max=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str | None = flag(None, "fp32, amp or bf16 (amp on CUDA, else fp32)", choices=("fp32", "amp", "bf16"))
    compile: bool = flag(False, "compile the model")
    checkpointing: bool = flag(False, "compute activations again in backward, not to keep them")
    temperature: float = flag(0.8, "of sampling; 0 takes the likeliest token", min=0)
    top_k: int = flag(50, "sample among this many tokens", min=1)
    eval_interval: int = flag(250, "steps between evaluations, each with a checkpoint", min=1)
    out: str = flag("out", "folder for the runs")

    def resolve(self) -> "Config":
        """Check the flags and fill in the defaults. Raises InputError."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value is not None and value not in choices:
                near = difflib.get_close_matches(value, choices, 1, 0)
                raise InputError(f"unknown {f.name} {value!r}: did you mean {near[0]}? ({', '.join(choices)})")
            if "min" in f.metadata and value is not None and not value >= f.metadata["min"]:
                raise InputError(f"--{f.name} {value} must be at least {f.metadata['min']}")
            if "max" in f.metadata and value > f.metadata["max"]:
                raise InputError(f"--{f.name} {value} must be at most {f.metadata['max']}")
        if self.init_from and self.model != Config.model:
            raise InputError("--model goes without --init_from, which brings its own")
        lr, setting = METHODS[self.optimizer]
        if self.init_from:
            lr /= 10
        training = TRAINING["pretrained" if self.init_from else self.model]
        defaults = {"lr": lr, "gamma": 1.01, "proj_method": "subspace", **training, **(setting or {})}
        if "apollo" in self.optimizer:
            defaults.pop("alpha")  # depends on the model's width
        for name, value in defaults.items():
            if getattr(self, name, "no flag") is None:
                setattr(self, name, value)
        if self.warmup is None:
            self.warmup = self.steps // 10
        if self.layerwise and (self.grad_accum > 1 or self.grad_clip):
            raise InputError("--layerwise frees each gradient at once: it needs --grad_accum 1 and no --grad_clip")
        return self

    @property
    def folder(self) -> Path:
        model = Path(self.init_from).resolve().name if self.init_from else self.model
        return Path(self.out) / f"{model}-{self.data}-{self.optimizer}-seed{self.seed}"


# What may differ from the checkpoint's on --resume.
CHANGEABLE = {"steps", "device", "compile", "checkpointing", "temperature", "top_k", "eval_interval", "out"}


# Data


def batch(tokens: np.ndarray, config: Config, step: int) -> torch.Tensor:
    """Random windows of a step, (grad_accum, batch_size, block_size + 1): a function of (seed, step) alone."""
    rng = np.random.default_rng((config.seed, step, 0))
    starts = rng.integers(len(tokens) - config.block_size, size=(config.grad_accum, config.batch_size))
    return windows(tokens, starts, config)


def windows(tokens: np.ndarray, starts: np.ndarray, config: Config) -> torch.Tensor:
    return torch.from_numpy(tokens[starts[..., None] + np.arange(config.block_size + 1)].astype(np.int64))


@torch.no_grad()
def evaluate(model, tokens: np.ndarray, config: Config, device, autocast) -> float:
    """Mean loss in nats a token over fixed windows, evenly spaced in the validation split."""
    n = min(EVAL_TOKENS // config.block_size or 1, (len(tokens) - 1) // config.block_size)
    starts = np.linspace(0, len(tokens) - config.block_size - 1, n).astype(np.int64)
    total = 0.0
    for i in range(0, n, config.batch_size):
        w = windows(tokens, starts[i : i + config.batch_size], config).to(device)
        with autocast:
            total += model(w[:, :-1], w[:, 1:]).item() * len(w)
    return total / n


# Model and optimizer


def pick_device(name: str) -> torch.device:
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    there = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cuda"] * cuda
    if name not in there:
        raise InputError(f"device {name!r} is not there; this machine has {', '.join(there)}")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # events and synchronization act on the current device
    return torch.device(name)


def pretrained(config: Config) -> Transformer:
    """The model of --init_from. Raises InputError."""
    folder = Path(config.init_from)
    if config.init_from == "gpt2" and not folder.exists():
        folder = prepare_data.DATA / ".gpt2"
        for name in ("config.json", "model.safetensors"):
            prepare_data.download(GPT2_URL + name, folder / name)
    try:
        model = load_pretrained(folder, config.block_size)
    except ValueError as error:
        raise InputError(str(error)) from None
    config.block_size = config.block_size or min(256, model.config.block_size)
    return model


def build(config: Config, vocab_size: int, device, shape: dict | None = None) -> tuple[Transformer, Fira, int]:
    """The model, its optimizer, and the bytes of state that AdamW would hold for the same model.

    `shape` is the ModelConfig of a checkpoint. Raises InputError.
    """
    torch.manual_seed(config.seed)
    if shape:
        model = Transformer(ModelConfig(**shape))
    elif config.init_from:
        model = pretrained(config)
        if model.config.vocab_size != vocab_size:
            raise InputError(
                f"{config.init_from} has a vocabulary of {model.config.vocab_size:,}, data/{config.data} one of "
                f"{vocab_size:,}: prepare the data with the model's tokenizer"
            )
    else:
        model = Transformer(ModelConfig.preset(config.model, vocab_size, config.block_size))
    model.checkpointing = config.checkpointing
    if config.alpha is None:  # what APOLLO's release does with its Gaussian projection and its `scale`
        d_model, scale = model.config.d_model, 128 if config.optimizer == "apollo_mini" else 1
        config.alpha = math.sqrt(scale * min(config.rank, d_model) / d_model)
    adamw_bytes = state_bytes(param_groups(model, rank=None))
    if config.optimizer == "lora":
        add_lora(model, config.rank)
    model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    setting = METHODS[config.optimizer][1]
    if setting is None:
        groups = param_groups(model, rank=None)
    else:
        flags = {name: getattr(config, name) for name in GROUP_FLAGS}
        groups = param_groups(model, **setting | flags | ({"gamma": None} if config.gamma == math.inf else {}))
    try:
        optimizer = Fira(groups, lr=config.lr, weight_decay=config.weight_decay)
    except ValueError as error:
        raise InputError(str(error)) from None
    return model, optimizer, adamw_bytes


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine to 10 % of the peak at the last step."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# Checkpoints and logs


def write(path: Path, content) -> None:
    """Text, or what torch.save takes, to a temporary file that then takes the name: whole or not at all."""
    if RANK:
        return  # one process writes for all
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(folder: Path) -> dict:
    """A run's last checkpoint, its "config" as a Config. Raises InputError."""
    path = folder / "ckpt.pt"
    if not path.exists():
        raise InputError(f"nothing to go on from: there is no {path}")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not check
                raise ValueError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"] = Config(**checkpoint["config"]).resolve()
        return {
            key: checkpoint[key] for key in ("model", "shape", "optimizer", "scaler", "step", "config", "data", "log")
        }
    except Exception as error:  # torch raises half a dozen kinds
        raise InputError(f"{path} is damaged or not a checkpoint of this train.py ({type(error).__name__})") from None


def restore(checkpoint: dict, folder: Path, **parts) -> None:
    """Load the checkpoint's state into model=..., optimizer=..., scaler=... Raises InputError."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder / 'ckpt.pt'} does not fit this model: {reason}") from None


def figures(val_loss: float, meta: dict) -> dict:
    return {
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),
        "bits_per_byte": val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"],
    }


def in_words(figures: dict) -> str:
    return (
        f"validation loss {figures['val_loss']:.4f}, perplexity {figures['perplexity']:.2f}, "
        f"{figures['bits_per_byte']:.4f} bits per byte"
    )


def peak_bytes(device) -> int | None:
    """Peak memory: allocated on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mega(n: float | None) -> str:
    return "-" if n is None else f"{n / 1e6:.1f} MB"


# The run


def mark(device):
    """A point in time in the device's own stream of work, for `seconds_between`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(a, b) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000


def train(config: Config, given: dict, resume: bool) -> None:
    """One run with one optimizer; `given` are the flags that the user gave. Raises InputError."""
    checkpoint = load_checkpoint(config.folder) if resume else None
    if checkpoint:
        saved = checkpoint["config"]
        for name in given.keys() - CHANGEABLE:
            was, now = getattr(saved, name), getattr(config, name)
            if was != now:
                raise InputError(f"{config.folder} was trained with --{name} {was}, not {now}")
        config = replace(saved, **{name: getattr(config, name) for name in (*given, "out")})
    device = pick_device(config.device)
    config.precision = config.precision or ("amp" if device.type == "cuda" else "fp32")
    meta, train_tokens, val_tokens = prepare_data.load(config.data)
    if checkpoint and checkpoint["data"] != meta:
        what = "tokenizer" if checkpoint["data"]["tokenizer"] != meta["tokenizer"] else "text"
        raise InputError(f"data/{config.data} now has another {what} than the checkpoint's; prepare that one again")
    encoding = prepare_data.get_encoding(meta["tokenizer"])  # now, so that a missing one is not found out at the end

    shape = checkpoint and checkpoint["shape"]
    model, optimizer, adamw_bytes = build(config, meta["vocab_size"], device, shape)
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        if len(tokens) <= config.block_size:
            raise InputError(
                f"data/{config.data}/{split}.bin has {len(tokens)} tokens, and one window needs "
                f"{config.block_size + 1}: use a longer text or a smaller --block_size"
            )
    bf16_there = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "amp" and not bf16_there)
    if config.batch_size % WORLD:
        raise InputError(f"--batch_size {config.batch_size} must be a multiple of the {WORLD} processes")
    if config.layerwise:
        if scaler.is_enabled() or WORLD > 1:
            raise InputError(
                "--layerwise goes neither with fp16, whose gradients are scaled, nor with several processes"
            )
        optimizer.step_in_backward()
    autocast = nullcontext()
    if config.precision == "amp":
        autocast = torch.autocast(device.type, torch.bfloat16 if bf16_there else torch.float16)
    start, log = 0, []
    if checkpoint:
        restore(checkpoint, config.folder, model=model, optimizer=optimizer, scaler=scaler)
        start = checkpoint["step"]
        log = checkpoint["log"]
        if start > config.steps or (start == config.steps and "val_loss" not in log[-1]):
            raise InputError(f"{config.folder} is at step {start} already: go on with more --steps than that")
        del checkpoint

    folder, state = config.folder, state_bytes(optimizer.param_groups)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    n_parameters = sum(p.numel() for p in model.parameters())
    n_tokens, vocab_size = len(train_tokens), meta["vocab_size"]
    print(f"data       {config.data}: {meta['source']}, {n_tokens:,} tokens, vocabulary {vocab_size:,}")
    print(f"model      {config.init_from or config.model}: {n_parameters:,} parameters, context {config.block_size}")
    print(f"device     {device}, {config.precision}{threads}")
    print(f"optimizer  {config.optimizer}, lr {config.lr:g}")
    print(f"state      {mega(state)}; AdamW would hold {mega(adamw_bytes)} for this model")
    if start:
        print(f"resuming   {folder} after step {start}")
    elif (folder / "ckpt.pt").exists() and not RANK:
        earlier = (folder.with_name(f"{folder.name}-earlier{i}") for i in itertools.count(1))
        earlier = next(path for path in earlier if not path.exists())
        folder.rename(earlier)
        print(f"keeping    the earlier run of this name as {earlier}")
    folder.mkdir(parents=True, exist_ok=True)
    if start < config.steps:
        (folder / "result.json").unlink(missing_ok=True)
    write(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    write(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))

    stop = []  # signals; the loop ends after the step at hand

    def on_signal(number, frame):
        if stop:
            raise KeyboardInterrupt  # the second time, at once
        stop.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    forward = torch.compile(model) if config.compile else model
    if WORLD > 1:
        forward = DistributedDataParallel(forward)
    seconds = optimizer_seconds = measured_steps = 0
    losses, optimizer_spans = [], []  # of the steps since the last log line; on the device until then

    def load(step):
        cuda, step_windows = device.type == "cuda", batch(train_tokens, config, step)[:, RANK::WORLD]
        return (step_windows.pin_memory() if cuda else step_windows).to(device, non_blocking=cuda)

    step_windows = load(start + 1)
    clock = time.perf_counter()
    with tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=RANK > 0) as bar:
        for step in range(start + 1, config.steps + 1):
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, problem, optimizer_start = 0.0, None, mark(device)
            try:
                for i, w in enumerate(step_windows, 1):  # (batch_size / processes, block_size + 1)
                    average = WORLD == 1 or i == config.grad_accum  # the processes' gradients, once a step
                    with nullcontext() if average else forward.no_sync():
                        with autocast:
                            part = forward(w[:, :-1], w[:, 1:]) / config.grad_accum
                        scaler.scale(part).backward()
                    loss += part.detach()
                step_windows = load(step + 1)  # while the device works
                optimizer_start = mark(device)
                if config.grad_clip:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                scaler.step(optimizer)
            except FloatingPointError as error:
                problem = f"at step {step}, {error}"
            losses.append(loss)
            scaler.update()
            optimizer.zero_grad()
            optimizer_spans.append((optimizer_start, mark(device)))

            evaluation, stopping = step % config.eval_interval == 0 or step == config.steps, bool(stop)
            if WORLD > 1:
                stopping = False  # until all processes can agree on it
            if not (evaluation or problem or stopping or step % LOG_INTERVAL == 0):
                continue
            # Only here does the host wait for the device.
            losses = torch.stack(losses)
            if WORLD > 1:
                dist.all_reduce(losses)
                losses /= WORLD
                agreed = torch.tensor(max(stop, default=0), device=device)
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
                stop = [agreed.item()] if agreed else []
                stopping = bool(stop)
            losses = losses.tolist()
            if device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - clock
            if (evaluation or stopping) and not all(p.isfinite().all() for p in model.parameters()):
                problem = f"a weight is not finite after step {step}"
            for i, value in enumerate(losses, step - len(losses) + 1):
                if not math.isfinite(value):
                    problem = f"the loss is {value} at step {i}"
                    break
            if problem:
                raise InputError(f"{problem}; the last good checkpoint, if there is one, stays. Try a lower --lr")
            if step > start + LOG_INTERVAL or config.steps - start <= LOG_INTERVAL:  # else warm-up
                seconds += elapsed
                optimizer_seconds += sum(seconds_between(*span) for span in optimizer_spans)
                measured_steps += len(losses)
            speed = config.batch_size * config.grad_accum * config.block_size * len(losses) / elapsed
            entry = {"step": step, "loss": sum(losses) / len(losses), "lr": lr, "tokens_per_second": round(speed)}
            bar.update(len(losses))
            bar.set_postfix_str(f"loss {entry['loss']:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s")
            if evaluation:
                entry |= figures(evaluate(forward, val_tokens, config, device, autocast), meta)
                bar.write(f"step {step}: {in_words(entry)}")
            log.append(entry)
            if not RANK:
                with open(folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
            if evaluation or stopping:
                write(
                    folder / "ckpt.pt",
                    {
                        "model": model.state_dict(),
                        "shape": asdict(model.config),
                        "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(),
                        "step": step,
                        "config": asdict(config),
                        "data": meta,
                        "log": log,
                    },
                )
            if stopping:
                bar.close()
                print(f"stopped after step {step} and saved; go on with: {resume_command()}")
                sys.exit(128 + stop[0])
            losses, optimizer_spans = [], []
            clock = time.perf_counter()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if RANK:
        return
    if not (folder / "result.json").exists():
        result = {"optimizer": config.optimizer, "lr": config.lr, "seed": config.seed, "steps": log[-1]["step"]}
        result |= {name: log[-1][name] for name in ("val_loss", "perplexity", "bits_per_byte")}
        result |= {
            "state_bytes": state,
            "peak_bytes": peak_bytes(device),
            "ms_per_step": 1000 * seconds / measured_steps if measured_steps else None,
            "optimizer_share": optimizer_seconds / seconds if measured_steps else None,
        }
        write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    result = json.loads((folder / "result.json").read_text())
    print(f"\ndone       {result['steps']} steps: {in_words(result)}")
    if result["ms_per_step"]:
        ms, share, peak = result["ms_per_step"], result["optimizer_share"], mega(result["peak_bytes"])
        print(f"           {ms:.1f} ms a step, {share:.1%} of it in the optimizer; peak memory {peak}")
    text = "".join(sample(model, encoding, "", config))
    write(folder / "sample.txt", text)
    print(f"\nsample     {'-' * 60}\n{text}\n{'-' * 71}")
    print(f"wrote      {folder}/: config.json, log.jsonl, ckpt.pt, result.json, sample.txt")


def sample(model: Transformer, encoding, prompt: str, config: Config) -> Iterator[str]:
    """The prompt and what the model writes after it, as it is written; an empty prompt starts a new document."""
    tokens = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    torch.manual_seed(config.seed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield prompt
    for token in model.generate(tokens, SAMPLE_TOKENS, config.temperature, config.top_k):
        yield decoder.decode(encoding.decode_single_token_bytes(token))


def trained(config: Config) -> tuple[Transformer, str]:
    """The model of the run's last checkpoint, or of --init_from before there is one, and its tokenizer."""
    device = pick_device(config.device)
    if config.init_from and not (config.folder / "ckpt.pt").exists():
        model = pretrained(config).to(device)
        return model, TOKENIZERS.get(model.config.vocab_size, f"for {model.config.vocab_size:,} tokens")
    checkpoint = load_checkpoint(config.folder)
    model = build(checkpoint["config"], checkpoint["data"]["vocab_size"], device, checkpoint["shape"])[0]
    restore(checkpoint, config.folder, model=model)
    return model, checkpoint["data"]["tokenizer"]


# Comparing optimizers


def compare(config: Config, optimizers: list[str], given: dict, resume: bool) -> None:
    """Train with each optimizer in a process of its own, so that each has its own peak memory; then one table."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    folders = [replace(config, optimizer=name).folder for name in optimizers]
    if resume and not any((folder / "ckpt.pt").exists() for folder in folders):
        raise InputError(f"nothing to go on from: there is no ckpt.pt in {', '.join(map(str, folders))}")
    rows, curves = [], {}
    for name, folder in zip(optimizers, folders):
        print(f"\n=== {name} ===", flush=True)
        resume_flag = ["--resume"] * (resume and (folder / "ckpt.pt").exists())
        child = subprocess.Popen([sys.executable, __file__, *flags, f"--optimizer={name}", *resume_flag])
        signal.signal(signal.SIGINT, lambda *_: None)  # it has Ctrl-C too, saves, and says how to go on
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        code = child.wait()
        if code >= 128 or code < 0:
            print(f"the comparison stopped; go on with: {resume_command()}")
            sys.exit(code if code > 0 else 128 - code)
        if code:
            print(f"{name} failed; going on with the others", flush=True)
            continue
        rows.append(json.loads((folder / "result.json").read_text()))
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        curves[name] = [entry for entry in entries if "val_loss" in entry]
    if not rows:
        sys.exit("error: every optimizer failed")
    print("\noptimizer               lr  val loss  perplexity  bits/byte     state      peak  ms/step  in optimizer")
    for row in rows:
        print(
            f"{row['optimizer']:18} {row['lr']:7g} {row['val_loss']:9.4f} {row['perplexity']:11.3f} "
            f"{row['bits_per_byte']:10.4f} {mega(row['state_bytes']):>9} {mega(row['peak_bytes']):>9} "
            f"{row['ms_per_step'] or math.nan:8.1f} {row['optimizer_share'] or math.nan:13.1%}"
        )
    folder = replace(config, optimizer="compare").folder
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "table.json", json.dumps(rows, indent=2) + "\n")
    print(f"\nwrote      {folder}/table.json")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print('no picture of the loss curves without matplotlib: pip install -e ".[plot]"')
    else:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name, entries in curves.items():
            axes.plot(*zip(*((entry["step"], entry["val_loss"]) for entry in entries)), marker=".", label=name)
        title = f"{config.model} on {config.data}, seed {config.seed}"
        axes.set(xlabel="step", ylabel="validation loss (nats a token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / "curves.png", dpi=150)
        print(f"wrote      {folder}/curves.png")
    if len(rows) < len(optimizers):
        sys.exit(1)


# Command line


def resume_command() -> str:
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return shlex.join(["python", sys.argv[0], *arguments, "--resume"])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags that were given, and only those."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in fields(Config):
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", help=f.metadata["help"])
            continue
        kind = next(t for t in (int, float, str) if t.__name__ in str(f.type))
        nargs = "+" if f.name == "optimizer" else None
        help = f.metadata["help"] + ("" if f.default is None else f" (default {f.default})")
        parser.add_argument(f"--{f.name}", type=kind, nargs=nargs, metavar=kind.__name__.upper(), help=help)
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--sample", metavar="PROMPT", help="only print what the last checkpoint writes after PROMPT")
    parser.add_argument("--export", metavar="FOLDER", help="only write the last checkpoint in Hugging Face's format")
    return parser.parse_args(arguments)


def main() -> None:
    given = vars(parse(sys.argv[1:]))
    resume, prompt, folder = given.pop("resume", False), given.pop("sample", None), given.pop("export", None)
    optimizers = list(dict.fromkeys(given.pop("optimizer", ["fira"])))
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        for name in optimizers:
            config = Config(**given, optimizer=name).resolve()
        pick_device(config.device)
        if len(optimizers) > 1 and (prompt, folder) != (None, None):
            raise InputError("--sample and --export go with one --optimizer")
        if WORLD > 1:
            if (len(optimizers), prompt, folder) != (1, None, None):
                raise InputError("several processes train with one --optimizer, and do nothing else")
            dist.init_process_group()
            if RANK:
                dist.barrier()  # the first process prepares the data
        given["data"] = config.data = prepare_data.ensure(config.data)
        if WORLD > 1 and not RANK:
            dist.barrier()
        if prompt is not None:
            model, tokenizer = trained(config)
            for text in sample(model, prepare_data.get_encoding(tokenizer), prompt, config):
                print(text, end="", flush=True)
            print()
        elif folder is not None:
            export(trained(config)[0], folder)
            print(f"wrote      {folder}/: config.json, model.safetensors")
        elif len(optimizers) > 1:
            compare(config, optimizers, given, resume)
        else:
            train(config, given, resume)
            if WORLD > 1:
                dist.destroy_process_group()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit("error: out of memory: try a smaller --batch_size (with more --grad_accum) or a smaller --model")
    except RuntimeError as error:
        if WORLD > 1 and "peer" in str(error):
            sys.exit(f"error: process {RANK} lost another one; go on from the last checkpoint with --resume")
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        sys.exit(f"error: torch cannot compile here: {str(error).splitlines()[0]}; leave out --compile")


if __name__ == "__main__":
    main()
