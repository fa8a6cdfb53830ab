"""Text in, tokens out: data/<name>/{train.bin, val.bin, meta.json}.

    python prepare_data.py                      # stdlib: the sources of this Python's standard library
    python prepare_data.py shakespeare          # Tiny Shakespeare, downloaded
    python prepare_data.py notes.txt            # your own text; the last 10 % is for validation
    python prepare_data.py folder --glob "*.md" # your own files; 5 % of the files are for validation
    python prepare_data.py notes.txt --tokenizer gpt2

The .bin files are plain arrays of token ids, in the smallest of uint8, uint16 and uint32 that holds the
vocabulary; documents are separated by end-of-text. All tokenizing is tiktoken's.
"""

import argparse
import base64
import codecs
import difflib
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

DATA = Path("data")
NAMES = ("stdlib", "shakespeare")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
END_OF_TEXT = "<|endoftext|>"
META = {"name", "source", "tokenizer", "vocab_size", "dtype", "sha256"}
META |= {"train_tokens", "val_tokens", "train_bytes", "val_bytes", "bytes_per_token"}
PIECE = 2**20  # bytes of text that are tokenized at a time


class InputError(Exception):
    """A user's mistake, told in one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help tells more)\n")


# Tokenizers


def get_encoding(tokenizer: str) -> tiktoken.Encoding:
    """The tokenizer "bytes", "gpt2", or a .tiktoken file of ranks. Raises InputError if it cannot be had."""
    if tokenizer == "bytes":  # no merges, so the pattern only decides how much is handled at a time
        ranks, pattern = {bytes([i]): i for i in range(256)}, r"(?s).{1,64}"
    elif tokenizer == "gpt2":
        try:
            return tiktoken.get_encoding("r50k_base")  # GPT-2's, under the name of its single file
        except Exception as error:
            raise InputError(
                f"GPT-2's tokenizer is neither in tiktoken's cache nor downloadable ({type(error).__name__}): go "
                "online once, or set TIKTOKEN_CACHE_DIR to a cache that has it, or pass a file: --tokenizer "
                "r50k_base.tiktoken"
            ) from None
    elif tokenizer.endswith(".tiktoken"):
        try:
            lines = Path(tokenizer).read_bytes().splitlines()
            pairs = [line.split() for line in lines if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {tokenizer}: {error.strerror}") from None
        except ValueError:
            raise InputError(f"{tokenizer} is not in tiktoken's format, lines of a base64 token and its rank") from None
        if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([i]) in ranks for i in range(256)):
            raise InputError(f"{tokenizer} is cut short or damaged: its ranks have gaps, or a single byte has none")
        pattern = r50k_pat_str  # the file has no pattern; GPT-2's is assumed
    else:
        raise InputError(f"unknown tokenizer {tokenizer!r}: use bytes, gpt2, or a file that ends in .tiktoken")
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(tokenizer, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# Sources


class Document(NamedTuple):
    path: Path
    start: int  # bytes
    end: int


def whole(path: Path) -> Document:
    return Document(path, 0, path.stat().st_size)


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    return [path for path in files if is_utf8(path.read_bytes())]


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def split_files(files: list[Path], root: Path) -> tuple[list[Document], list[Document]]:
    """Shuffled with a fixed seed; 5 % of the files, at least one, are for validation."""
    files = sorted((path for path in files if path.stat().st_size), key=lambda path: path.relative_to(root).as_posix())
    if len(files) < 2:
        raise InputError(f"{root} has {len(files)} matching files that are not empty; two are needed (--glob?)")
    random.Random(0).shuffle(files)
    n_val = max(1, len(files) // 20)
    return [whole(path) for path in files[n_val:]], [whole(path) for path in files[:n_val]]


def split_text(path: Path) -> tuple[list[Document], list[Document]]:
    """The last 10 % of a file, cut at a line where there is one, are for validation."""
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty")
    cut = size * 9 // 10
    with open(path, "rb") as file:
        file.seek(cut)
        line_end = cut + len(file.readline(PIECE))
        file.seek(line_end - 1)
        if line_end < size and file.read(1) == b"\n":
            cut = line_end
        else:  # one huge line: cut it between two characters
            file.seek(cut)
            while cut < size and 0x80 <= file.read(1)[0] < 0xC0:
                cut += 1
    return [Document(path, 0, cut)], [Document(path, cut, size)]


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch a small file to path, unless it is there already; what fails the hash is not kept."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"cannot download {url} ({error}); get the file by other means and pass its path") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{url} sent {len(content)} bytes that are not the expected file (SHA-256 differs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(content)
    temporary.replace(path)


def find_source(source: str, glob: str) -> tuple[str, str, list[Document], list[Document]]:
    """(name, description, training documents, validation documents) of a NAME or PATH."""
    if source == "stdlib":
        description = "standard library of Python " + ".".join(map(str, sys.version_info[:3]))
        return source, description, *split_files(stdlib_files(), Path(sysconfig.get_path("stdlib")))
    if source == "shakespeare":
        path = DATA / "shakespeare.txt"
        download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
        return source, SHAKESPEARE_URL, *split_text(path)
    path = Path(source)
    if not source or not path.exists():
        names = sorted({*NAMES, *(meta.parent.name for meta in DATA.glob("*/meta.json"))})
        near = difflib.get_close_matches(source, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"it is neither a file or folder nor one of {', '.join(names)}"
        raise InputError(f"no data {source!r}: {hint}")
    path = path.resolve()
    if not path.stem.isprintable() or path.stem in ("", *NAMES):
        raise InputError(f"cannot name a data set {path.stem!r}; rename {path}")
    if path.is_dir():
        try:
            files = [file for file in path.rglob(glob) if file.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--glob {glob!r} is no pattern for names in a folder ({error})") from None
        return path.stem, str(path), *split_files(files, path)
    return path.stem, str(path), *split_text(path)


# Tokenizing


def pieces(document: Document) -> Iterator[str]:
    """The document's text in pieces of about PIECE bytes that can be tokenized one by one.

    A cut is made before a space or line end that follows something else: no token of GPT-2's pattern
    spans such a place, and no decision of the pattern looks across it. Only a stretch of 16 pieces
    without any is cut anywhere.
    """
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, left = "", document.end - document.start
    with open(document.path, "rb") as file:
        file.seek(document.start)
        while left:
            content = file.read(min(PIECE, left))
            if not content:
                raise InputError(f"{document.path} became shorter while it was read")
            left -= len(content)
            try:
                text += decode(content, final=not left)
            except UnicodeDecodeError as error:
                place = document.end - left - len(content) + error.start
                raise InputError(f"{document.path} is not UTF-8 text (near byte {place}); convert it first") from None
            cut = max((match.start() for match in re.finditer(r"(?<=\S)[ \n]", text[-PIECE // 4 :])), default=None)
            if not left or (cut is None and len(text) >= 16 * PIECE):
                yield text
                text = ""
            elif cut is not None:
                cut += max(0, len(text) - PIECE // 4)
                yield text[:cut]
                text = text[cut:]


def tokenize(documents: list[Document], encoding: tiktoken.Encoding, bar: tqdm) -> Iterator[np.ndarray]:
    """The documents' token ids in order, end-of-text between them, tokenized on all cores."""

    def encode(text: str) -> tuple[np.ndarray, int]:
        return encoding.encode_to_numpy(text, disallowed_special=()), len(text.encode())

    def texts() -> Iterator[str | None]:
        for i, document in enumerate(documents):
            if i:
                yield None
            yield from pieces(document)

    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = deque()  # bounded: the memory does not grow with the corpus
        for text in texts():
            waiting.append(text if text is None else pool.submit(encode, text))
            while len(waiting) > 4 * n_threads:
                yield finish(waiting.popleft(), encoding, bar)
        while waiting:
            yield finish(waiting.popleft(), encoding, bar)


