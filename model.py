"""A small decoder-only transformer: LLaMA, as in the paper, and GPT-2. Plus LoRA layers for the baseline.

LLaMA (https://arxiv.org/abs/2302.13971): RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings.
GPT-2: LayerNorm, learned positions, GELU, biases, tied embeddings.
`load_pretrained` reads either from a Hugging Face checkpoint, `export` writes one.

Shapes in the comments: B sequences, T tokens in each, C = d_model, H heads of D = C / H, K heads of keys and values.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# name: (kind, d_model, d_ff, heads, layers). The sizes in the names count a vocabulary of 32,000.
PRESETS = {
    "nano": ("llama", 128, 352, 4, 4),
    "9m": ("llama", 128, 352, 4, 4),
    "20m": ("llama", 256, 688, 4, 4),
    "35m": ("llama", 384, 1024, 8, 6),
    "60m": ("llama", 512, 1376, 8, 8),
    "130m": ("llama", 768, 2048, 12, 12),
    "350m": ("llama", 1024, 2736, 16, 24),
    "1b": ("llama", 2048, 5461, 32, 24),
    "7b": ("llama", 4096, 11008, 32, 32),
    "gpt2": ("gpt2", 768, 3072, 12, 12),
}


@dataclass
class ModelConfig:
    vocab_size: int
    block_size: int  # the longest context, in tokens
    kind: str = "llama"  # or "gpt2"
    d_model: int = 128
    d_ff: int = 352  # width inside the MLP
    n_heads: int = 4
    n_layers: int = 4
    # What other LLaMA and GPT-2 checkpoints need; None: as in the presets.
    n_kv_heads: int | None = None  # K: fewer than n_heads is grouped-query attention; None: n_heads
    head_dim: int | None = None  # D; None: d_model / n_heads
    n_positions: int | None = None  # that the weights were made for, of which block_size are used; None: block_size
    rope_theta: float = 10000.0
    norm_eps: float | None = None  # None: 1e-6 for LLaMA, 1e-5 for GPT-2
    tied: bool | None = None  # the head is the embedding; None: for GPT-2
    attention_bias: bool | None = None  # None: for GPT-2
    mlp_bias: bool | None = None  # None: for GPT-2

    def __post_init__(self):
        llama = self.kind == "llama"
        defaults = {"n_kv_heads": self.n_heads, "head_dim": self.d_model // self.n_heads}
        defaults |= {"n_positions": self.block_size, "norm_eps": 1e-6 if llama else 1e-5}
        for name, value in (defaults | dict.fromkeys(("tied", "attention_bias", "mlp_bias"), not llama)).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.d_model % self.n_heads:
            raise ValueError(f"a width of {self.d_model} is not a multiple of {self.n_heads} heads")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads are not a multiple of {self.n_kv_heads} key and value heads")
        if llama and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: heads of {self.head_dim} are odd")
        if not 1 <= self.block_size <= self.n_positions:
            raise ValueError(f"a context of {self.block_size} tokens, but the model has {self.n_positions} positions")

    @classmethod
    def preset(cls, name: str, vocab_size: int, block_size: int) -> "ModelConfig":
        return cls(vocab_size, block_size, *PRESETS[name])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (https://arxiv.org/abs/2104.09864), the halves of a head as pairs. x: (B, H, T, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin  # cos, sin: (T, D)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D, bias = config.d_model, config.head_dim, config.attention_bias
        self.head_dim, self.grouped = D, config.n_kv_heads < config.n_heads
        self.q = nn.Linear(C, config.n_heads * D, bias=bias)
        self.k = nn.Linear(C, config.n_kv_heads * D, bias=bias)
        self.v = nn.Linear(C, config.n_kv_heads * D, bias=bias)
        self.out = nn.Linear(config.n_heads * D, C, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: Tensor | None, start: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if rope is not None:  # q: (B, H, T, D); k, v: (B, K, T, D)
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:  # (2, B, K, block_size, D): the keys and values of all tokens up to these
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        # After cached tokens comes only one, which sees all of them.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def norm(config: ModelConfig) -> nn.Module:
    return (nn.RMSNorm if config.kind == "llama" else nn.LayerNorm)(config.d_model, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = norm(config)
        self.attention = Attention(config)
        self.norm2 = norm(config)
        self.mlp = SwiGLU(config) if config.kind == "llama" else MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: Tensor | None, start: int) -> Tensor:
        x = x + self.attention(self.norm1(x), rope, cache, start)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The decoder. With `checkpointing` set, backward computes each block again instead of keeping what is inside."""

    checkpointing = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, T = config.d_model, config.block_size
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = norm(config)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.kind == "llama":
            D = config.head_dim
            frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device="cpu") / D)  # (D/2,)
            angles = torch.outer(torch.arange(T, device="cpu"), frequencies).repeat(1, 2)  # (T, D)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.positions = nn.Embedding(config.n_positions, C)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.apply(self._init)
        if config.kind == "gpt2":  # keeps the residual stream's variance independent of the depth
            for block in self.blocks:
                for layer in (block.attention.out, block.mlp.down):
                    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.n_layers))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, caches: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """Logits (B, T, vocab) of the tokens (B, T); given targets (B, T), their mean cross-entropy in nats.

        With caches (layers, 2, B, K, block_size, D), which it fills, the tokens are those from position `start` on
        (a single one if start > 0) and only the last one's logits (B, 1, vocab) are computed.
        """
        T = tokens.shape[1]
        x = self.embedding(tokens)  # (B, T, C)
        rope = None
        if self.config.kind == "llama":
            rope = self.cos[start : start + T].to(x.dtype), self.sin[start : start + T].to(x.dtype)
        else:
            x = x + self.positions.weight[start : start + T]
        for i, block in enumerate(self.blocks):
            inputs = x, rope, None if caches is None else caches[i], start
            if self.checkpointing:  # nothing random is in a block, so no generator's state needs keeping
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        if caches is not None:
            x = x[:, -1:]
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(
        self, tokens: list[int] | Tensor, n_new: int, temperature: float = 0.8, top_k: int = 50
    ) -> Iterator[int]:
        """Yields n_new tokens that follow the given ones (at least one; a list or a 1-D tensor), each when it is sampled.

        A token is drawn from the top_k likeliest; temperature 0 takes the likeliest. Keys and values are cached, so a
        token costs one step of the model however many were written. When the context is full, it goes on from the last
        half of it, read anew from position 0: positions stay those of training, and the cost stays bounded.
        """
        config, weight, tokens = self.config, self.embedding.weight, torch.as_tensor(tokens).tolist()
        size, start = min(config.block_size, len(tokens) + n_new), 0  # the cache's size, and how much of it is filled
        if not tokens:
            raise ValueError("generate needs a token to start from")
        tokens = tokens[-size:]
        caches = weight.new_empty(config.n_layers, 2, 1, config.n_kv_heads, size, config.head_dim)
        for _ in range(n_new):
            if len(tokens) > size:
                tokens, start = tokens[len(tokens) // 2 :], 0
            new = torch.tensor([tokens[start:]], device=weight.device)
            logits = self(new, caches=caches, start=start)[0, -1].float()  # (vocab,)
            start = len(tokens)
            if temperature == 0:
                token = logits.argmax()
            else:
                kept, ids = (logits / temperature).topk(min(top_k, len(logits)))
                token = ids[torch.multinomial(kept.softmax(-1), 1)]
            tokens.append(token.item())
            yield tokens[-1]


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of rank r: W₀ x + (α/r) B A x.

    https://arxiv.org/abs/2106.09685; α = 32 is GaLore's setting of this baseline.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


def add_lora(model: Transformer, rank: int, alpha: float = 32.0) -> None:
    """Put LoRA on every linear layer of the blocks, in place: the paper's baseline.

    The layers' own weights are frozen; embeddings, head and norms stay trained.
    """
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, LoRALinear(layer, min(rank, *layer.weight.shape), alpha))


