"""Text in, tokens out: data/<name>/{train.bin, val.bin, meta.json}.

    python prepare_data.py                      # stdlib: the sources of this Python's standard library
    python prepare_data.py shakespeare          # Tiny Shakespeare, 1 MB; or tinystories, 2 GB (Eldan and Li, 2023)
    python prepare_data.py c4 --shards 4        # English C4, the paper's corpus: 4 of 1024 shards, 0.3 GB each
    python prepare_data.py notes.txt            # your own text; the last 10 % is for validation
    python prepare_data.py notes.jsonl.gz       # a {"text": ...} a line; every tenth document is for validation
    python prepare_data.py folder --glob "*.md" # your own files; 5 % of the files are for validation
    python prepare_data.py notes.txt --tokenizer gpt2

The .bin files are plain arrays of token ids, with end-of-text between documents. Documents stream from the disk; one,
or a text file, has to fit in memory with its tokens: 10 times its size, with hf: 150 times. meta.json is written last.
"""

import argparse
import base64
import difflib
import gzip
import hashlib
import itertools
import json
import os
import random
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STORIES = ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")
NAMES = ("stdlib", "shakespeare", "tinystories", "c4")
DATA = Path("data")
FILES = ("train.bin", "val.bin", "meta.json")
META = {"name": str, "source": str, "source_bytes": int, "tokenizer": str, "vocab_size": int, "dtype": str}
META |= {"train_tokens": int, "train_bytes": int, "val_tokens": int, "val_bytes": int, "sha256": str}
DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}
MARK = b"<|endoftext|>"
EXTRA = '; the extra hf is needed: pip install -e ".[hf]"'


class InputError(Exception):
    """A user's mistake, told in one line."""


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()) + EXTRA * isinstance(error, ImportError)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help tells more)\n")


class Tokenizer(NamedTuple):
    n_vocab: int
    end_of_text: int  # the token between two documents
    encode: Callable[[str], list[int]]  # special tokens are neither added nor read
    decode: Callable[[list[int]], str]


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", "gpt2", "FILE.tiktoken" or "hf:NAME_OR_FOLDER". Raises InputError if it cannot be had."""
    try:
        if name == "bytes":
            decode = lambda ids: b"".join(bytes([i]) if i < 256 else MARK for i in ids).decode(errors="replace")
            return Tokenizer(257, 256, lambda text: list(text.encode(errors="replace")), decode)
        if name.startswith("hf:"):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(name[3:], trust_remote_code=False)
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            # LLaMA's puts a space before a text, which decoding takes away, but not if the text begins with a space.
            space = " " if decode(tokenizer.encode(" a", **plain)) == "a" else ""
            encode = lambda text: tokenizer.encode(space + text if text.startswith(" ") else text, **plain)
            # Losses are counted per byte: a tokenizer that loses some of the text would flatter the model.
            ids = encode(probe := f" Don't  stop.\n\n\tNot 1,234\u00e9 \u4f60 {tokenizer.eos_token}")
            if tokenizer.eos_token_id in (None, *ids) or decode(ids) != probe:
                raise ValueError("it has no eos token, or reads it out of a text, or gives a text back changed")
            # The size is len(tokenizer), unless ids have gaps; the model's may be larger, padded to a round number.
            return Tokenizer(max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id, encode, decode)
        if name == "gpt2":
            encoding = tiktoken.get_encoding("r50k_base")  # GPT-2's, under the name of its single file
        elif name.endswith(".tiktoken") and Path(name).is_file():
            lines = [line.split() for line in Path(name).read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([i]) in ranks for i in range(256)):
                raise ValueError("its ranks have gaps, or a single byte has none")
            special = {MARK.decode(): len(ranks)}  # the file lacks the pattern that splits text into words: GPT-2's
            encoding = tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
        else:
            raise ValueError("it is neither bytes, gpt2, a file that ends in .tiktoken nor hf:NAME_OR_FOLDER")
        return Tokenizer(encoding.n_vocab, encoding.eot_token, encoding.encode_ordinary, encoding.decode)
    except Exception as error:  # of many kinds: no such file or name, no network, a damaged file
        ways = "; go online once, set TIKTOKEN_CACHE_DIR to a filled cache, or pass --tokenizer r50k_base.tiktoken"
        raise InputError(f"cannot load the tokenizer {name} ({reason(error)}){ways * (name == 'gpt2')}") from None