def finish(future, encoding: tiktoken.Encoding, bar: tqdm) -> np.ndarray:
    if future is None:
        return np.array([encoding.eot_token])
    tokens, n_bytes = future.result()
    bar.update(n_bytes)
    return tokens


def write_tokens(path: Path, arrays: Iterable[np.ndarray], dtype: str, sha256) -> int:
    """Write the arrays to a file and into the hash; returns the number of tokens."""
    n = 0
    with open(path, "wb") as file:
        for tokens in arrays:
            content = tokens.astype(dtype).tobytes()
            file.write(content)
            sha256.update(content)
            n += len(tokens)
    return n


def prepare(source: str, tokenizer: str = "bytes", glob: str = "*.txt") -> str:
    """Make data/<name> from a NAME or PATH; returns the name.

    An old data/<name> is replaced only when the new one is complete. Raises InputError.
    """
    encoding = get_encoding(tokenizer)
    if tokenizer.endswith(".tiktoken"):
        tokenizer = str(Path(tokenizer).resolve())
        print("a .tiktoken file holds ranks only: splitting text with GPT-2's regular expression")
    name, description, *splits = find_source(source, glob)
    dtype = next(t for t in ("uint8", "uint16", "uint32") if encoding.max_token_value <= np.iinfo(t).max)
    folder = DATA / name
    recover(folder)
    DATA.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=DATA))
    meta = {"name": name, "source": description, "tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "dtype": dtype}
    sha256 = hashlib.sha256()
    try:
        total = sum(document.end - document.start for split in splits for document in split)
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenizing {name}") as bar:
            for split, documents in zip(("train", "val"), splits):
                arrays = tokenize(documents, encoding, bar)
                meta[f"{split}_tokens"] = write_tokens(new / f"{split}.bin", arrays, dtype, sha256)
                meta[f"{split}_bytes"] = sum(document.end - document.start for document in documents)
            if 0 in (meta["train_tokens"], meta["val_tokens"]):
                raise InputError(f"{description} is too short to be split into training and validation text")
        meta["bytes_per_token"] = total / (meta["train_tokens"] + meta["val_tokens"])
        meta["sha256"] = sha256.hexdigest()  # of train.bin followed by val.bin
        (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        new.chmod(0o755)
        if folder.exists():
            print(f"replacing the data/{name} that was there")
            folder.rename(old_folder(folder))
        new.rename(folder)
    finally:
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
    return name


def ensure(source: str) -> str:
    """The name of the data set for a NAME or PATH; if it is not there, it is made, with bytes as tokens."""
    path = Path(source)
    is_path = bool(source) and path.exists() and source not in NAMES and not (DATA / source / "meta.json").exists()
    name = path.resolve().stem if is_path else source
    recover(DATA / name)
    if not (DATA / name / "meta.json").exists():
        return prepare(source)
    if is_path:
        meta = load(name)[0]
        if meta["source"] != str(path.resolve()):
            raise InputError(f"data/{name} was prepared from another place; to replace it, run prepare_data.py {source}")
        if path.is_file() and meta["train_bytes"] + meta["val_bytes"] != path.stat().st_size:
            raise InputError(
                f"{source} has changed since data/{name} was prepared: run prepare_data.py {source}, or use the old "
                f"text with --data {name}"
            )
    return name


def old_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def recover(folder: Path) -> None:
    """Put the old data set back if a stop came between the two renames that replace it; else drop it."""
    if old_folder(folder).exists() and not folder.exists():
        old_folder(folder).rename(folder)
    shutil.rmtree(old_folder(folder), ignore_errors=True)


def load(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """(meta, train tokens, val tokens) of data/<name>, the tokens memory-mapped. Raises InputError."""
    folder = DATA / name
    recover(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if missing := META - meta.keys():
            raise ValueError(f"meta.json lacks {', '.join(sorted(missing))}")
        arrays = []
        for split in ("train", "val"):
            path, n = folder / f"{split}.bin", meta[f"{split}_tokens"]
            expected = n * np.dtype(meta["dtype"]).itemsize
            if path.stat().st_size != expected:
                raise InputError(f"{path} has {path.stat().st_size} bytes, not {expected}; run prepare_data.py again")
            tokens = np.memmap(path, meta["dtype"], "r") if n else np.empty(0, meta["dtype"])
            for i in range(0, n, 2**24):
                if (highest := tokens[i : i + 2**24].max()) >= meta["vocab_size"]:
                    last = meta["vocab_size"] - 1
                    raise InputError(f"{path} holds the token {highest}, the last is {last}; run prepare_data.py again")
            arrays.append(tokens)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is incomplete or damaged ({error}); run prepare_data.py again") from None
    return meta, *arrays


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = f"{', '.join(NAMES)}, a text file or a folder"
    parser.add_argument("source", nargs="?", default="stdlib", metavar="NAME|PATH", help=help)
    parser.add_argument("--tokenizer", default="bytes", help="bytes (default), gpt2, or a .tiktoken file")
    parser.add_argument("--glob", default="*.txt", help='which files of a folder (default "*.txt")')
    args = parser.parse_args()
    try:
        meta, *_ = load(prepare(args.source, args.tokenizer, args.glob))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(
        f"data/{meta['name']}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
        f"({meta['dtype']}, vocabulary {meta['vocab_size']:,}, {meta['bytes_per_token']:.2f} bytes a token)"
    )


if __name__ == "__main__":
    main()
