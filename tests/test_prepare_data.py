"""Tests of prepare_data.py. None needs a network: tokenizers are built here, the hub is a folder."""

import base64
import errno
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare_data  # noqa: E402
from prepare_data import InputError, ensure, get_tokenizer, load, prepare  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # two real inputs that some machines have beside the project
needs_shared = pytest.mark.skipif(not (SHARED / "r50k_base.tiktoken").exists(), reason="no GPT-2 vocabulary")
# What tokenizers stumble over: runs of spaces and line ends, indents, several scripts, marks, characters that mean
# something elsewhere.
TEXT = (
    "  def f(x):\n        return  x\n\n\n\tdon't, they'll 123 \u00e9t\u00e9 na\u00efve \u4f60\u597d\u3002\u4e16\u754c\n"
    "\U0001f600 \U0001f468\u200d\U0001f469 </s> <s>x <|endoftext|>y [INST] e\u0301 tail   \n \n   in dented !\r\nq. z "
)
BUILT = ("hf:byte-level", "hf:llama", "hf:llama-legacy", "hf:unigram")
TOKENIZERS = ["bytes", "tiny.tiktoken", pytest.param("shared", marks=needs_shared), *BUILT]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run the script in, with a text of some 25 kB."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text((ROOT / "prepare_data.py").read_text() * 2)
    return tmp_path


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder of tokenizers as checkpoints have them, written by transformers."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    root = tmp_path_factory.mktemp("built")
    corpus = [TEXT, (ROOT / "prepare_data.py").read_text()]

    def save(name, tokenizer, **special):
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(root / name)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["</s>", "[INST]"])
    tokenizer.train_from_iterator(corpus, trainer)
    save("byte-level", tokenizer, eos_token="</s>", additional_special_tokens=["[INST]"], model_max_length=8)
    save("no-eos", tokenizer)
    tokenizer.normalizer = normalizers.Lowercase()
    save("lower-case", tokenizer, eos_token="</s>")

    # SentencePiece's kind: spaces are written as this, one is put before the text, unknown characters become bytes.
    space = "\u2581"
    tokens = [f"<0x{i:02X}>" for i in range(256)]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        [line for text in corpus for line in text.split("\n")], trainers.BpeTrainer(vocab_size=500)
    )
    learned = json.loads(learned.to_str())["model"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *tokens, *learned["vocab"]]))}
    merges = [tuple(merge) for merge in learned["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    scores = [(token, -1e3 if token in ["</s>", "<s>", *tokens] else -5.0 - i / 100) for i, token in enumerate(vocab)]
    likes_eos = [(token, 0.0 if token == "</s>" else score) for token, score in scores]
    unigram, reads_eos = models.Unigram(scores, 0, True), models.Unigram(likes_eos, 0, True)
    for name, model in {"llama": bpe, "llama-legacy": bpe, "unigram": unigram, "reads-eos": reads_eos}.items():
        tokenizer = Tokenizer(model)
        if name == "llama-legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=name == "unigram")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        steps = decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence(list(steps))
        save(name, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return root


@pytest.fixture
def tokenizer_at(workplace, request):
    """A name in TOKENIZERS -> what --tokenizer takes."""

    def find(name):
        if name == "shared":
            return str(SHARED / "r50k_base.tiktoken")
        if name.startswith("hf:"):
            return f"hf:{request.getfixturevalue('built') / name[3:]}"
        merges = [b"  ", b" a", b"ll", b"n't", b"'ll", b"\n\n", b"do", b" do", b"12", b"   ", b"\n\n\n"]
        ranks = enumerate([bytes([i]) for i in range(256)] + merges)
        Path("tiny.tiktoken").write_bytes(b"".join(base64.b64encode(t) + f" {rank}\n".encode() for rank, t in ranks))
        return name

    return find


def decoded(name):
    """The text of both splits."""
    meta, *arrays = load(name)
    return [get_tokenizer(meta["tokenizer"]).decode(array.tolist()) for array in arrays]


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        prepare_data.main()


def fails(*arguments, says):
    """The script must stop with one line that holds `says`."""
    with pytest.raises(SystemExit) as stopped:
        main(*arguments)
    line = str(stopped.value.code)
    assert line.startswith("error: ") and "\n" not in line and says in line, line
    return line


def lines_of(texts):
    return "".join(json.dumps({"text": text, "url": "http://x/"}) + "\n" for text in texts).encode()


# Tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_comes_back_exactly_and_is_tokenized_as_a_whole(tokenizer_at, name):
    content = TEXT * 100
    Path("uni.txt").write_bytes(content.encode())
    main("uni.txt", "--tokenizer", tokenizer_at(name))
    texts, (meta, *arrays) = decoded("uni"), load("uni")
    assert "".join(texts) == content and texts[0].endswith("\n") and 0.08 < len(texts[1]) / len(content) <= 0.1
    tokenizer = get_tokenizer(meta["tokenizer"])
    for split, text, tokens in zip(("train", "val"), texts, arrays):
        assert tokens.tolist() == tokenizer.encode(text)
        assert meta[f"{split}_bytes"] == len(text.encode()) and meta[f"{split}_tokens"] == len(tokens)
        assert tokenizer.end_of_text not in tokens
    n_bytes = meta["train_bytes"] + meta["val_bytes"]
    assert meta["bytes_per_token"] == n_bytes / sum(map(len, arrays)) and meta["source_bytes"] == n_bytes
    assert meta["sha256"] == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == tokenizer.n_vocab


@pytest.mark.parametrize("name", BUILT)
def test_a_checkpoints_tokenizer_is_used_as_it_is(tokenizer_at, name, caplog, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog

    ours = get_tokenizer(tokenizer_at(name))
    ours.encode("much longer than model_max_length tells " * 50)
    assert not caplog.records
    original = AutoTokenizer.from_pretrained(tokenizer_at(name)[3:])
    assert (ours.n_vocab, ours.end_of_text) == (len(original), original.eos_token_id)
    for text in ("Once upon", "x", "", "don't.\n\n  stop \u00e9\u4f60 ", "y " * 999):
        assert ours.encode(text) == original(text, add_special_tokens=False)["input_ids"]
    assert ours.end_of_text not in ours.encode("a </s> b") and ours.decode(ours.encode("a </s> b")) == "a </s> b"
    for text in (" x", "  x", "\nx", "   ", " "):
        assert ours.decode(ours.encode(text)) == text


def test_a_checkpoints_tokenizer_prepares_data(tokenizer_at):
    texts = [f"doc {i} </s> end" for i in range(20)]
    Path("docs.jsonl").write_bytes(lines_of(texts))
    folder = os.path.relpath(tokenizer_at("hf:llama")[3:])
    main("docs.jsonl", "--tokenizer", f"hf:{folder}")
    meta, train, val = load("docs")
    tokenizer = get_tokenizer(meta["tokenizer"])
    assert meta["tokenizer"] == f"hf:{Path(folder).resolve()}" and meta["vocab_size"] == tokenizer.n_vocab
    expected = [tokenizer.encode(text) + [tokenizer.end_of_text] for i, text in enumerate(texts) if i % 10 != 1]
    assert train.tolist() == list(itertools.chain(*expected))[:-1]


def test_tokenizers_that_cannot_be_used_are_refused(workplace, built, monkeypatch):
    for name, says in (("no-eos", "no eos token"), ("lower-case", "a text back changed"), ("none", "none")):
        fails("text.txt", "--tokenizer", f"hf:{built / name}", says=says)
    fails("text.txt", "--tokenizer", f"hf:{built / 'reads-eos'}", says="or reads it out of a text")
    Path("config.json").write_text('{"model_type": "gpt2"}')  # transformers makes an empty tokenizer of it
    fails("text.txt", "--tokenizer", "hf:.", says="cannot load the tokenizer")
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails("text.txt", "--tokenizer", f"hf:{built / 'llama'}", says="the extra hf is needed: pip install")
    assert not Path("data").exists() or os.listdir("data") == []


def test_without_network_the_gpt2_tokenizer_tells_the_ways(workplace, monkeypatch):
    def offline(name):
        raise ConnectionError("two\nlines")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    line = fails("text.txt", "--tokenizer", "gpt2", says="TIKTOKEN_CACHE_DIR")
    assert "online" in line and "r50k_base.tiktoken" in line


@needs_shared
def test_the_gpt2_tokenizer_comes_from_tiktokens_cache(workplace, monkeypatch):
    """tiktoken's cache names a file after the SHA-1 of its address."""
    address = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    Path("cache").mkdir()
    cached = Path("cache") / hashlib.sha1(address.encode()).hexdigest()
    cached.write_bytes((SHARED / "r50k_base.tiktoken").read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "cache")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    main("text.txt", "--tokenizer", "gpt2")
    assert load("text")[0]["tokenizer"] == "gpt2" and load("text")[0]["vocab_size"] == 50257
    file = get_tokenizer(str(SHARED / "r50k_base.tiktoken"))
    assert get_tokenizer("gpt2").encode(TEXT) == file.encode(TEXT) and file.decode([50256]) == "<|endoftext|>"


# Sources


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.json.gz", "docs.txt.gz"])
def test_json_lines_and_gzip(tokenizer_at, name):
    texts = [f"{i} {TEXT * (i % 5)}" for i in range(40)] + ["x" * 700 + " y" * 900]
    content = b"\n" + lines_of([*texts, ""]) + b" \n" if "json" in name else "\n".join(texts).encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    prepare(name, tokenizer_at("tiny.tiktoken"))
    meta, train, val = load("docs")
    splits = [text for i, text in enumerate(texts) if i % 10 != 1], texts[1::10]
    if "json" not in name:
        splits = [[text] for text in decoded("docs")]
        assert "".join(decoded("docs")).encode() == content and 0.05 < meta["val_bytes"] / len(content) <= 0.1
    tokenizer = get_tokenizer("tiny.tiktoken")
    for split, tokens, documents in zip(("train", "val"), (train, val), splits):
        ids = [[256 + 11, *tokenizer.encode(text)] for text in documents]
        assert tokens.tolist() == list(itertools.chain(*ids))[1:]
        assert meta[f"{split}_bytes"] == sum(len(text.encode()) for text in documents)


def test_one_long_line_is_split_between_characters(workplace):
    Path("line.txt").write_text("\u4f60\u597d" * 5000, encoding="utf-8")
    prepare("line.txt")
    assert "".join(decoded("line")) == "\u4f60\u597d" * 5000 and len(decoded("line")[1]) == 1000


def test_a_folder_is_split_by_file(workplace):
    texts = [f"doc {i}\n" * (i + 1) for i in range(40)]
    for i, text in enumerate(texts):
        path = Path("docs") / f"d{i % 3}" / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    Path("docs/other.rst").write_text("not this one")
    Path("docs/empty.md").touch()
    main("docs", "--glob", "*.md")
    train, val = (text.split("<|endoftext|>") for text in decoded("docs"))
    assert sorted(train + val) == sorted(texts) and len(val) == 2
    first = load("docs")[0]
    main("docs", "--glob", "*.md")
    assert load("docs")[0] == first and os.listdir("data") == ["docs"]  # the same order again, and nothing left over


def test_a_folder_may_hold_any_format(workplace):
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("plain")
    Path("mixed/b.jsonl").write_bytes(lines_of(["one", "two"]))
    Path("mixed/c.json.gz").write_bytes(gzip.compress(lines_of(["three"])))
    Path("mixed/d.txt.gz").write_bytes(gzip.compress(b"packed"))
    Path("mixed/train.bin").write_bytes(b"\xff\xff")
    main("mixed", "--glob", "*")
    parts = [part for text in decoded("mixed") for part in text.split("<|endoftext|>")]
    assert sorted(parts) == sorted(["plain", "one", "two", "three", "packed"])


def test_the_standard_library_is_the_default(workplace):
    main()
    root, files = Path(sysconfig.get_path("stdlib")), []
    for path in root.rglob("*.py"):
        parts = set(path.relative_to(root).parts)
        if path.read_bytes() and not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}:
            files.append(path.relative_to(root).as_posix())
    files = [file for file in sorted(files) if b"\xff" not in (root / file).read_bytes()]
    random.Random(0).shuffle(files)
    n_val = len(files) // 20
    meta, train, val = load("stdlib")
    for tokens, part in ((train, files[n_val:]), (val, files[:n_val])):
        expected = itertools.chain(*([256, *(root / file).read_bytes()] for file in part))
        assert np.array_equal(tokens, np.fromiter(expected, np.uint16)[1:])
    assert meta["vocab_size"] == 257 and len(files) > 400 and meta["source"].endswith(sys.version.split()[0])


def test_shakespeare_is_downloaded_once(workplace, monkeypatch):
    text = b"Who's there?\n" * 99
    if (SHARED / "tinyshakespeare.txt").exists():
        real = (SHARED / "tinyshakespeare.txt").read_bytes()
        assert hashlib.sha256(real).hexdigest() == prepare_data.SHAKESPEARE_SHA256
    Path("input").write_bytes(text[:-1])
    monkeypatch.setattr(prepare_data, "SHAKESPEARE", Path("input").resolve().as_uri())
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    fails("shakespeare", says="its SHA-256 differs")
    assert os.listdir("data") == []
    Path("input").write_bytes(text)
    main("shakespeare")
    Path("input").unlink()
    main("shakespeare", "--tokenizer", "bytes")
    assert "".join(decoded("shakespeare")).encode() == text and ensure("shakespeare") == "shakespeare"
    Path("data/shakespeare.txt").write_bytes(b"of the user's")
    fails("shakespeare", says="shakespeare.txt is not Tiny Shakespeare")
    Path("data/shakespeare.txt").unlink()
    fails("shakespeare", says="cannot prepare shakespeare (")


@pytest.fixture
def hub(workplace, monkeypatch):
    """A folder that stands for the Hugging Face hub, and what was asked of it."""
    hub = pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")
    asked = []

    def download(repo_id, filename, repo_type):
        asked.append(filename)
        path = Path("hub", repo_type, repo_id, filename)
        if not path.exists():
            raise hub.errors.LocalEntryNotFoundError(f"no\n{filename}")
        return str(path)

    def put(name, content):
        Path("hub/dataset", name).parent.mkdir(parents=True, exist_ok=True)
        Path("hub/dataset", name).write_bytes(content)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    put(
        "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt", b"\nOnce\n\nthere\n<|endoftext|>\nOnce <|endoftext|> x\n"
    )
    put(
        "roneneldan/TinyStories/TinyStoriesV2-GPT4-valid.txt",
        "At last.\n<|endoftext|>\nEnd \u00e9\n<|endoftext|>\n".encode(),
    )
    for i in range(2):
        shard = gzip.compress(lines_of(f"shard {i} page {j}" for j in range(15)))
        put(f"allenai/c4/en/c4-train.{i:05d}-of-01024.json.gz", shard)
    put("allenai/c4/en/c4-validation.00000-of-00008.json.gz", gzip.compress(lines_of(["validation", "page"])))
    return asked


def test_corpora_of_the_hub(hub, monkeypatch):
    main("tinystories")
    assert decoded("tinystories") == [
        "Once\n\nthere<|endoftext|>Once <|endoftext|> x",
        "At last.<|endoftext|>End \u00e9",
    ]
    meta, train, val = load("tinystories")
    assert (train == 256).sum() == 1 and meta["val_bytes"] == len("At last.End e") + 1
    hub.clear()
    main("c4", "--shards", "2")
    pages = [f"shard {i} page {j}" for i in range(2) for j in range(15)]
    assert [text.split("<|endoftext|>") for text in decoded("c4")] == [pages, ["validation", "page"]]
    old = load("c4")[0]
    assert len(hub) == 3 and "en/c4-train.00001" in old["source"]
    fails("c4", "--shards", "3", says="no en/c4-train.00002-of-01024.json.gz")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails("c4", says="the extra hf is needed: pip install")
    assert load("c4")[0] == old and sorted(os.listdir("data")) == ["c4", "tinystories"]


def test_a_corpus_is_never_in_memory_as_a_whole(workplace):
    Path("large.jsonl.gz").write_bytes(gzip.compress(lines_of(["some words, over and over\n" * 100] * 1000), 1))
    tracemalloc.start()
    prepare("large.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < load("large")[0]["train_bytes"] / 2, peak


# Mistakes and failures


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b'{"txt": "a"}', b'{"text": 5}', b'{"text": null}', b'"text"', b"[" * 99999, b"\xff"]
    + [b'{"text": "\\ud800"}'],
    ids=lambda line: str(line[:20]),
)
def test_a_bad_line_is_named(workplace, line):
    prepare("text.txt")
    old = load("text")[0]
    Path("text.jsonl").write_bytes(lines_of(["a"] * 20) + b"\n" + line + b"\n" + lines_of(["b"]))
    fails("text.jsonl", says='text.jsonl, line 22, as a JSON object with a "text" string (')
    assert load("text")[0] == old and os.listdir("data") == ["text"]


def test_damaged_gzip_and_text_are_one_line(workplace):
    good = gzip.compress(lines_of(str(i) for i in range(5000)))
    for bad in (good[:-100], good[:-1], good[:300] + b"damage" + good[306:], b"no gzip at all"):
        for name in ("bad.jsonl.gz", "bad.txt.gz"):
            Path(name).write_bytes(bad)
            fails(name, says=name)
    assert os.listdir("data") == []
    prepare("text.txt")
    old = load("text")[0]
    Path("text.txt").write_bytes(b"good line\n" * 1000 + b"\xff\xfe bad" + b"good line\n" * 5000)
    line = fails("text.txt", says="position 10000")
    assert "text.txt" in line and load("text")[0] == old and os.listdir("data") == ["text"]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at", ["train.bin", "val.bin", "meta.json"])
def test_a_failure_leaves_the_old_data_or_none(workplace, monkeypatch, failure, at):
    """Where the writing of a file fails, or what is left is a set without meta.json, and is prepared again."""
    prepare("text.txt")
    old, opened, writes = load("text")[0], open, Path.write_text

    def failing(path, *arguments, **options):
        if Path(path).name == at:
            raise failure
        return (writes if arguments[:1] and arguments[0] not in ("ab", "rb") else opened)(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "open", failing, raising=False)
        patch.setattr(Path, "write_text", failing)
        with pytest.raises((InputError, KeyboardInterrupt), match="No space" if str(failure) else None):
            prepare("text.txt")
    assert load("text")[0] == old and os.listdir("data") == ["text"]
    replace = Path.replace

    def stopped(self, target):
        if self.name == at:
            raise failure
        return replace(self, target)

    Path("text.txt").write_text(Path("text.txt").read_text() + "and more\n")  # the same text: the same set
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises((InputError, KeyboardInterrupt)):
            prepare("text.txt")
    assert os.listdir("data") == ["text"]
    with pytest.raises(InputError, match="incomplete"):
        load("text")
    assert load(ensure("text.txt"))[0]["source_bytes"] > old["source_bytes"]


def test_nothing_of_the_users_in_the_data_folder_is_replaced(workplace):
    text = Path("text.txt").read_bytes()
    for path in ("data/corpus/a.txt", "data/corpus/b.txt", "data/foo/foo.txt", "data/.hidden.txt", "corpus.txt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text)
    for path in ("data/val/val.bin", "data/file", "file.txt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text)
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    for path, says in (
        ("data/corpus", "data/corpus holds a.txt: move that, or rename the text"),
        ("data/foo/foo.txt", "data/foo holds foo.txt"),
        ("corpus.txt", "data/corpus holds a.txt"),
        ("data/val/val.bin", "data/val holds the text"),
        ("file.txt", "cannot prepare file.txt (FileExistsError"),
        ("data/.hidden.txt", "cannot name a data set '.hidden'"),
    ):
        fails(path, says=says.replace("/", os.sep))
        with pytest.raises(InputError):
            ensure(path)
    assert {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()} == before


def test_bad_arguments_are_named_in_one_line(workplace, capsys):
    Path("empty.txt").write_text("")
    Path("one.txt").write_text("1")
    Path("bad.tiktoken").write_text("not base64 at all\n")
    Path("short.tiktoken").write_text("IQ== 0\n")
    ranks = [base64.b64encode(bytes([i])) + b" %d\n" % (i + (i > 99)) for i in range(256)]
    Path("gap.tiktoken").write_bytes(b"".join(ranks))
    Path("docs").mkdir()
    os.mkfifo("pipe.txt") if hasattr(os, "mkfifo") else None
    os.mkfifo("pipe.tiktoken") if hasattr(os, "mkfifo") else None
    for arguments, says in (
        (["shakespear"], "did you mean shakespeare?"),
        (["stdlb"], "did you mean stdlib?"),
        (["nowhere/at/all.txt"], "neither a file nor a folder"),
        (["pipe.txt"], "neither a file nor a folder"),
        ([os.devnull], "neither a file nor a folder"),
        (["empty.txt"], "too little text"),
        (["one.txt"], "too little text"),
        ([""], "no data ''"),
        (["docs"], "too little text"),
        (["docs", "--glob", "/x"], "cannot prepare docs ("),
        (["docs", "--glob", ""], "too little text"),
        (["text.txt", "--tokenizer", "word"], "cannot load the tokenizer word"),
        (["text.txt", "--tokenizer", ""], "cannot load the tokenizer"),
        (["text.txt", "--tokenizer", "missing.tiktoken"], "missing.tiktoken"),
        (["text.txt", "--tokenizer", "pipe.tiktoken"], "pipe.tiktoken"),
        (["text.txt", "--tokenizer", "bad.tiktoken"], "bad.tiktoken"),
        (["text.txt", "--tokenizer", "gap.tiktoken"], "its ranks have gaps"),
        (["text.txt", "--tokenizer", "short.tiktoken"], "its ranks have gaps"),
    ):
        fails(*arguments, says=says)
    assert not Path("data").exists() or os.listdir("data") == []
    with pytest.raises(SystemExit, match="2"):
        main("--shards", "x")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: argument --shards")


def test_a_damaged_data_set_is_refused_in_one_line(workplace):
    prepare("text.txt")
    path = Path("data/text/meta.json")
    meta = json.loads(path.read_text())
    wrong = [
        {key: value} for key in meta for value in (None, [], -1, "x", {}, True) if type(value) is not type(meta[key])
    ]
    wrong += [{"train_tokens": meta["train_tokens"] + 1}, {"vocab_size": 50}, {"vocab_size": 0}]
    wrong += [{"dtype": "float64"}, {"dtype": "uint32"}, {"dtype": "int16"}, {"dtype": "O"}, {"val_bytes": 0}]
    contents = [json.dumps(meta | change) for change in wrong] + ["{", "[]", "{}", "1", "[" * 99999, "\udcff"]
    contents += [json.dumps({key: value for key, value in meta.items() if key != left}) for left in meta]
    for content in contents:
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match="(?s)^data.text is incomplete or damaged .*again$") as error:
            load("text")
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(meta))
    good = Path("data/text/val.bin").read_bytes()
    for bad in (good[:-10], good[:-1], b"", good[:50] + b"\xff\xff" + good[52:], None):
        Path("data/text/val.bin").write_bytes(bad) if bad is not None else Path("data/text/val.bin").unlink()
        with pytest.raises(InputError, match="incomplete or damaged"):
            load("text")
    path.write_text("{")
    prepare("text.txt")  # what the message advises works
    assert json.loads(path.read_text()) == meta


def test_another_or_a_changed_text_of_the_same_name_is_not_mixed_up(workplace):
    text = Path("text.txt").read_text()
    assert ensure("text.txt") == ensure("text") == ensure(os.path.join("data", "text")) == "text"
    Path("text.txt").write_text(text + "one more line\n")
    with pytest.raises(InputError, match="has changed since"):
        ensure("text.txt")
    Path("text.txt").write_text(text)
    made = Path("data/text/train.bin").stat().st_mtime_ns
    assert ensure("text.txt") == "text" and Path("data/text/train.bin").stat().st_mtime_ns == made
    Path("sub").mkdir()
    Path("sub/text.txt").write_text(text)
    with pytest.raises(InputError, match="prepared from another place"):
        ensure("sub/text.txt")
    assert "".join(decoded("text")) == text


def test_any_console_will_do(workplace):
    Path("t\u00e9xt\u4f60.txt").write_text("line\n" * 99)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    for argument, says in (("--help", b"--glob"), ("t\u00e9xt\u4f60.txt", b"data/t?xt?: ")):
        command = [sys.executable, str(ROOT / "prepare_data.py"), argument]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == 0 and says in done.stdout, done
