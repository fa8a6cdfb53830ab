"""A small decoder-only transformer: LLaMA, as in the paper, and GPT-2. Plus LoRA layers for the baseline.

LLaMA (https://arxiv.org/abs/2302.13971): RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings.
GPT-2: LayerNorm, learned positions, GELU, biases, tied embeddings.
`load_pretrained` takes the weights of either from Hugging Face's transformers, `export` gives them back.
Shapes in the comments: B sequences, T tokens in each, C = d_model, H heads of D = C / H, K heads of keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
NORMS = {"llama": nn.RMSNorm, "gpt2": nn.LayerNorm}


@dataclass
class ModelConfig:
    vocab_size: int
    block_size: int  # the longest context, in tokens
    kind: str = "llama"  # or "gpt2"
    d_model: int = 128
    d_ff: int | None = 352  # width inside the MLP; None: 4 d_model
    n_heads: int = 4
    n_layers: int = 4
    # What other checkpoints may have; None: what LLaMA, or GPT-2, has
    n_kv_heads: int | None = None  # K: fewer than n_heads is grouped-query attention
    head_dim: int | None = None  # D: d_model / n_heads
    n_positions: int | None = None  # that the weights were made for, of which block_size are used
    rope_theta: float = 10000.0
    norm_eps: float | None = None
    tied: bool | None = None  # the head is the embedding
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    bos: int | None = None  # the tokens that begin and end a text: for `export`
    eos: int | list[int] | None = None

    def __post_init__(self):
        gpt2, C, H, T = self.kind == "gpt2", self.d_model, self.n_heads, self.block_size
        presets = {"n_kv_heads": H, "head_dim": C // H, "n_positions": T, "norm_eps": 1e-5 if gpt2 else 1e-6}
        presets |= {"d_ff": 4 * C, "tied": gpt2, "attention_bias": gpt2, "mlp_bias": gpt2}
        vars(self).update({name: value for name, value in presets.items() if getattr(self, name) is None})
        if C % H or H % self.n_kv_heads:
            raise ValueError(
                f"a width of {C}, {H} heads and {self.n_kv_heads} for keys: each must be a multiple of the next"
            )
        if not gpt2 and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: heads of {self.head_dim} are odd")
        if not 1 <= T <= self.n_positions:
            raise ValueError(f"a context of {T} tokens, but the model has {self.n_positions} positions")

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


class MLP(nn.Module):
    """LLaMA's SwiGLU, or GPT-2's two layers with a GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias) if config.kind == "llama" else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x), approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(x)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = NORMS[config.kind](config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = NORMS[config.kind](config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: Tensor | None, start: int) -> Tensor:
        x = x + self.attention(self.norm1(x), rope, cache, start)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The decoder. With `checkpointing` set, backward computes each block again instead of keeping what is inside."""

    checkpointing = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, C, D = config, config.d_model, config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = NORMS[config.kind](C, eps=config.norm_eps)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.kind == "llama":
            frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device="cpu") / D)  # (D/2,)
            angles = torch.outer(torch.arange(config.block_size, device="cpu"), frequencies).repeat(1, 2)  # (T, D)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.positions = nn.Embedding(config.n_positions, C)
        if config.tied:
            self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if config.kind == "gpt2":  # keeps the residual stream's variance independent of the depth
            for block in self.blocks:
                for layer in (block.attention.out, block.mlp.down):
                    nn.init.normal_(layer.weight, std=0.02 / (2 * config.n_layers) ** 0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, caches: Tensor | None = None, start: int = 0):
        """Logits (B, T, vocab) of the tokens (B, T); given targets (B, T), their mean cross-entropy in nats.

        With caches (layers, 2, B, K, block_size, D), which it fills, the tokens are those from position `start` on
        (a single one if start > 0) and only the last one's logits (B, 1, vocab) are computed.
        """
        T, x, rope = tokens.shape[1], self.embedding(tokens), None  # x: (B, T, C)
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
        logits = self.head(self.norm(x if caches is None else x[:, -1:]))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: list[int] | Tensor, n: int, temperature: float = 0.8, top_k: int = 50) -> Iterator[int]:
        """Yields n tokens that follow the given ones, each as soon as it is drawn from the top_k likeliest.

        Keys and values are cached, so a token costs one step of the model however many were written. When the context
        is full, it goes on from the last half of it, read anew from position 0: positions stay those of training.
        """
        config, weight, tokens = self.config, self.embedding.weight, list(map(int, tokens))
        if not tokens:
            raise ValueError("generate needs a token to start from")
        size, start = min(config.block_size, len(tokens) + n), 0  # the cache's size, and how much of it is filled
        caches = weight.new_empty(config.n_layers, 2, 1, config.n_kv_heads, size, config.head_dim)
        tokens = tokens[-size:]
        for _ in range(n):
            if len(tokens) > size:
                tokens, start = tokens[len(tokens) // 2 :], 0
            new = torch.tensor([tokens[start:]], device=weight.device)
            logits = self(new, caches=caches, start=start)[0, -1].float()  # (vocab,)
            start = len(tokens)
            if temperature < 1e-6:  # the likeliest; logits / temperature could be infinite
                token = logits.argmax()
            else:
                kept, ids = (logits / temperature).topk(min(top_k, len(logits)))
                token = ids[torch.multinomial(kept.softmax(-1), 1)]
            tokens.append(token.item())
            yield tokens[-1]


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of rank r: W₀ x + (α/r) B A x (https://arxiv.org/abs/2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.requires_grad_(False).weight, linear.bias
        self.A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B) * self.scale


def add_lora(model: Transformer, rank: int, alpha: float = 32.0) -> None:
    """Put LoRA on every linear layer of the blocks, in place (α: GaLore's); embeddings, head and norms stay trained."""
    for block in model.blocks:
        for part in (block.attention, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, LoRALinear(layer, min(rank, *layer.weight.shape), alpha))


# Weights from and to Hugging Face's transformers: the fields of its configurations, of either kind, and of ours
FIELDS = {name: name for name in ("vocab_size", "head_dim", "attention_bias", "mlp_bias")}
FIELDS |= {"hidden_size": "d_model", "intermediate_size": "d_ff", "n_inner": "d_ff", "num_hidden_layers": "n_layers"}
FIELDS |= {"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "tie_word_embeddings": "tied"}
FIELDS |= {"max_position_embeddings": "n_positions", "rms_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps"}
FIELDS |= {"bos_token_id": "bos", "eos_token_id": "eos"}
# Fields that change what is computed though a short text need not show it, and what they may be besides None
SUPPORTED = {"model_type": ["llama", "gpt2"], "hidden_act": ["silu"], "scale_attn_weights": [True], "auto_map": []}
SUPPORTED |= {"activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_by_inverse_layer_idx": [False]}
SUPPORTED |= {"add_cross_attention": [False], "sliding_window": [], "per_layer_config": [], "quantization_config": []}
# The parts of our weights' names and theirs
LLAMA = {"embedding": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "head": "lm_head"}
LLAMA |= {"norm1": "input_layernorm", "attention": "self_attn", "norm2": "post_attention_layernorm", "out": "o_proj"}
LLAMA |= {part: f"{part}_proj" for part in ("q", "k", "v", "gate", "up", "down")}
GPT2 = {"embedding": "transformer.wte", "positions": "transformer.wpe", "blocks": "transformer.h"}
GPT2 |= {"norm": "transformer.ln_f", "head": "lm_head", "norm1": "ln_1", "attention": "attn", "norm2": "ln_2"}
GPT2 |= {"q": "c_attn", "k": "c_attn", "v": "c_attn", "out": "c_proj", "up": "c_fc", "down": "c_proj"}


@contextmanager
def hugging_face(name: str | Path) -> Iterator:
    """Gives transformers; whatever it raises, of many types and lines, becomes a ValueError of one line."""
    try:
        import transformers

        transformers.utils.versions.require_version("transformers>=5")
        yield transformers
    except Exception as error:
        hint = ': pip install -e ".[hf]"' if isinstance(error, ImportError) else ""
        raise ValueError(f"{name}: {' '.join(str(error).split())[:400]}{hint}") from error


def pairs(kind: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of our weights with its place in theirs, a view of the same shape: copying converts, either way."""
    for name, weight in ours.items():
        *_, layer, _ = parts = name.split(".")
        place = theirs[".".join((LLAMA if kind == "llama" else GPT2).get(part, part) for part in parts)]
        if kind == "gpt2" and "blocks" in parts:
            place = place.t()  # GPT-2 keeps the matrices of its blocks as (inputs, outputs), and q, k, v in one
            place = place.chunk(3)["qkv".index(layer)] if layer in "qkv" else place
        yield weight, place.view_as(weight)


@torch.no_grad()
def load_pretrained(name: str | Path, block_size: int | None = None) -> Transformer:
    """The GPT-2 or LLaMA of a folder or a name on the Hugging Face hub, in float32, with its context or a shorter one.

    What this file does not compute is refused, by a ValueError of one line: fields and logits are compared with theirs.
    """
    with hugging_face(name if Path(name).exists() else f"{name} (no such folder; on the hub)") as transformers:
        setup = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        given = setup.to_dict()
        theta = (given.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        for field, values in (SUPPORTED | {"rope_parameters": [{"rope_type": "default", "rope_theta": theta}]}).items():
            if given.get(field) not in [None, *values]:
                raise ValueError(f"{field} {given[field]!r} is not supported, only {values or None} is")
        fields = {ours: getattr(setup, field) for field, ours in FIELDS.items() if hasattr(setup, field)}
        fields |= {"kind": setup.model_type, "rope_theta": theta}
        config = ModelConfig(block_size=fields["n_positions"] if block_size is None else block_size, **fields)
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, attn_implementation="eager", output_loading_info=True
        )
        config.eos = theirs.generation_config.eos_token_id or config.eos  # it may name more of them
        for wrong in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if keys := sorted(str(key) for key in info[wrong] if not str(key).endswith("masked_bias")):  # a constant
                raise ValueError(f"{wrong.replace('_', ' ')} in the weights: {', '.join(keys)}")
        model = Transformer(config)
        for weight, place in pairs(config.kind, model.state_dict(), theirs.state_dict()):
            weight.copy_(place)
        text = torch.randint(config.vocab_size, (2, min(config.block_size, 64)))
        expected = theirs(text).logits
        if not (model(text) - expected).abs().max() <= 1e-3 * expected.std():  # NaN is not; rounding is some 1e-6
            raise ValueError("transformers computes other logits")
    return model


@torch.no_grad()
def export(model: Transformer, folder: str | Path, tokenizer: str | None = None, eos: int | None = None) -> None:
    """Write a model, in its own dtype and with LoRA's products in the weights, for transformers and `load_pretrained`.

    tokenizer: a name or folder, whose tokenizer goes with it. eos: the token that ends a text, for a model without.
    All is written beside, loaded again, and moved; other files in the folder stay. Raises ValueError.
    """
    config, weights, folder = model.config, model.state_dict(), Path(folder).resolve()
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            B, A = weights.pop(f"{name}.B"), weights.pop(f"{name}.A")
            weights[f"{name}.weight"] = torch.addmm(layer.weight, B, A, alpha=layer.scale)
    with hugging_face(folder) as transformers:
        setup = transformers.AutoConfig.for_model(config.kind)
        setup.update({field: getattr(config, ours) for field, ours in FIELDS.items() if hasattr(setup, field)})
        if config.kind == "llama":
            setup.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.eos is None:
            setup.bos_token_id, setup.eos_token_id = eos if config.bos is None else config.bos, eos
        theirs = transformers.AutoModelForCausalLM.from_config(setup).to(model.embedding.weight.dtype)
        for weight, place in pairs(config.kind, weights, theirs.state_dict()):
            place.copy_(weight)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            theirs.save_pretrained(beside, max_shard_size="1000GB")  # one file, which goes before older shards
            if tokenizer is not None:
                transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(beside)
            load_pretrained(beside, config.block_size)
            folder.mkdir(exist_ok=True)
            for path in Path(beside).iterdir():
                path.replace(folder / path.name)
