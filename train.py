"""Train a small language model with Fira, AdamW, GaLore, LoRA or another of the family.

    python train.py                                          # a small LLaMA with Fira: minutes on a laptop
    python train.py --optimizer fira galore adamw lora       # the same for each, and a table
    python train.py --model 60m --data notes.txt             # a larger model on your own text
    python train.py --resume                                 # go on from the last checkpoint, bit for bit
    python train.py --sample "def main("                     # let the last checkpoint write

A run writes out/<run>/: config.json, log.jsonl, ckpt.pt, result.json and sample.txt.
"""

import argparse
import difflib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prepare_data
from fira import Fira, param_groups, state_bytes
from model import PRESETS, ModelConfig, Transformer, add_lora
from prepare_data import InputError

# Each method is a learning rate and a setting of `Fira`; without a setting, everything is AdamW.
METHODS = {
    "fira": (1e-2, {}),
    "fira_matrix": (1e-2, {"scaling": "matrix"}),
    "fira_only_scaling": (1e-2, {"only_scaling": True}),
    "galore": (1e-2, {"scaling": None}),
    "galore_add": (1e-2, {"scaling": "unit", "gamma": None}),
    "apollo": (1e-2, {"only_scaling": True, "proj_method": "random"}),
    "apollo_mini": (1e-2, {"only_scaling": True, "proj_method": "random", "scaling": "matrix", "rank": 1}),
    "adamw": (2e-3, None),
    "lora": (2e-3, None),
}

