"""Tests of model.py: what the models compute, generation, LoRA, and weights from and to Hugging Face's transformers.

No network: the checkpoints are small ones that transformers itself writes. Those tests are skipped without it.
"""

import json
import math
import os
import sys

import pytest
import torch
from torch import nn

from model import ModelConfig, Transformer, add_lora, export, load_pretrained, rotate


def small_model(kind="llama", std=None, **options):
    """With std, weights so large that the next token depends on all before it."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(61, 16, kind, 32, 80, 4, 2, **options))
    for p in model.parameters():
        if std is not None:
            nn.init.normal_(p, std=std)
    return model


# The model


def test_sizes_are_those_of_the_paper_and_of_gpt2():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in Transformer(ModelConfig.preset(name, 32000, 256)).parameters())
            for name in ("60m", "130m", "350m", "1b")
        }
        gpt2 = Transformer(ModelConfig.preset("gpt2", 50257, 1024))
    # 2 V d + L (4 d² + 3 d f) + (2 L + 1) d
    assert counts == {"60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752}
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808  # the published GPT-2 small
    assert gpt2.norm.eps == 1e-5 and ModelConfig.preset("60m", 32000, 256).norm_eps == 1e-6
    scale = [layer.weight.std().item() for layer in (small_model("gpt2").blocks[1].mlp.down, small_model().head)]
    assert scale == pytest.approx([0.01, 0.02], rel=0.1)  # 0.02 / sqrt(2 * 2 layers), 0.02


def test_sizes_that_do_not_fit_are_refused():
    for name, size, says in (
        ("d_model", 30, "a width of 30"),
        ("n_kv_heads", 3, "3 for keys"),
        ("head_dim", 7, "heads of 7 are odd"),
        ("n_positions", 15, "a context of 16 tokens, but the model has 15"),
        ("block_size", 0, "a context of 0 tokens"),
    ):
        with pytest.raises(ValueError, match=says):
            ModelConfig(**{"vocab_size": 61, "block_size": 16, name: size})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_token_sees_the_ones_after_it(kind):
    model, tokens = small_model(kind), torch.randint(61, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (tokens[:, 9] + 1) % 61
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.allclose(a[:, 9:], b[:, 9:])
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]).item(), math.log(61), rtol=0.05, atol=0)


def test_rotary_attention_depends_on_distances_only():
    model = small_model()
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 16, 8)
    scores = (rotate(q, model.cos, model.sin) @ rotate(k, model.cos, model.sin).mT)[0, 0]
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[5, 5], scores[5, 2])


def test_rotary_angles_are_float32_in_a_16_bit_model():
    positions, frequencies = torch.arange(4096.0)[:, None], 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    model = Transformer(ModelConfig(61, 4096)).to(torch.bfloat16)
    expected = (positions * frequencies).repeat(1, 2).cos()
    torch.testing.assert_close(model.cos.float(), expected, rtol=0, atol=2**-8)  # the cosine's own rounding
    assert not any("cos" in name or "sin" in name for name in model.state_dict())


def test_lora_starts_as_the_same_function_and_freezes_the_blocks():
    model, tokens = small_model(), torch.randint(61, (2, 16))
    before = model(tokens)
    add_lora(model, rank=4)
    assert torch.equal(before, model(tokens))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * 7 and all(name.startswith("blocks") for name in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    assert not torch.allclose(before, model(tokens))
    layer, x = model.blocks[0].mlp.down, torch.randn(3, 80)
    torch.testing.assert_close(layer(x), x @ (layer.weight + 32 / 4 * layer.B @ layer.A).T)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointing_computes_the_same_from_less_memory(kind):
    model, tokens = small_model(kind), torch.randint(61, (4, 17))
    gradients, held = [], []
    for model.checkpointing in (False, True):
        saved = {}

        def keep(x, saved=saved):
            saved[x.data_ptr()] = x.nbytes
            return x

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        held.append(sum(saved.values()) - sum(p.nbytes for p in model.parameters() if p.data_ptr() in saved))
        loss.backward()
        gradients.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert held[1] < held[0] / 2
    assert len(list(model.generate([1], 20))) == 20


# Generation


def uncached(model, tokens, n, temperature, top_k):
    """What generate does, with the whole context through the model for every token."""
    for _ in range(n):
        logits = model(torch.tensor([tokens]))[0, -1]
        if temperature == 0:
            tokens = [*tokens, logits.argmax().item()]
        else:
            kept, ids = (logits / temperature).topk(min(top_k, 61))
            tokens = [*tokens, ids[torch.multinomial(kept.softmax(-1), 1)].item()]
    return tokens


@pytest.mark.parametrize("temperature, top_k", [(0, 50), (0.7, 5), (1.5, 1000)])
@pytest.mark.parametrize("kind, options", [("llama", {}), ("gpt2", {}), ("llama", {"n_kv_heads": 2, "head_dim": 6})])
def test_generate_with_its_cache_is_sampling_without(kind, options, temperature, top_k):
    model = small_model(kind, 0.4, **options)
    torch.manual_seed(1)
    expected = uncached(model, [1, 2, 3], 13, temperature, top_k)
    torch.manual_seed(1)
    assert list(model.generate(torch.tensor([1, 2, 3]), 13, temperature, top_k)) == expected[3:]
    assert len(set(expected)) > 3
    assert list(model.generate([60] * 9 + [1, 2, 3], 0, temperature, top_k)) == []


def test_generate_goes_past_the_context_at_a_bounded_cost(monkeypatch):
    model, calls, plain = small_model(std=0.4), [], Transformer.forward

    def counted(self, tokens, **options):
        calls.append(tokens.tolist()[0])
        return plain(self, tokens, **options)

    prompt, written = list(range(20)), []
    monkeypatch.setattr(Transformer, "forward", counted)
    for i, token in enumerate(model.generate(prompt, 40, temperature=0)):
        assert len(calls) == i + 1  # each as soon as it is there
        written.append(token)
    assert torch.is_grad_enabled() and len(written) == 40 and not any(isinstance(t, torch.Tensor) for t in written)
    assert calls[0] == prompt[-16:]
    again = [i for i, call in enumerate(calls) if len(call) > 1]
    assert again == [0, 1, 9, 17, 25, 33] and all(len(calls[i]) == 9 for i in again[1:])
    monkeypatch.undo()
    for i in again:  # where the cache is new, the tokens are those of the model on what it was filled from
        assert written[i] == model(torch.tensor([calls[i]]))[0, -1].argmax()
    assert len(list(Transformer(ModelConfig(61, 1)).generate([1, 2], 5))) == 5


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-45, 1e-30, 1e-7])
def test_no_temperature_is_too_low(temperature):
    model = small_model(std=0.4)
    assert list(model.generate([1], 9, temperature)) == uncached(model, [1], 9, 0, 50)[1:]
    with pytest.raises(ValueError, match="needs a token"):
        next(model.generate([], 1, temperature))


# Weights from and to transformers

LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "max_position_embeddings": 24, "bos_token_id": 3, "eos_token_id": [4, 5]}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
GPT2 |= {"bos_token_id": None, "eos_token_id": 0}
CHECKPOINTS = {
    "llama": LLAMA,
    "llama_grouped": LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama_head_dim": LLAMA | {"num_key_value_heads": 1, "head_dim": 6, "eos_token_id": None},
    "llama_theta": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2},
    "llama_biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2},
    "gpt2_wide": GPT2 | {"n_inner": 48, "activation_function": "gelu_pytorch_tanh"},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for a network: what is not in a folder is not there."""
    if "huggingface_hub" in sys.modules:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def theirs(folder, name="llama", dtype=torch.float32, base=False, **options):
    """transformers' model with random weights, rounded to dtype, as it saves it in the folder."""
    transformers = pytest.importorskip("transformers")
    cls = transformers.GPT2Config if name.startswith("gpt2") else transformers.LlamaConfig
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cls(**CHECKPOINTS[name])).to(dtype)
    for p in model.parameters():  # biases and norms too
        p.data = (0.3 * torch.randn(p.shape)).to(dtype)
    (model.base_model if base else model).save_pretrained(folder, **options)


