"""The largest batch that fits into 8, 12, 16 and 24 GB, counted.

    python -m experiments.fit

To weights, gradients and our state (`memory.py`), all for --precision bf16, come 1 GB for the CUDA context and what
backward keeps for every token: counted with hooks on the saved tensors of models of one and two layers, the rest being
linear, and the gradient of the logits. It is a count, not a measurement.
"""

import torch

from experiments.memory import count
from model import PRESETS, ModelConfig, Transformer


def kept_bytes(size: str, n_layers: int, checkpointing: bool) -> float:
    """Bytes for each token that the forward pass of 16-bit layers of a size keeps for backward."""
    config = ModelConfig.preset(size, 32_000, 256)
    config.n_layers = n_layers
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    model.to_empty(device="cpu")  # whatever the weights are, as much is kept
    for x in (*model.parameters(), *model.buffers()):
        x.data.zero_()
    model.checkpointing = checkpointing
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = torch.zeros(1, 256, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens, tokens)
    return sum(saved.values()) / 256


def activation_bytes(size: str, checkpointing: bool) -> float:
    """Bytes for each token at the start of backward: what is kept, and the gradient of the logits."""
    one, two = (kept_bytes(size, n, checkpointing) for n in (1, 2))
    recomputed = kept_bytes(size, 2, False) - kept_bytes(size, 1, False) if checkpointing else 0  # a block at a time
    return one + (PRESETS[size][-1] - 1) * (two - one) + recomputed + 32_000 * (4 + 2)


def main() -> None:
    memories = (8, 12, 16, 24)
    print("largest batch of 256-token sequences in that many GB, plain / with --checkpointing; - if none fits")
    print(f"{'':12}" + "".join(f"{memory:>14} GB" for memory in memories))
    for size in ("60m", "130m", "350m", "1b", "7b"):
        tokens = [256 * activation_bytes(size, checkpointing) for checkpointing in (False, True)]
        for method in ("AdamW", "GaLore", "Fira", "Fira --layerwise"):
            weights, gradients, state, _ = count(size, method.split()[0])
            if "layerwise" in method:
                gradients = 2 * 32_000 * PRESETS[size][1]  # of the largest weight, the embeddings
            fixed = weights + gradients + state + 1e9
            batches = [[max(0, int((memory * 1e9 - fixed) // t)) or "-" for t in tokens] for memory in memories]
            print(f"{size:5} {method:16}" + "".join(f"{plain!s:>7} / {less!s:<5}" for plain, less in batches))


if __name__ == "__main__":
    main()