# What a model is trained with unless a flag says otherwise: the paper's Appendix for 60m to 7b, with its
# batch of 131k tokens; nanoGPT's batch for gpt2; and what two CPU cores do in a few minutes for nano.
PAPER = {"block_size": 256, "batch_size": 32, "grad_accum": 16, "update_proj_gap": 200, "alpha": 0.25}
TRAINING = {
    "nano": {"steps": 1500, "block_size": 128, "batch_size": 16, "grad_accum": 1, "rank": 32, "update_proj_gap": 100, "alpha": 0.25},
    "9m": PAPER | {"steps": 10_000, "rank": 32},
    "20m": PAPER | {"steps": 10_000, "rank": 64},
    "35m": PAPER | {"steps": 10_000, "rank": 96},
    "60m": PAPER | {"steps": 10_000, "rank": 128},
    "130m": PAPER | {"steps": 20_000, "rank": 256},
    "350m": PAPER | {"steps": 60_000, "rank": 256},
    "1b": PAPER | {"steps": 100_000, "rank": 512, "alpha": 0.0625},
    "7b": PAPER | {"steps": 150_000, "rank": 1024, "alpha": 0.0625},
    "gpt2": PAPER | {"steps": 100_000, "rank": 256, "block_size": 1024, "batch_size": 12, "grad_accum": 40},
}
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
    alpha_mode: str = flag("unscaled", "what α multiplies: unscaled, paper or released", choices=("unscaled", "paper", "released"))
    gamma: float = flag(1.01, "γ of the norm-growth limiter, inf for none", min=1)
    weight_decay: float = flag(0.0, "decoupled weight decay", min=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient, 0 for no clipping", min=0)
    seed: int = flag(0, "seed of the weights and the batches", min=0)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str | None = flag(
        None, "fp32, amp (float32 weights, 16-bit arithmetic) or bf16 (the weights, too); default amp on CUDA, else fp32",
        choices=("fp32", "amp", "bf16"),
    )  # fmt: skip
    compile: bool = flag(False, "compile the model")
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
        for name, value in {"lr": METHODS[self.optimizer][0], **TRAINING[self.model]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.warmup is None:
            self.warmup = self.steps // 10
        return self

    @property
    def folder(self) -> Path:
        return Path(self.out) / f"{self.model}-{self.data}-{self.optimizer}-seed{self.seed}"


# What may differ from the checkpoint's on --resume.
CHANGEABLE = {"steps", "device", "compile", "eval_interval", "out"}


# Data


def batch(tokens: np.ndarray, config: Config, meta: dict, step: int, rank: int = 0) -> torch.Tensor:
    """Random windows of a step, (grad_accum, batch_size, block_size + 1): a function of (seed, step, rank) alone."""
    rng = np.random.default_rng((config.seed, step, rank))
    starts = rng.integers(len(tokens) - config.block_size, size=(config.grad_accum, config.batch_size))
    return windows(tokens, starts, config, meta)


def windows(tokens: np.ndarray, starts: np.ndarray, config: Config, meta: dict) -> torch.Tensor:
    found = tokens[starts[..., None] + np.arange(config.block_size + 1)]
    if found.max() >= meta["vocab_size"]:
        raise InputError(
            f"data/{meta['name']} holds the token {found.max()}, but its vocabulary ends at {meta['vocab_size'] - 1}; "
            "run prepare_data.py again"
        )
    return torch.from_numpy(found.astype(np.int64))


@torch.no_grad()
def evaluate(model, tokens: np.ndarray, config: Config, meta: dict, device, autocast) -> float:
    """Mean loss in nats a token over fixed windows, evenly spaced in the validation split."""
    n = min(EVAL_TOKENS // config.block_size or 1, (len(tokens) - 1) // config.block_size)
    starts = np.linspace(0, len(tokens) - config.block_size - 1, n).astype(np.int64)
    total = 0.0
    for i in range(0, n, config.batch_size):
        w = windows(tokens, starts[i : i + config.batch_size], config, meta).to(device)
        with autocast:
            total += model(w[:, :-1], w[:, 1:]).item() * len(w)
    return total / n


# Model and optimizer


def pick_device(name: str) -> torch.device:
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    there = ["cpu"] + ["mps"] * mps + [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cuda"] * cuda
    if name not in there:
        raise InputError(f"device {name!r} is not there; this machine has {', '.join(there)}")
    return torch.device(name)


def build(config: Config, vocab_size: int, device) -> tuple[Transformer, Fira, int]:
    """The model, its optimizer, and the bytes of state that AdamW would hold for the same model."""
    torch.manual_seed(config.seed)
    model = Transformer(ModelConfig.preset(config.model, vocab_size, config.block_size))
    adamw_bytes = state_bytes(param_groups(model, rank=None))
    if config.optimizer == "lora":
        add_lora(model, config.rank)
    model.to(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    setting = METHODS[config.optimizer][1]
    if setting is None:
        groups = param_groups(model, rank=None)
    else:
        options = {name: getattr(config, name) for name in ("rank", "update_proj_gap", "alpha", "alpha_mode", "gamma")}
        options |= setting
        options["gamma"] = None if options["gamma"] in (None, math.inf) else options["gamma"]
        if "apollo" in config.optimizer:  # what its release does with its Gaussian projection and its `scale`
            scale = 128 if config.optimizer == "apollo_mini" else 1
            options["alpha"] = math.sqrt(scale * options["rank"] / model.config.d_model)
        groups = param_groups(model, **options)
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
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(folder: Path) -> dict:
    path = folder / "ckpt.pt"
    if not path.exists():
        raise InputError(f"nothing to go on from: there is no {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in ("model", "optimizer", "scaler", "step", "config", "data")}
    except Exception as error:  # torch raises half a dozen kinds
        raise InputError(f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})") from None


def read_log(folder: Path, last_step: int) -> list[dict]:
    """The log's lines up to a step; a kill may have left later ones, or half a line."""
    lines = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if entry["step"] <= last_step:
            lines.append(entry)
    return lines


def figures(val_loss: float, meta: dict) -> dict:
    return {
        "val_loss": val_loss,
        "perplexity": math.exp(min(val_loss, 700)),
        "bits_per_byte": val_loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"],
    }


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


def train(config: Config, given: dict, resume: bool, prompt: str) -> None:
    checkpoint = None
    if resume:
        checkpoint = load_checkpoint(config.folder)
        saved = checkpoint["config"]
        for name in given.keys() - CHANGEABLE:
            if getattr(config, name) != saved[name]:
                raise InputError(f"{config.folder} was trained with --{name} {saved[name]}, not {getattr(config, name)}")
        config = Config(**{**saved, **{name: getattr(config, name) for name in given}, "out": config.out}).resolve()
    device = pick_device(config.device)
    config.precision = config.precision or ("amp" if device.type == "cuda" else "fp32")
    meta, train_tokens, val_tokens = prepare_data.load(config.data)
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        if len(tokens) <= config.block_size:
            raise InputError(
                f"data/{config.data}/{split}.bin has {len(tokens)} tokens, and one window needs {config.block_size + 1}: "
                "use a longer text or a smaller --block_size"
            )
    if checkpoint and checkpoint["data"] != meta:
        what = "tokenizer" if checkpoint["data"]["tokenizer"] != meta["tokenizer"] else "text"
        raise InputError(f"data/{config.data} was prepared with another {what} than this checkpoint's; prepare that one again")

    model, optimizer, adamw_bytes = build(config, meta["vocab_size"], device)
    fp16 = config.precision == "amp" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    autocast = nullcontext()
    if config.precision == "amp":
        autocast = torch.autocast(device.type, torch.float16 if fp16 else torch.bfloat16)
    start, log = 0, []
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"]) if fp16 else None
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{config.folder / 'ckpt.pt'} does not fit this model ({str(error).splitlines()[0]})") from None
        start, log = checkpoint["step"], read_log(config.folder, checkpoint["step"])
        del checkpoint

    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"data       {config.data}: {meta['source']}, {meta['train_tokens']:,} training tokens, vocabulary {meta['vocab_size']:,}")
    print(f"model      {config.model}: {n_parameters:,} parameters, context {config.block_size}")
    print(f"device     {device.type}, {config.precision}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""))
    print(
        f"optimizer  {config.optimizer}, lr {config.lr:g}: {mega(state_bytes(optimizer.param_groups))} of state; "
        f"AdamW would hold {mega(adamw_bytes)}"
    )
    folder = config.folder
    if start:
        print(f"resuming   {folder} after step {start}")
    elif (folder / "ckpt.pt").exists():
        previous = folder.with_name(folder.name + "-previous")
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        print(f"previous   run with this name: kept as {previous}")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
    write(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))

    stop_signal = []

    def on_signal(number, frame):
        if stop_signal:
            raise KeyboardInterrupt
        stop_signal.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    forward = torch.compile(model) if config.compile else model
    cuda = device.type == "cuda"
    seconds = optimizer_seconds = measured_steps = 0
    interval_losses, optimizer_times = [], []  # since the last log line; tensors and CUDA events, to be read then
    clock = time.perf_counter()
    bar = tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True)
    for step in range(start + 1, config.steps + 1):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_loss = 0.0
        step_windows = batch(train_tokens, config, meta, step)
        if cuda:
            step_windows = step_windows.pin_memory()
        for w in step_windows.to(device, non_blocking=True):  # (batch_size, block_size + 1)
            with autocast:
                loss = forward(w[:, :-1], w[:, 1:]) / config.grad_accum
            scaler.scale(loss).backward()
            step_loss = step_loss + loss.detach()
        interval_losses.append(step_loss)
        optimizer_start = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        optimizer_start.record() if cuda else None
        if config.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        failure = None
        try:
            scaler.step(optimizer)
        except FloatingPointError as error:
            failure = error
        scaler.update()
        optimizer.zero_grad()
        optimizer_end = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        optimizer_end.record() if cuda else None
        optimizer_times.append((optimizer_start, optimizer_end))

        evaluation = step % config.eval_interval == 0 or step == config.steps
        if not (evaluation or failure or stop_signal or step % LOG_INTERVAL == 0):
            continue
        # Only here does the host wait for the device.
        if cuda:
            torch.cuda.synchronize()
        losses = torch.stack(interval_losses).tolist()
        elapsed = time.perf_counter() - clock
        bar.update(len(losses))
        for i, value in enumerate(losses):
            if not math.isfinite(value):
                bar.close()
                raise InputError(
                    f"the loss is {value} at step {step - len(losses) + 1 + i}: try a lower --lr; the last good checkpoint, "
                    f"if any, is {folder / 'ckpt.pt'}"
                )
        if failure:
            bar.close()
            raise InputError(f"at step {step}, {failure}: try a lower --lr")
        if step > start + LOG_INTERVAL:  # the first lines' steps are warm-up, for the clock too
            seconds += elapsed
            optimizer_seconds += sum(a.elapsed_time(b) / 1000 if cuda else b - a for a, b in optimizer_times)
            measured_steps += len(losses)
        tokens_per_second = config.batch_size * config.grad_accum * config.block_size * len(losses) / elapsed
        entry = {"step": step, "loss": sum(losses) / len(losses), "lr": lr, "tokens_per_second": round(tokens_per_second)}
        bar.set_postfix_str(f"loss {entry['loss']:.3f}, lr {lr:.1e}, {tokens_per_second:,.0f} tokens/s")
        if evaluation:
            entry |= figures(evaluate(forward, val_tokens, config, meta, device, autocast), meta)
            bar.write(
                f"step {step}: validation loss {entry['val_loss']:.4f}, perplexity {entry['perplexity']:.2f}, "
                f"{entry['bits_per_byte']:.4f} bits per byte"
            )
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if evaluation or stop_signal:
            write(
                folder / "ckpt.pt",
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "step": step,
                    "config": asdict(config),
                    "data": meta,
                },
            )
        if stop_signal and step < config.steps:
            bar.close()
            print(f"stopped after step {step} and saved; go on with: {resume_command()}")
            sys.exit(128 + stop_signal[0])
        interval_losses, optimizer_times = [], []
        clock = time.perf_counter()
    bar.close()

    if measured_steps or not (folder / "result.json").exists():
        last = read_log(folder, config.steps)[-1]
        result = {"optimizer": config.optimizer, "lr": config.lr, "seed": config.seed, "steps": last["step"]}
        result |= {key: last[key] for key in figures(0.0, meta)}
        result |= {
            "state_bytes": state_bytes(optimizer.param_groups),
            "peak_bytes": peak_bytes(device),
            "ms_per_step": 1000 * seconds / measured_steps if measured_steps else None,
            "optimizer_share": optimizer_seconds / seconds if seconds else None,
        }
        write(folder / "result.json", json.dumps(result, indent=2) + "\n")
    result = json.loads((folder / "result.json").read_text())
    print(
        f"\ndone       {config.steps} steps: validation loss {result['val_loss']:.4f}, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
    if result["ms_per_step"]:
        print(
            f"           {result['ms_per_step']:.1f} ms a step, {result['optimizer_share']:.1%} of it in the optimizer; "
            f"peak memory {mega(result['peak_bytes'])}"
        )
    text = sample(model, meta["tokenizer"], prompt, config.seed)
    write(folder / "sample.txt", text)
    print(f"\nsample     {'-' * 60}\n{text}\n{'-' * 71}\nwrote      {folder}/: config.json, log.jsonl, ckpt.pt, result.json, sample.txt")


def sample(model: Transformer, tokenizer: str, prompt: str, seed: int) -> str:
    """The prompt and what the model writes after it; an empty prompt starts a new document."""
    encoding = prepare_data.get_encoding(tokenizer)
    tokens = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    written = model.generate(torch.tensor([tokens], device=device), SAMPLE_TOKENS)[0].tolist()
    return encoding.decode(written[0 if prompt else 1 :])


def sample_checkpoint(config: Config, prompt: str) -> None:
    """Print what the last checkpoint of a run writes after a prompt."""
    checkpoint = load_checkpoint(config.folder)
    saved = Config(**checkpoint["config"])
    saved.device = config.device
    device = pick_device(saved.device)
    model, _, _ = build(saved, checkpoint["data"]["vocab_size"], device)
    model.load_state_dict(checkpoint["model"])
    print(sample(model, checkpoint["data"]["tokenizer"], prompt, saved.seed))


# Comparing optimizers


def compare(config: Config, optimizers: list[str], given: dict, resume: bool) -> None:
    """Train with each optimizer in a process of its own, so that each has its own peak memory; then one table."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    signal.signal(signal.SIGINT, lambda *_: None)  # the child saves and says how to go on
    rows, curves = [], {}
    for name in optimizers:
        print(f"\n=== {name} ===", flush=True)
        config.optimizer = name
        resume_flag = ["--resume"] * (resume and (config.folder / "ckpt.pt").exists())
        code = subprocess.run([sys.executable, __file__, *flags, f"--optimizer={name}", *resume_flag]).returncode
        if code >= 128 or code < 0:
            sys.exit(f"stopped; go on with: {resume_command()}")
        if code:
            print(f"{name} failed; going on with the others", flush=True)
            continue
        rows.append(json.loads((config.folder / "result.json").read_text()))
        curves[name] = [entry for entry in read_log(config.folder, rows[-1]["steps"]) if "val_loss" in entry]
    if not rows:
        sys.exit("error: every optimizer failed")
    print(f"\n{'optimizer':18} {'lr':>7} {'val loss':>9} {'perplexity':>10} {'bits/byte':>9} {'state':>10} {'peak':>11} {'ms/step':>8} {'in optimizer':>12}")
    for row in rows:
        ms, share = row["ms_per_step"] or math.nan, row["optimizer_share"] or math.nan
        print(
            f"{row['optimizer']:18} {row['lr']:7.0e} {row['val_loss']:9.4f} {row['perplexity']:10.3f} {row['bits_per_byte']:9.4f} "
            f"{mega(row['state_bytes']):>10} {mega(row['peak_bytes']):>11} {ms:8.1f} {share:12.1%}"
        )
    folder = Path(config.out) / f"{config.model}-{config.data}-compare-seed{config.seed}"
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
            axes.plot([entry["step"] for entry in entries], [entry["val_loss"] for entry in entries], marker=".", label=name)
        axes.set(xlabel="step", ylabel="validation loss (nats a token)", title=f"{config.model} on {config.data}, seed {config.seed}")
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags that were given, and only those."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    for f in fields(Config):
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action="store_true", help=f.metadata["help"])
            continue
        kind = next(t for t in (int, float, str) if t.__name__ in str(f.type))
        default = "" if f.default is None else f" (default {f.default})"
        parser.add_argument(
            f"--{f.name}", type=kind, nargs="+" if f.name == "optimizer" else None, metavar=kind.__name__.upper(), help=f.metadata["help"] + default
        )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--sample", metavar="PROMPT", help="train nothing; print what the run's last checkpoint writes after PROMPT")
    return parser.parse_args(arguments)


def main() -> None:
    given = vars(parse(sys.argv[1:]))
    resume, prompt = given.pop("resume", False), given.pop("sample", None)
    optimizers = list(dict.fromkeys(given.pop("optimizer", ["fira"])))
    try:
        for name in optimizers:
            config = Config(**given, optimizer=name).resolve()
        if not resume and prompt is None:
            pick_device(config.device)
        given["data"] = config.data = prepare_data.ensure(config.data)
        if len(optimizers) > 1:
            compare(config, optimizers, given, resume)
        elif prompt is not None:
            sample_checkpoint(config, prompt)
        else:
            train(config, given, resume, "")
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
