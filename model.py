"""A small decoder-only transformer: LLaMA, as in the paper, and GPT-2. Plus LoRA layers for the baseline.

LLaMA (https://arxiv.org/abs/2302.13971): RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings.
GPT-2: LayerNorm, learned positions, GELU, biases, tied embeddings.

Shapes in the comments: B sequences, T tokens in each, C = d_model, H heads of D = C / H.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        C, bias = config.d_model, config.kind == "gpt2"
        self.n_heads = config.n_heads
        self.q = nn.Linear(C, C, bias=bias)
        self.k = nn.Linear(C, C, bias=bias)
        self.v = nn.Linear(C, C, bias=bias)
        self.out = nn.Linear(C, C, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def norm(config: ModelConfig) -> nn.Module:
    return nn.RMSNorm(config.d_model, eps=1e-6) if config.kind == "llama" else nn.LayerNorm(config.d_model)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = norm(config)
        self.attention = Attention(config)
        self.norm2 = norm(config)
        self.mlp = SwiGLU(config) if config.kind == "llama" else MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, T = config.d_model, config.block_size
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = norm(config)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        if config.kind == "llama":
            D = C // config.n_heads
            frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)  # (D/2,)
            angles = torch.outer(torch.arange(T), frequencies).repeat(1, 2)  # (T, D)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        else:
            self.positions = nn.Embedding(T, C)
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

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab) of the tokens (B, T); given targets (B, T), their mean cross-entropy in nats."""
        T = tokens.shape[1]
        x = self.embedding(tokens)  # (B, T, C)
        rope = None
        if self.config.kind == "llama":
            rope = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        else:
            x = x + self.positions.weight[:T]
        for block in self.blocks:
            x = block(x, rope)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_new: int, temperature: float = 0.8, top_k: int = 50) -> Tensor:
        """The tokens (B, T) and n_new sampled ones after them, (B, T + n_new); sees the last block_size tokens."""
        for _ in range(n_new):
            logits = self(tokens[:, -self.config.block_size :])[:, -1].float() / temperature  # (B, vocab)
            kept, ids = logits.topk(min(top_k, logits.shape[-1]))
            choice = torch.multinomial(kept.softmax(-1), 1)  # (B, 1)
            tokens = torch.cat((tokens, ids.gather(1, choice)), dim=1)
        return tokens


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
