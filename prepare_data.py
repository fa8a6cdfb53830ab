"""Text in, tokens out: data/<name>/{train.bin, val.bin, meta.json}.

    python prepare_data.py                      # stdlib: the sources of this Python's standard library
    python prepare_data.py shakespeare          # Tiny Shakespeare, 1 MB, downloaded
    python prepare_data.py tinystories          # TinyStories by GPT-4 (Eldan and Li, 2023), 2 GB
    python prepare_data.py c4 --shards 4        # English C4, the paper's corpus: 4 of 1024 shards, 0.3 GB each
    python prepare_data.py notes.txt            # your own text; the last 10 % is for validation
    python prepare_data.py notes.jsonl.gz       # a {"text": ...} a line; every tenth document is for validation
    python prepare_data.py folder --glob "*.md" # your own files; 5 % of the files are for validation
    python prepare_data.py notes.txt --tokenizer gpt2

The .bin files are plain arrays of token ids, with end-of-text between documents. A corpus may be larger than the
memory, a document or text file may not. meta.json, written last, makes a data set complete.
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
import re
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUB = {  # name: its repository on the Hugging Face hub, training file ({} is the shard), validation file, shards
    "tinystories": ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt", 1),
    "c4": ("allenai/c4", "en/c4-train.{:05d}-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz", 1024),
}
NAMES = ("stdlib", "shakespeare", *HUB)
DATA = Path("data")
FILES = ("train.bin", "val.bin", "meta.json")
DTYPES = ("uint8", "uint16", "uint32")
COUNTS = ("vocab_size", "source_bytes", "train_tokens", "train_bytes", "val_tokens", "val_bytes")
END_OF_TEXT = "<|endoftext|>"
PIECE = 2**16  # about how many characters are tokenized as one string


class InputError(Exception):
    """A user's mistake, told in one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help tells more)\n")