def read(folder, **options):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def change_weights(folder, change):
    """Replace the weights of a folder by change(weights)."""
    from safetensors.torch import load_file, save_file

    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_logits(ours, theirs):
    tokens = torch.randint(61, (3, ours.config.block_size), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.3


SIXTEEN = [(name, dtype) for name in ("llama_grouped", "gpt2") for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("name, dtype", [(name, torch.float32) for name in CHECKPOINTS] + SIXTEEN)
def test_a_pretrained_model_computes_what_transformers_does(tmp_path, name, dtype):
    theirs(tmp_path, name, dtype)
    expected, model = read(tmp_path, dtype=torch.float32), load_pretrained(tmp_path)
    assert model.config.block_size == 24 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_logits(model, expected)
    assert (model.head.weight is model.embedding.weight) == expected.config.tie_word_embeddings
    short = load_pretrained(str(tmp_path), block_size=10)
    assert_same_logits(short, expected)
    short(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # trainable, and the file stays as it is
    torch.optim.SGD(short.parameters(), lr=1.0).step()
    assert_same_logits(load_pretrained(tmp_path), expected)


@pytest.mark.parametrize("name, dtype", [(name, torch.float32) for name in CHECKPOINTS] + SIXTEEN)
def test_transformers_reads_what_export_writes(tmp_path, name, dtype):
    theirs(tmp_path / "in", name, dtype)
    model = load_pretrained(tmp_path / "in", block_size=12)
    export(model.to(dtype), tmp_path / "new" / "out", eos=7)
    assert sorted(os.listdir(tmp_path / "new")) == ["out"]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    before, after = read(tmp_path / "in"), read(tmp_path / "new" / "out")
    assert after.dtype == dtype and before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    configs = before.config.to_dict(), after.config.to_dict()
    changed = {key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key)}
    assert changed <= {"_name_or_path", "n_inner", "activation_function"} | (
        {"eos_token_id"} if "dim" in name else set()
    )
    for part in (after.config, after.generation_config):
        assert part.bos_token_id == CHECKPOINTS[name]["bos_token_id"]
        assert part.eos_token_id == (7 if "dim" in name else CHECKPOINTS[name]["eos_token_id"])
    assert load_pretrained(tmp_path / "new" / "out", block_size=10).config.n_positions == 24


def test_the_ends_of_text_are_those_at_which_transformers_stops(tmp_path):
    theirs(tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [4, 5, 6]}')
    export(load_pretrained(tmp_path / "in"), tmp_path / "out", eos=7)
    assert read(tmp_path / "out").generation_config.eos_token_id == [4, 5, 6]


def test_shards_a_missing_prefix_and_old_buffers_are_read(tmp_path):
    for name in ("llama_grouped", "gpt2"):
        theirs(tmp_path / name, name, max_shard_size="20KB")
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 2
        assert_same_logits(load_pretrained(tmp_path / name), read(tmp_path / name))
    theirs(tmp_path, "gpt2", base=True)
    masks = {f"h.0.attn.{name}": torch.ones(1, 1, 24, 24) for name in ("bias", "masked_bias")}
    change_weights(tmp_path, lambda weights: weights | masks)
    assert_same_logits(load_pretrained(tmp_path), read(tmp_path))


def refuses(name, says, **options):
    with pytest.raises(ValueError) as error:
        load_pretrained(name, **options)
    message = str(error.value)
    assert says in message and str(name) in message and "\n" not in message and len(message) < 700, message


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1e4}
LONGROPE = YARN | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ("llama", {"model_type": "qwen2"}, "model_type 'qwen2'"),
        ("llama", {"model_type": "nothing_known"}, "nothing_known"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_type': 'linear'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'rope_type': 'dynamic'"),
        ("llama", {"rope_parameters": YARN}, "'rope_type': 'yarn'"),
        ("llama", {"rope_parameters": LONGROPE}, "'rope_type': 'longrope'"),
        ("llama", {"rope_parameters": LLAMA3}, "'rope_type': 'llama3'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "{'full_attention': "),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config {"),
        ("llama", {"sliding_window": 8}, "sliding_window 8 is not supported"),
        ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config {"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "auto_map"),
        ("llama", {"num_key_value_heads": 3}, "3 for keys"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("llama", {"num_hidden_layers": 3}, "missing keys in the weights: model.layers.2."),
        ("llama", {"num_hidden_layers": 1}, "unexpected keys in the weights: model.layers.1."),
        ("llama", {"vocab_size": 62}, "size"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function 'gelu'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
        ("gpt2", {"tie_word_embeddings": False}, "missing keys in the weights: lm_head.weight"),
    ],
    ids=str,
)
def test_a_model_that_would_compute_something_else_is_refused(tmp_path, kind, change, says):
    theirs(tmp_path, kind)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | change))
    refuses(tmp_path, says)


def test_what_is_not_one_whole_checkpoint_is_refused(tmp_path):
    theirs(tmp_path / "a")
    good = (tmp_path / "a" / "model.safetensors").read_bytes()
    refuses(tmp_path / "a", "a context of 25 tokens", block_size=25)
    refuses(tmp_path / "a", "a context of 0 tokens", block_size=0)
    for cut in (0, 7, 100, len(good) // 2, len(good) - 1):
        (tmp_path / "a" / "model.safetensors").write_bytes(good[:cut])
        refuses(tmp_path / "a", "")
    for says, change in (
        ("missing keys in the weights: model.norm.weight", lambda w: w.pop("model.norm.weight") is None or w),
        ("unexpected keys in the weights: score.weight", lambda w: w | {"score.weight": torch.zeros(2, 32)}),
        ("other logits", lambda w: w | {"model.norm.weight": torch.full((32,), math.nan)}),
    ):
        (tmp_path / "a" / "model.safetensors").write_bytes(good)
        change_weights(tmp_path / "a", change)
        refuses(tmp_path / "a", says)
    theirs(tmp_path / "tied", "llama_grouped")
    change_weights(tmp_path / "tied", lambda w: w | {"lm_head.weight": torch.randn(61, 32)})
    refuses(tmp_path / "tied", "other logits")
    (tmp_path / "a" / "model.safetensors").unlink()
    refuses(tmp_path / "a", "model.safetensors")
    for damaged in (b"{", b"\xff\xfe", b"", b"[]"):
        (tmp_path / "a" / "config.json").write_bytes(damaged)
        refuses(tmp_path / "a", "")
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "nothing", "somebody/no-such-model"):
        refuses(name, "")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_trained_model_and_its_lora_are_exported(tmp_path, kind):
    pytest.importorskip("transformers")
    model, tokens = small_model(kind, 0.4, tied=kind == "llama"), torch.randint(61, (2, 16))
    export(model, tmp_path, eos=0)
    again = load_pretrained(tmp_path)
    assert again.config == ModelConfig(**vars(model.config) | {"bos": 0, "eos": 0})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    add_lora(model, rank=4)
    for p in (p for name, p in model.named_parameters() if name.endswith(".B")):
        nn.init.normal_(p, std=0.1)
    (tmp_path / "README.md").write_text("mine")
    before = {name: p.clone() for name, p in model.named_parameters()}
    export(model, tmp_path)  # over the other
    torch.testing.assert_close(load_pretrained(tmp_path)(tokens), model(tokens), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(again(tokens), model(tokens), rtol=0.1)
    assert load_pretrained(tmp_path).config.eos is None and (tmp_path / "README.md").read_text() == "mine"
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    export(small_model(), tmp_path / "out")
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    plain, broken = transformers.PreTrainedModel.save_pretrained, small_model()
    nn.init.constant_(broken.norm.weight, math.nan)

    def full(self, folder, **options):
        plain(self, folder, **options)
        raise OSError("disk full")

    for says, model in (
        ("other logits", broken),
        ("gpt2", small_model("gpt2", n_kv_heads=2)),
        ("disk full", small_model()),
    ):
        if says == "disk full":
            monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        for folder in ("out", "new"):
            with pytest.raises(ValueError, match=f"{folder}.*") as error:
                export(model, tmp_path / folder)
            assert "\n" not in str(error.value) and (says in str(error.value) or says == "gpt2")
        assert os.listdir(tmp_path) == ["out"]
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == old


def test_the_tokenizer_goes_with_an_export(tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(["<s>", "a", "fine", "day"])}, "<s>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", chat_template="{{ 1 }}")
    fast.save_pretrained(tmp_path / "tokenizer")
    export(small_model(), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("fine day") == [2, 3] and again.bos_token == "<s>" and again.chat_template == "{{ 1 }}"
    with pytest.raises(ValueError, match="no_tokenizer"):
        export(small_model(), tmp_path / "other", tokenizer=str(tmp_path / "no_tokenizer"))
    assert not (tmp_path / "other").exists()


def test_without_transformers_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for action in (load_pretrained, lambda folder: export(small_model(), folder)):
        with pytest.raises(ValueError, match=r'transformers.*pip install -e "\.\[hf\]"') as error:
            action(tmp_path / "hf")
        assert "\n" not in str(error.value) and not (tmp_path / "hf").exists()