def locate(source: str) -> tuple[str, Path | None]:
    """(name of the data set, path of its text or None) for a NAME or PATH. Raises InputError."""
    if source in NAMES:
        return source, None
    path = Path(source).resolve()
    if not source or not (path.is_file() or path.is_dir()):  # a pipe or a device would be waited for
        names = sorted({*NAMES, *(meta.parent.name for meta in DATA.glob("*/meta.json"))})
        near = " or ".join(difflib.get_close_matches(source, names, 1, 0.5) or names)
        raise InputError(f"no data {source!r}: it is neither a file nor a folder; did you mean {near}?")
    name = Path(path.name.removesuffix(".gz")).stem
    if not name.isprintable() or name.startswith(".") or name in ("", *NAMES):
        raise InputError(f"cannot name a data set {name!r}; rename {path}")
    return name, path


def find_files(name: str, path: Path | None, glob: str, shards: int) -> tuple[str, dict[Path, str]]:
    """(description, {file: its split}) of what locate() gave. A file that is to be split itself has "" there."""
    if name in ("tinystories", "c4"):
        from huggingface_hub import hf_hub_download

        repo, wanted = "roneneldan/TinyStories", dict(zip(STORIES, ("train", "val")))
        if name == "c4":
            repo, wanted = "allenai/c4", {f"en/c4-train.{i:05d}-of-01024.json.gz": "train" for i in range(shards)}
            wanted["en/c4-validation.00000-of-00008.json.gz"] = "val"
        files = {Path(hf_hub_download(repo, file, repo_type="dataset")): split for file, split in wanted.items()}
        return f"{repo}, {', '.join(wanted)}", files
    if name == "shakespeare":
        path = DATA / "shakespeare.txt"
        content = path.read_bytes() if path.exists() else urllib.request.urlopen(SHAKESPEARE, timeout=30).read()
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            raise InputError(f"{path if path.exists() else SHAKESPEARE} is not Tiny Shakespeare: its SHA-256 differs")
        path.write_bytes(content)
    if path and path.is_file():
        return str(path), {path: ""}
    root, pattern = (path, glob) if path else (Path(os.__file__).parent, "*.py")  # of the standard library
    files = [file for file in root.rglob(pattern) if file.is_file() and file.name not in FILES]
    if not path:
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [file for file in files if not left_out & set(file.relative_to(root).parts)]
        files = [file for file in files if (b := file.read_bytes()) == b.decode(errors="ignore").encode()]  # UTF-8
    files = sorted((file for file in files if file.stat().st_size), key=lambda file: file.relative_to(root).as_posix())
    random.Random(0).shuffle(files)
    splits = {file: "val" if i < max(1, len(files) // 20) else "train" for i, file in enumerate(files)}
    return str(path or f"standard library of Python {sys.version.split()[0]}"), splits


def documents(path: Path, split: str) -> Iterator[tuple[str, str]]:
    """(split, text) of each document of a file. Without a split, a tenth is for validation."""
    where = ""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
                lines = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
                for i, (number, line) in enumerate(lines):
                    where = f', line {number}, as a JSON object with a "text" string'
                    (text := json.loads(line)["text"]).encode()  # fails too if it is half a surrogate pair
                    yield split or ("val" if i % 10 == 1 else "train"), text
            elif path.name in STORIES:  # with a line of end-of-text between stories
                groups = itertools.groupby(file, lambda line: line.strip() == MARK)
                yield from ((split, b"".join(lines).decode().strip()) for ends, lines in groups if not ends)
            else:
                text = file.read().decode()
                cut = text.find("\n", len(text) * 9 // 10, -1) + 1 or len(text) * 9 // 10  # in one huge line anywhere
                yield from [(split, text)] if split else [("train", text[:cut]), ("val", text[cut:])]
    except Exception as error:  # not UTF-8, a damaged gzip file, no JSON ...
        raise InputError(f"cannot read {path}{where} ({reason(error)})") from None


def prepare(source: str, tokenizer: str = "bytes", glob: str = "*.txt", shards: int = 1) -> str:
    """Make data/<name> from a NAME or PATH; returns the name. Raises InputError; what was there is then as it was."""
    name, path = locate(source)
    folder, encoder = DATA / name, get_tokenizer(tokenizer)
    strangers = {file.name for file in folder.glob("*")} - {*FILES}
    if strangers or path and folder.resolve() in (path, *path.parents):
        raise InputError(f"{folder} holds {min(strangers, default='the text')}: move that, or rename the text")
    if Path(local := tokenizer.removeprefix("hf:")).exists():  # to be found from any folder
        tokenizer = tokenizer[: -len(local)] + str(Path(local).resolve())
    dtype = next(dtype for dtype in DTYPES if encoder.n_vocab - 1 <= np.iinfo(dtype).max)
    meta = dict.fromkeys(META, 0) | {"name": name, "tokenizer": tokenizer, "dtype": dtype}
    try:
        DATA.mkdir(parents=True, exist_ok=True)
        meta["source"], files = find_files(name, path, glob, shards)
        meta["vocab_size"], meta["source_bytes"] = encoder.n_vocab, sum(file.stat().st_size for file in files)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=DATA) as new, tqdm(unit="B", unit_scale=True) as bar:
            for file, given in files.items():
                for split, text in documents(file, given):
                    content = text.encode()
                    ids = np.frombuffer(content, np.uint8) if tokenizer == "bytes" else encoder.encode(text)  # the same
                    separator = [encoder.end_of_text] * bool(text and meta[f"{split}_tokens"])
                    ids = np.concatenate([np.array(separator, dtype), np.asarray(ids, dtype)])
                    with open(Path(new, f"{split}.bin"), "ab") as out:
                        out.write(ids)
                    meta[f"{split}_tokens"] += len(ids)
                    meta[f"{split}_bytes"] += len(content)
                    bar.update(len(content))
            if not meta["train_tokens"] * meta["val_tokens"]:
                raise InputError(f"{source} has too little text for training and validation (other files: --glob)")
            sha256 = hashlib.sha256(np.memmap(Path(new, "train.bin"), dtype, "r"))
            sha256.update(np.memmap(Path(new, "val.bin"), dtype, "r"))
            Path(new, "meta.json").write_text(json.dumps(meta | {"sha256": sha256.hexdigest()}, indent=2) + "\n")
            folder.mkdir(exist_ok=True)
            (folder / "meta.json").unlink(missing_ok=True)
            for file in FILES:
                Path(new, file).replace(folder / file)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:  # no network, full disk, bad --glob
        raise InputError(f"cannot prepare {source} ({reason(error)})") from None
    return name


def ensure(source: str) -> str:
    """The name of the data set for a NAME or PATH; if it is not there, it is made, with bytes as tokens."""
    name, path = (source, None) if (DATA / source / "meta.json").exists() else locate(source)
    if not (DATA / name / "meta.json").exists():
        return prepare(source)
    if path and path != (DATA / name).resolve():
        meta, why = load(name)[0], f"was prepared from another place, or {source} has changed since"
        if meta["source"] != str(path) or path.is_file() and meta["source_bytes"] != path.stat().st_size:
            raise InputError(f"data/{name} {why}: run prepare_data.py {source}, or use the old with --data {name}")
    return name


def load(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """(meta, train tokens, val tokens) of data/<name>, the tokens memory-mapped. Raises InputError."""
    try:
        meta = json.loads((DATA / name / "meta.json").read_text())
        for key, kind in META.items():
            if type(meta.get(key)) is not kind or kind is not str and not 0 < meta[key] < 2**63:
                raise ValueError(f"meta.json: {key} is {meta.get(key)!r}")
        data = [np.memmap(DATA / name / f"{split}.bin", DTYPES[meta["dtype"]], "r") for split in ("train", "val")]
        if any(len(a) != meta[f"{s}_tokens"] or a.max() >= meta["vocab_size"] for s, a in zip(("train", "val"), data)):
            raise ValueError("train.bin and val.bin do not fit meta.json")
    except (OSError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{DATA / name} is incomplete or damaged ({error}); run prepare_data.py again") from None
    meta["bytes_per_token"] = (meta["train_bytes"] + meta["val_bytes"]) / (meta["train_tokens"] + meta["val_tokens"])
    return meta, *data


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # names may have characters that the console has not
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="stdlib", metavar="NAME|PATH", help=", ".join(NAMES) + " or yours")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2, FILE.tiktoken or hf:NAME_OR_FOLDER")
    parser.add_argument("--glob", default="*.txt", help='which files of a folder (default "*.txt")')
    parser.add_argument("--shards", type=int, default=1, help="how many training shards of c4 (default 1)")
    try:
        meta, *_ = load(prepare(**vars(parser.parse_args())))
    except (InputError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'stopped'}")
    kind = f"{meta['dtype']}, vocabulary {meta['vocab_size']:,}, {meta['bytes_per_token']:.2f} bytes a token"
    print(f"data/{meta['name']}: {meta['train_tokens']:,} training, {meta['val_tokens']:,} validation tokens ({kind})")


if __name__ == "__main__":
    main()