class Tokenizer(NamedTuple):
    n_vocab: int
    end_of_text: int  # the token between two documents
    encode_batch: Callable[[list[str]], list]  # texts -> token ids of each; special tokens are neither added nor read
    decode: Callable[[list[int]], str]

    def encode(self, text: str) -> list[int]:
        return list(self.encode_batch([text])[0])


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", "gpt2", "FILE.tiktoken" or "hf:NAME_OR_FOLDER". Raises InputError if it cannot be had."""
    ways = ""
    try:
        if name == "bytes":
            table = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()]
            encode_batch = lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts]
            return Tokenizer(257, 256, encode_batch, lambda ids: b"".join(table[i] for i in ids).decode(errors="replace"))
        if name.startswith("hf:"):
            return hf_tokenizer(name.removeprefix("hf:"))
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        if name == "gpt2":
            ways = ": go online once, or set TIKTOKEN_CACHE_DIR to a filled cache, or pass --tokenizer r50k_base.tiktoken"
            encoding = tiktoken.get_encoding("r50k_base")  # GPT-2's, under the name of its single file
        elif name.endswith(".tiktoken") and Path(name).is_file():
            lines = [line.split() for line in Path(name).read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            if sorted(ranks.values()) != list(range(len(lines))) or not all(bytes([i]) in ranks for i in range(256)):
                raise ValueError("its ranks have gaps, or a single byte has none")
            special = {END_OF_TEXT: len(ranks)}  # the file lacks the pattern that splits text into words: GPT-2's
            encoding = tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
        else:
            raise ValueError("it is neither bytes, gpt2, a file that ends in .tiktoken nor hf:NAME_OR_FOLDER")
        encode_batch = lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        return Tokenizer(encoding.n_vocab, encoding.eot_token, encode_batch, encoding.decode)
    except ImportError:
        raise InputError(f'the tokenizer {name} needs transformers: pip install -e ".[hf]"') from None
    except Exception as error:  # of many kinds: no such file or name, no network, a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"cannot load the tokenizer {name} ({reason}){ways}") from None


def hf_tokenizer(name: str) -> Tokenizer:
    """A checkpoint's own tokenizer, through transformers, so that it can be trained further."""
    from transformers import AutoTokenizer

    tokenizer, prefix = AutoTokenizer.from_pretrained(name, trust_remote_code=False), ""

    def encode_batch(texts: list[str]) -> list[list[int]]:
        texts = [prefix + text if text.startswith(" ") else text for text in texts]
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    # LLaMA's puts a space before a text, which decoding takes away, but not before one that begins with a space.
    prefix = " " if decode(encode_batch([" a"])[0]) == "a" else ""
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no eos token, which separates documents")
    text = f" Don't  stop.\n\n\tNot 1,234\u00e9 \u4f60 {tokenizer.eos_token}"
    ids = encode_batch([text])[0]  # losses are counted per byte: text that is lost would flatter a model
    if decode(ids) != text or tokenizer.eos_token_id in ids:
        raise ValueError("it gives a text back changed, or reads its eos token out of a text")
    # The size is len(tokenizer), unless ids have gaps; the model's may be larger, padded to a round number.
    return Tokenizer(max(tokenizer.get_vocab().values()) + 1, tokenizer.eos_token_id, encode_batch, decode)


def locate(source: str) -> tuple[str, Path | None]:
    """(name of the data set, path of its text or None) for a NAME or PATH. Raises InputError."""
    if source in NAMES:
        return source, None
    path = Path(source).resolve()
    if not source or not (path.is_file() or path.is_dir()):  # a pipe or a device would be waited for
        names = sorted({*NAMES, *(meta.parent.name for meta in DATA.glob("*/meta.json"))})
        near = difflib.get_close_matches(source, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"it is neither a file or folder nor one of {', '.join(names)}"
        raise InputError(f"no data {source!r}: {hint}")
    name = Path(path.name.removesuffix(".gz")).stem
    if not name.isprintable() or name.startswith(".") or name in ("", *NAMES):
        raise InputError(f"cannot name a data set {name!r}; rename {path}")
    return name, path


def find_files(name: str, path: Path | None, glob: str, shards: int) -> tuple[str, dict[Path, str]]:
    """(description, {file: its split}) of what locate() gave. A file that is to be split itself has "" there."""
    if name in HUB:
        from huggingface_hub import hf_hub_download

        repo, train, val, most = HUB[name]
        wanted = {train.format(i): "train" for i in range(shards)} | {val: "val"}  # to the library's own cache:
        files = {Path(hf_hub_download(repo, file, repo_type="dataset")): split for file, split in wanted.items()}
        return f"{repo}, {shards} of {most} shards", files
    if name == "shakespeare":
        path = DATA / "shakespeare.txt"
        content = path.read_bytes() if path.exists() else urllib.request.urlopen(SHAKESPEARE, timeout=30).read()
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            raise InputError(f"{path if path.exists() else SHAKESPEARE} is not Tiny Shakespeare: its SHA-256 differs")
        path.write_bytes(content)
    if path and path.is_file():
        return str(path), {path: ""}
    root = path or Path(os.__file__).parent
    files = [file for file in root.rglob(glob if path else "*.py") if file.is_file() and file.name not in FILES]
    if not path:
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [file for file in files if not left_out & set(file.relative_to(root).parts)]
        files = [file for file in files if (b := file.read_bytes()) == b.decode(errors="ignore").encode()]  # UTF-8
    files = sorted((file for file in files if file.stat().st_size), key=lambda file: file.relative_to(root).as_posix())
    if len(files) < 2:
        raise InputError(f"{root} has {len(files)} matching files that are not empty; two are needed (--glob?)")
    random.Random(0).shuffle(files)
    description = str(path or f"standard library of Python {sys.version.split()[0]}")
    return description, {file: "val" if i < max(1, len(files) // 20) else "train" for i, file in enumerate(files)}


def documents(path: Path, is_split: bool) -> Iterator[str]:
    """JSON lines' texts; or a text as a whole; or if it is to be split its first 90 %, cut at a line, and the rest."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
                for number, line in enumerate(file, 1):
                    try:
                        if not line.isspace():
                            (text := json.loads(line)["text"]).encode()  # fails too if it is half a surrogate pair
                            yield text
                    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                        raise InputError(f'{path}, line {number}: this is no JSON object with a "text" string') from None
            elif path.name.startswith("TinyStories"):  # with a line of end-of-text between stories
                for ends, lines in itertools.groupby(file, lambda line: line.strip() == END_OF_TEXT.encode()):
                    if not ends:
                        yield b"".join(lines).decode().strip()
            else:
                text = file.read().decode()
                cut = len(text) * 9 // 10 if is_split else len(text)
                cut = text.find("\n", cut, -1) + 1 or cut  # in one huge line anywhere
                yield from (text[:cut], text[cut:])
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def pieces(files: dict[Path, str]) -> Iterator[tuple[str, str, bool]]:
    """(split, piece of text, whether it begins a document) of all documents in order."""
    # A long document is cut before a space or line end that follows a letter or digit. No token spans such a place: the
    # patterns of GPT-2 and its followers begin a new word there, and in SentencePiece's vocabularies a space only begins
    # a token. So the tokens are those of the document as a whole.
    piece = re.compile(rf"(?s).{{{PIECE},}}?(?<=[^\W_])(?=[ \n])|.+")
    for path, split in files.items():
        for i, text in enumerate(documents(path, is_split=not split)):
            for found in piece.finditer(text):
                yield split or ("val" if i % 10 == 1 else "train"), found[0], found.start() == 0


def prepare(source: str, tokenizer: str = "bytes", glob: str = "*.txt", shards: int = 1) -> str:
    """Make data/<name> from a NAME or PATH; returns the name. Raises InputError.

    What is there already is replaced when all of the new is written, and only if it is a data set.
    """
    name, path = locate(source)
    folder, encoder = DATA / name, get_tokenizer(tokenizer)
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else {name} if os.path.lexists(folder) else set()
    if there - {*FILES} or path and folder.resolve() in (path, *path.parents):
        holds = f"holds {min(there - {*FILES}, default=source)}, which is no part of a data set"
        raise InputError(f"{folder}, where the tokens would go, {holds}: move it or rename the text")
    if not 1 <= shards <= (most := HUB[name][3] if name in HUB else 1):
        raise InputError(f"--shards {shards}: {source} has {most}" + " (it is for c4)" * (most == 1))
    if Path(local := tokenizer.removeprefix("hf:")).exists():  # to be found from any folder
        tokenizer = tokenizer[: -len(local)] + str(Path(local).resolve())
    dtype = next(t for t in DTYPES if encoder.n_vocab - 1 <= np.iinfo(t).max)
    meta = {"name": name, "tokenizer": tokenizer, "dtype": dtype, **dict.fromkeys(COUNTS, 0)}
    meta["vocab_size"], n_letter, sha256 = encoder.n_vocab, len(encoder.encode("a")), hashlib.sha256()
    try:
        DATA.mkdir(parents=True, exist_ok=True)
        meta["source"], files = find_files(name, path, glob, shards)
        meta["source_bytes"], stream = sum(file.stat().st_size for file in files), pieces(files)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=DATA) as new, tqdm(unit="B", unit_scale=True) as bar:
            while batch := list(itertools.islice(stream, 64)):  # tokenized on all cores
                # LLaMA's tokenizer puts a space before each text, which is right where a document begins. A piece that
                # continues one gets a letter in front, as it had there, whose tokens are then taken off.
                encoded = encoder.encode_batch([text if first else "a" + text for _, text, first in batch])
                for (split, text, first), ids in zip(batch, encoded):
                    ids = np.asarray(ids if first else ids[n_letter:], dtype)
                    if first and meta[f"{split}_tokens"]:
                        ids = np.insert(ids, 0, encoder.end_of_text)
                    with open(Path(new, f"{split}.bin"), "ab") as file:
                        file.write(ids)
                    meta[f"{split}_tokens"] += len(ids)
                    meta[f"{split}_bytes"] += len(text.encode())
                    bar.update(len(text.encode()))
            if not meta["train_tokens"] or not meta["val_tokens"]:
                raise InputError(f"{source} is empty, or too short to be split into training and validation text")
            for split in ("train", "val"):
                sha256.update(np.memmap(Path(new, f"{split}.bin"), dtype, "r"))
            n_bytes, n_tokens = (meta[f"train_{unit}"] + meta[f"val_{unit}"] for unit in ("bytes", "tokens"))
            meta |= {"bytes_per_token": n_bytes / n_tokens, "sha256": sha256.hexdigest()}
            Path(new, "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            folder.mkdir(exist_ok=True)
            (folder / "meta.json").unlink(missing_ok=True)
            for file in FILES:  # meta.json is the last
                Path(new, file).replace(folder / file)
    except ImportError:
        raise InputError(f'{name} needs huggingface_hub: pip install -e ".[hf]"') from None
    except (OSError, ValueError, NotImplementedError) as error:  # a full disk, no network, a bad --glob ...
        raise InputError(f"cannot prepare {source}: {' '.join(str(error).split())}") from None
    return name


def ensure(source: str) -> str:
    """The name of the data set for a NAME or PATH; if it is not there, it is made, with bytes as tokens."""
    if source == Path(source).name and (DATA / source / "meta.json").exists():
        return source
    name, path = locate(source)
    if path is None or not (DATA / name / "meta.json").exists():
        return prepare(source)
    meta = load(name)[0]
    size = path.stat().st_size if path.is_file() else meta["source_bytes"]
    if path != (DATA / name).resolve() and (meta["source"], meta["source_bytes"]) != (str(path), size):
        reason = f"was prepared from another place, or {source} has changed since"
        raise InputError(f"data/{name} {reason}: run prepare_data.py {source}, or use the old text with --data {name}")
    return name


def load(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """(meta, train tokens, val tokens) of data/<name>, the tokens memory-mapped. Raises InputError."""
    folder = DATA / name
    try:
        meta = json.loads((folder / "meta.json").read_text())
        kinds = {"name": str, "source": str, "tokenizer": str, "sha256": str, "dtype": str, "bytes_per_token": float}
        for key, kind in (kinds | dict.fromkeys(COUNTS, int)).items():
            if type(meta.get(key)) is not kind or kind is not str and not 0 < meta[key] < 2**63:
                raise ValueError(f"meta.json: {key} is {meta.get(key)!r}")
        if meta["dtype"] not in DTYPES:
            raise ValueError(f"meta.json: dtype is {meta['dtype']!r}")
        arrays = [np.memmap(folder / f"{split}.bin", meta["dtype"], "r") for split in ("train", "val")]
        if [len(array) for array in arrays] != [meta["train_tokens"], meta["val_tokens"]]:
            raise ValueError("train.bin or val.bin has another length than meta.json tells")
        if (highest := max(array.max() for array in arrays)) >= meta["vocab_size"]:
            raise ValueError(f"there is a token {highest}, the last is {meta['vocab_size'] - 1}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder} is incomplete or damaged ({error}); run prepare_data.py again") from None
    return meta, *arrays


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # names of files may have characters that the console has not
        stream.reconfigure(errors="replace")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = f"{', '.join(NAMES)}, a folder, or a file: text or JSON lines, either also as .gz"
    parser.add_argument("source", nargs="?", default="stdlib", metavar="NAME|PATH", help=help)
    help = "bytes (default), gpt2, a .tiktoken file, or hf:NAME_OR_FOLDER, a checkpoint's on the Hugging Face hub or here"
    parser.add_argument("--tokenizer", default="bytes", help=help)
    parser.add_argument("--glob", default="*.txt", help='which files of a folder (default "*.txt")')
    parser.add_argument("--shards", type=int, default=1, help="how many training shards of c4 (default 1)")
    args = parser.parse_args()
    try:
        meta, *_ = load(prepare(args.source, args.tokenizer, args.glob, args.shards))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    kind = f"{meta['dtype']}, vocabulary {meta['vocab_size']:,}, {meta['bytes_per_token']:.2f} bytes a token"
    print(f"data/{meta['name']}: {meta['train_tokens']:,} training, {meta['val_tokens']:,} validation tokens ({kind})")


if __name__ == "__main__":
    main()