# Hugging Face checkpoints: config.json and model.safetensors

FIELDS = [  # of ModelConfig, of LLaMA's config.json, of GPT-2's
    ("vocab_size", "vocab_size", "vocab_size"),
    ("d_model", "hidden_size", "n_embd"),
    ("d_ff", "intermediate_size", "n_inner"),
    ("n_heads", "num_attention_heads", "n_head"),
    ("n_layers", "num_hidden_layers", "n_layer"),
    ("n_positions", "max_position_embeddings", "n_positions"),
    ("norm_eps", "rms_norm_eps", "layer_norm_epsilon"),
    ("tied", "tie_word_embeddings", "tie_word_embeddings"),
    ("n_kv_heads", "num_key_value_heads", None),
    ("head_dim", "head_dim", None),
    ("rope_theta", "rope_theta", None),
    ("attention_bias", "attention_bias", None),
    ("mlp_bias", "mlp_bias", None),
]
# The other fields that change what a model computes, and the values under which it is the model above. Dropout is not
# here: it acts in training only, and this model has none.
SUPPORTED = {
    "architectures": [["LlamaForCausalLM"], ["LlamaModel"], ["GPT2LMHeadModel"], ["GPT2Model"], None],
    "hidden_act": ["silu", "swish"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "reorder_and_upcast_attn": [False],
    "add_cross_attention": [False],
    "is_encoder_decoder": [False],
    "partial_rotary_factor": [1.0, None],
    "sliding_window": [None],
    "quantization_config": [None],
    "pruned_heads": [{}, None],
    "auto_map": [None],  # code of its own
}
UNSCALED_ROPE = [("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)]

LAYERS = [  # of Transformer, of LLaMA, of GPT-2, whose c_attn is q, k and v in one
    ("embedding", "model.embed_tokens", "transformer.wte"),
    ("positions", None, "transformer.wpe"),
    ("blocks", "model.layers", "transformer.h"),
    ("norm1", "input_layernorm", "ln_1"),
    ("attention.q", "self_attn.q_proj", "attn.c_attn"),
    ("attention.k", "self_attn.k_proj", "attn.c_attn"),
    ("attention.v", "self_attn.v_proj", "attn.c_attn"),
    ("attention.out", "self_attn.o_proj", "attn.c_proj"),
    ("norm2", "post_attention_layernorm", "ln_2"),
    ("mlp.gate", "mlp.gate_proj", None),
    ("mlp.up", "mlp.up_proj", "mlp.c_fc"),
    ("mlp.down", "mlp.down_proj", "mlp.c_proj"),
    ("norm", "model.norm", "transformer.ln_f"),
    ("head", "lm_head", "lm_head"),
]
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in old files; computed, not learned
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # of buffers


def in_theirs(table: list, kind: str) -> dict[str, str]:
    """Our names: theirs."""
    return {row[0]: row[1 if kind == "llama" else 2] for row in table if row[1 if kind == "llama" else 2]}


def parts(config: ModelConfig) -> dict[str, dict[str, torch.Size]]:
    """Their name of each tensor: the parameters of ours that it holds, one below the other, and their shapes."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(config)
    result, names = {}, in_theirs(LAYERS, config.kind)
    for name, p in model.named_parameters():  # a tied head is not among them
        i, layer, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()
        stem = f"{names['blocks']}.{i}." if i else ""
        result.setdefault(f"{stem}{names[layer]}.{kind}", {})[name] = p.shape
    return result


def is_transposed(config: ModelConfig, name: str) -> bool:
    """GPT-2 keeps the matrices of its blocks as (inputs, outputs)."""
    return config.kind == "gpt2" and ".c_" in name and name.endswith("weight")


def read_config(path: Path, block_size: int | None) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ValueError for what Transformer does not compute."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only 'llama' and 'gpt2' are")
    for field, values in SUPPORTED.items():
        if field in fields and fields[field] not in values:
            raise ValueError(f"{path}: {field} {fields[field]!r} is not supported, only {values[0]!r} is")
    for field in ("rope_scaling", "rope_parameters"):
        rope = fields.get(field) or {}
        if not isinstance(rope, dict) or any(x not in UNSCALED_ROPE for x in rope.items() if x[0] != "rope_theta"):
            raise ValueError(f"{path}: {field} {rope!r} is not supported, only the rope_type 'default' is")
        fields |= rope  # transformers 5 keeps rope_theta there
    if kind == "gpt2" and fields.get("n_inner") is None and type(fields.get("n_embd")) is int:
        fields["n_inner"] = 4 * fields["n_embd"]
    ours = {}
    for name, theirs in in_theirs(FIELDS, kind).items():
        value = fields.get(theirs)
        if value is None and name not in ("vocab_size", "d_model", "d_ff", "n_heads", "n_layers", "n_positions"):
            continue  # ModelConfig's default is that of transformers
        flag, real = name in ("tied", "attention_bias", "mlp_bias"), name in ("rope_theta", "norm_eps")
        if type(value) not in ([bool] if flag else [int, float] if real else [int]) or not (flag or 0 < value < 1e12):
            raise ValueError(f"{path}: {theirs} is {value!r}" if theirs in fields else f"{path} has no {theirs}")
        ours[name] = value
    try:
        return ModelConfig(block_size=ours["n_positions"] if block_size is None else block_size, kind=kind, **ours)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file (https://huggingface.co/docs/safetensors), mapped: only what is used is read from the disk.

    The file: the header's length, 8 bytes; the header, JSON, name: dtype, shape, where from and to in what follows; the
    bytes of the tensors, without a gap. Raises ValueError for a file that is anything else.
    """

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):  # the format's own limit
            raise ValueError(f"{path} is damaged: its header would have {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            entries = [(*t["data_offsets"], t["dtype"], t["shape"], name) for name, t in header.items()]
            for start, stop, dtype, shape, _ in entries:
                if type(dtype) is not str or any(type(x) is not int or x < 0 for x in (start, stop, *shape)):
                    raise ValueError(f"an entry {[start, stop, dtype, shape]}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: the header is not that of a safetensors file ({error})") from None
    data = np.memmap(path, np.uint8, mode="c")[8 + length :]  # "c": writing to it would not reach the file
    tensors, end = {}, 0
    for start, stop, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        if dtype not in DTYPES:
            raise ValueError(f"{path}: the dtype {dtype!r} of {name!r} is not supported")
        if start != end or stop - start != math.prod(shape) * DTYPES[dtype].itemsize or stop > len(data):
            where = f"{start} to {stop}, {dtype}, shape {shape}, after {end} of {len(data)}"
            raise ValueError(f"{path} is damaged or cut short: the bytes of {name!r} do not fit ({where})")
        tensors[name], end = torch.from_numpy(data[start:stop]).view(DTYPES[dtype]).view(shape), stop
    if end != len(data):
        raise ValueError(f"{path} is damaged: {len(data) - end} bytes after the last tensor")
    return tensors


def load_pretrained(
    folder: str | Path, block_size: int | None = None, dtype: torch.dtype | None = torch.float32
) -> Transformer:
    """The model of a folder that holds a Hugging Face GPT-2 or LLaMA: config.json and model.safetensors.

    block_size: a shorter context than the checkpoint's (whose positions stay in the weights, for `export`).
    dtype: of the weights; None keeps the one that the embedding has in the file.
    Raises ValueError, in one line, for anything but a whole checkpoint whose every part this file computes.
    """
    folder = Path(folder)
    path = folder / "model.safetensors"
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {folder}: give the folder of a Hugging Face checkpoint")
    config = read_config(folder / "config.json", block_size)
    if not path.is_file():
        found = [p.name for p in sorted(folder.glob("*.safetensors.index.json")) + sorted(folder.glob("*.bin"))]
        there = f" but {found[0]}, and" if found else ":"
        raise ValueError(
            f"no model.safetensors in {folder}{there} only one whole safetensors file is read: save the model again "
            "with transformers' save_pretrained(folder, max_shard_size='1000GB')"
        )
    prefix, found = "model." if config.kind == "llama" else "transformer.", {}
    for name, tensor in read_safetensors(path).items():
        full = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if full in found:
            raise ValueError(f"{path}: {full!r} is there with its prefix and without")
        if not full.endswith(BUFFERS):
            found[full] = tensor
    wanted = parts(config)
    tied_head = found.pop("lm_head.weight", None) if config.tied else None
    for what, wrong in (("lacks", wanted.keys() - found.keys()), ("has the unknown", found.keys() - wanted.keys())):
        if wrong:
            raise ValueError(f"{path} {what} {min(wrong)!r}" + f" and {len(wrong) - 1} more" * (len(wrong) > 1))
    embedding, weights = found[in_theirs(LAYERS, config.kind)["embedding"] + ".weight"], {}
    if tied_head is not None and not torch.equal(tied_head, embedding):
        raise ValueError(f"{path}: lm_head.weight is not the embedding, but tie_word_embeddings is true")
    for name, members in wanted.items():
        tensor, rows = found[name], [shape[0] for shape in members.values()]
        shape = [sum(rows), *next(iter(members.values()))[1:]]
        if is_transposed(config, name):
            shape.reverse()
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name!r} is {tensor.dtype} {list(tensor.shape)}, not floating {shape}")
        tensor = tensor.T if is_transposed(config, name) else tensor
        for member, part in zip(members, tensor.split(rows)):
            weights[member] = nn.Parameter(torch.empty(part.shape, dtype=dtype or embedding.dtype).copy_(part))
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    return model


@torch.no_grad()
def export(model: Transformer, folder: str | Path, end_of_text: int | None = None) -> None:
    """Write a model, in its own dtype, as a Hugging Face checkpoint; LoRA's products are added to the weights.

    transformers' AutoModelForCausalLM.from_pretrained(folder) and `load_pretrained` read it.
    end_of_text: the token between documents, if transformers shall stop there.
    Each file is written whole before it takes its name. Raises ValueError, OSError.
    """
    config, folder = model.config, Path(folder)
    names, wanted = in_theirs(FIELDS, config.kind), parts(config)
    kept = {ours: getattr(config, ours) for ours in names}
    if ModelConfig(block_size=config.block_size, kind=config.kind, **kept) != config:
        raise ValueError(f"transformers' {config.kind} has no place for all of {config}")
    if config.kind == "llama":
        fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    else:
        fields = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    fields |= {names[ours]: value for ours, value in kept.items()}
    fields |= {"torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}
    fields |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}

    weights = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            weights[f"{name}.weight"] = torch.addmm(layer.linear.weight, layer.B, layer.A, alpha=layer.scale)
            weights[f"{name}.bias"] = layer.linear.bias

    def tensor(name: str) -> Tensor:
        whole = torch.cat([weights[member] for member in wanted[name]])
        return (whole.T if is_transposed(config, name) else whole).contiguous()

    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name in wanted:
        t, start = tensor(name), end
        end += t.nbytes
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the tensors begin at a multiple of 8 bytes
    arrays = (tensor(name).cpu().view(torch.uint8).numpy() for name in wanted)  # one at a time
    contents = {"model.safetensors": chain([len(head).to_bytes(8, "little"), head], arrays)}
    contents["config.json"] = [json.dumps(fields, indent=2).encode() + b"\n"]

    folder.mkdir(parents=True, exist_ok=True)
    temporary = {folder / (name + ".tmp"): folder / name for name in contents}
    try:
        for path, final in temporary.items():
            with open(path, "wb") as file:
                file.writelines(contents[final.name])
                file.flush()
                os.fsync(file.fileno())
        for path, final in temporary.items():
            path.replace(final)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
