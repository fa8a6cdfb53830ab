"""Text in, tokens out: data/<name>/{train.bin, val.bin, meta.json}.

    python prepare_data.py                      # stdlib: the sources of this Python's standard library
    python prepare_data.py shakespeare          # Tiny Shakespeare, 1 MB, downloaded
    python prepare_data.py tinystories          # TinyStories by GPT-4 (Eldan and Li, 2023), 2 GB
    python prepare_data.py c4 --shards 4        # English C4, the paper's corpus: 4 of 1024 shards, 0.3 GB each
    python prepare_data.py notes.txt            # your own text; the last 10 % is for validation
    python prepare_data.py notes.jsonl.gz       # a {"text": ...} a line; every tenth document is for validation
    python prepare_data.py folder --glob "*.md" # your own files; 5 % of the files are for validation
    python prepare_data.py notes.txt --tokenizer gpt2

The .bin files are plain arrays of token ids, in the smallest of uint8, uint16 and uint32 that holds the
vocabulary; documents are separated by end-of-text. All tokenizing is tiktoken's. Text streams from the disk,
so a corpus may be larger than the memory; a single document of JSON lines or TinyStories may not.
"""

import argparse
import base64
import codecs
import contextlib
import difflib
import gzip
import hashlib
import http.client
import json
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where two preparations must not run side by side
    fcntl = None

HUB = "https://huggingface.co/datasets/"
C4 = HUB + "allenai/c4/resolve/main/en/c4-"
STORIES = HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SOURCES = {  # name: format, SHA-256 if known, number of shards, training URL ({} is the shard), validation URL
    "shakespeare": (".txt", SHAKESPEARE_SHA256, 1, SHAKESPEARE, None),
    "tinystories": (".stories.txt", None, 1, STORIES + "train.txt", STORIES + "valid.txt"),
    "c4": (".json.gz", None, 1024, C4 + "train.{:05d}-of-01024.json.gz", C4 + "validation.00000-of-00008.json.gz"),
}
NAMES = ("stdlib", *SOURCES)
DATA = Path("data")
END_OF_TEXT = "<|endoftext|>"
META = {"name", "source", "tokenizer", "vocab_size", "dtype", "sha256"}
META |= {"train_tokens", "val_tokens", "train_bytes", "val_bytes", "bytes_per_token"}
PIECE = 2**20  # about how much text, in bytes or characters, is read and tokenized at a time
WAITS = (1, 2, 4, 8, 16)  # seconds before each new attempt of a download that does not get on


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
            ways = "go online once, or set TIKTOKEN_CACHE_DIR to a filled cache, or pass --tokenizer r50k_base.tiktoken"
            reason = f"neither in tiktoken's cache nor downloadable ({type(error).__name__})"
            raise InputError(f"GPT-2's tokenizer is {reason}: {ways}") from None
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


# Downloads


def intact(path: Path, sha256: str | None) -> bool:
    return sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256  # a hash is given for small files


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch url to path, unless it is there; a broken download is taken up where it stopped. Raises InputError."""
    if path.exists() and intact(path, sha256):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, etag = path.with_name(path.name + ".part"), path.with_name(path.name + ".etag")
    for wait in (*WAITS, None):
        try:
            fetch(url, part, etag)
            break
        except (OSError, ValueError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)  # an HTTP status; what failed without one may go better next time
            if code == 416:  # the server has no more than what is here, but called that version incomplete
                part.unlink(missing_ok=True)
            if wait is None or not (code in (416, 429) or code >= 500):
                raise InputError(f"cannot download {url} ({error}): try later, or pass the path of a copy") from None
            print(f"{path.name}: {error}; trying again in {wait} s")
            time.sleep(wait)
    if not intact(part, sha256):
        part.unlink()
        raise InputError(f"{url} did not send the expected file (its SHA-256 differs)")
    part.replace(path)
    etag.unlink()


def fetch(url: str, part: Path, etag: Path) -> None:
    """One attempt to append to part what it lacks; etag holds the server's name for the version that it is of."""
    version = etag.read_text() if etag.exists() else ""
    have = part.stat().st_size if version and part.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        sent = response.headers["ETag"] or ""  # without one, or with a weak one, the next attempt begins anew:
        sent = "" if sent.startswith("W/") else sent  # a weak one may be the same for files that differ
        if response.status != 206:  # the whole file: the server knows no ranges, or the file has changed
            have = 0
        total = None if response.length is None else have + response.length
        asked = f"bytes {have}-{(total or 0) - 1}/{total}"
        if response.status == 206 and (sent != version or response.headers["Content-Range"] != asked):
            etag.unlink(missing_ok=True)  # so the next attempt begins anew
            raise ConnectionError("the server sent another part than it was asked for")
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem)
        with bar, open(part, "ab" if have else "wb") as file:
            etag.write_text(sent)
            while content := response.read(2**16):
                file.write(content)
                bar.update(len(content))
            file.flush()
            os.fsync(file.fileno())
    if total not in (None, part.stat().st_size):
        raise ConnectionError(f"the connection broke off after {part.stat().st_size:,} of {total:,} bytes")


# Sources


class Part(NamedTuple):
    """Documents of one file."""

    path: Path
    start: int = 0  # bytes of uncompressed text
    end: int = sys.maxsize
    tenth: bool | None = None  # of JSON lines: True for every tenth document, False for the others, None for all


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    return [path for path in files if (text := path.read_bytes()) == text.decode(errors="ignore").encode()]  # UTF-8


def is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple]:
    """(the file, the same uncompressed)"""
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            yield raw, file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or no gzip file ({error}); delete it and get it again") from None


def split_files(files: list[Path], root: Path) -> tuple[list[Part], list[Part]]:
    """Shuffled with a fixed seed; 5 % of the files, at least one, are for validation."""
    files = sorted((path for path in files if path.stat().st_size), key=lambda path: path.relative_to(root).as_posix())
    if len(files) < 2:
        raise InputError(f"{root} has {len(files)} matching files that are not empty; two are needed (--glob?)")
    random.Random(0).shuffle(files)
    n_val = max(1, len(files) // 20)
    return [Part(path) for path in files[n_val:]], [Part(path) for path in files[:n_val]]


def split_file(path: Path) -> tuple[list[Part], list[Part]]:
    """For validation: of JSON lines the 2nd, 12th, 22nd ... document; of text the last 10 %, cut at a line."""
    if is_jsonl(path):
        return [Part(path, tenth=False)], [Part(path, tenth=True)]
    with opened(path) as (_, file):
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            raise InputError(f"{path} is empty")
        cut = file.seek(size * 9 // 10)
        line = file.readline(PIECE)
        if not line.endswith(b"\n") or cut + len(line) == size:  # one huge line: cut it between two characters
            line = line[: len(line) - len(line.lstrip(bytes(range(0x80, 0xC0))))]
        cut += len(line)
    return [Part(path, 0, cut)], [Part(path, cut, size)]


def name_of(path: Path) -> str:
    return Path(path.resolve().name.removesuffix(".gz")).stem


def find_source(source: str, glob: str, shards: int) -> tuple[str, str, list[Part], list[Part]]:
    """(name, description, training parts, validation parts) of a NAME or PATH."""
    most = SOURCES[source][2] if source in SOURCES else 1
    if not 1 <= shards <= most:
        raise InputError(f"--shards {shards}: {source} has {most}" + " (it is for c4)" * (most == 1))
    if source == "stdlib":
        description = "standard library of Python " + ".".join(map(str, sys.version_info[:3]))
        return source, description, *split_files(stdlib_files(), Path(sysconfig.get_path("stdlib")))
    if source in SOURCES:
        suffix, sha256, _, train_url, val_url = SOURCES[source]
        urls = {f"train-{i:05d}": train_url.format(i) for i in range(shards)} | ({"val": val_url} if val_url else {})
        paths = [DATA / ".downloads" / f"{source}-{file}{suffix}" for file in urls]  # whatever the server says
        for url, path in zip(urls.values(), paths):
            download(url, path, sha256)
        splits = ([Part(path) for path in paths[:-1]], [Part(paths[-1])]) if val_url else split_file(paths[0])
        return source, f"{train_url}, {shards} of {most}" if most > 1 else train_url, *splits
    path = Path(source)
    if not source or not path.exists():
        names = sorted({*NAMES, *(meta.parent.name for meta in DATA.glob("*/meta.json"))})
        near = difflib.get_close_matches(source, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"it is neither a file or folder nor one of {', '.join(names)}"
        raise InputError(f"no data {source!r}: {hint}")
    path, name = path.resolve(), name_of(path)
    if not name.isprintable() or name.startswith(".") or name in ("", *NAMES):
        raise InputError(f"cannot name a data set {name!r}; rename {path}")
    if path.is_dir():
        try:
            files = [file for file in path.rglob(glob) if file.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--glob {glob!r} is no pattern for names in a folder ({error})") from None
        return name, str(path), *split_files(files, path)
    return name, str(path), *split_file(path)


# Tokenizing


def text_blocks(part: Part, bar: tqdm) -> Iterator[str | None]:
    """The text of a part in blocks, None after each document. The bar counts bytes as they lie on the disk."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    stories = part.path.name.endswith(".stories.txt")  # with end-of-text written between them
    with opened(part.path) as (raw, file):
        place = file.seek(part.start)
        counted, text, content = raw.tell(), "", b"go"
        while content and place < part.end:
            content = file.read(min(PIECE, part.end - place))
            try:
                text += decode(content, final=not content or place + len(content) == part.end)
            except UnicodeDecodeError as error:
                place += error.start
                raise InputError(f"{part.path} is not UTF-8 text (near byte {place}); convert it first") from None
            place += len(content)
            bar.update(raw.tell() - counted)
            counted = raw.tell()
            *blocks, text = text.split(END_OF_TEXT) if stories else (text, "")
            for block in blocks:
                yield from (block.strip(), None) if stories else (block,)
        if place < part.end < sys.maxsize:
            raise InputError(f"{part.path} became shorter while it was read")
    yield from (text.strip(), None)


def json_blocks(part: Part, bar: tqdm) -> Iterator[str | None]:
    """The same of JSON lines."""
    with opened(part.path) as (raw, file):
        counted = n = 0
        for number, line in enumerate(file, 1):
            moved, counted = raw.tell() - counted, raw.tell()
            n += not line.isspace()
            if line.isspace() or part.tenth not in (None, n % 10 == 2):
                continue
            bar.update(moved)
            try:
                text = json.loads(line)["text"]
                text.encode()  # fails if it is no text, or half a surrogate pair
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                raise InputError(f'{part.path}, line {number}: this is no JSON object with a "text" string') from None
            yield from (text[i : i + PIECE] for i in range(0, len(text), PIECE))
            yield None


def batches(parts: list[Part], bar: tqdm) -> Iterator[list[str | None]]:
    """The parts' text in lists of some PIECE characters, each string to be tokenized alone, None between documents.

    Long documents are cut before a space or line end that follows something else: no token of GPT-2's
    pattern spans such a place, and no decision of the pattern looks across it. Only a stretch of 16 pieces
    without any is cut anywhere.
    """
    batch, size, text = [], 0, ""
    for part in parts:
        for block in (json_blocks if is_jsonl(part.path) else text_blocks)(part, bar):
            if size >= PIECE and block:
                yield batch
                batch, size = [], 0
            text += block or ""
            cut = n = len(text)
            if block is not None:  # the document goes on
                places = range(n - 1, max(0, n - PIECE // 4), -1) if n >= PIECE else ()
                anywhere = n - 1 if n >= 16 * PIECE else 0
                cut = next((i for i in places if text[i] in " \n" and not text[i - 1].isspace()), anywhere)
            if cut:
                batch += [text[:cut], None] if block is None else [text[:cut]]
                size, text = size + cut, text[cut:]
    if batch:
        yield batch[:-1]  # the last document's end separates nothing


def tokenize(parts: list[Part], encoding: tiktoken.Encoding, dtype: str, bar: tqdm) -> Iterator[tuple[np.ndarray, int]]:
    """(token ids, bytes of their text) of the parts' documents in order, end-of-text between them."""

    def encode(batch: list[str | None]) -> tuple[np.ndarray, int]:
        joined = "".join(END_OF_TEXT if text is None else text for text in batch)
        n_bytes = (len(joined) if joined.isascii() else len(joined.encode())) - len(END_OF_TEXT) * batch.count(None)
        if joined.count(END_OF_TEXT) == batch.count(None):  # one call for all, many small documents being slow
            return encoding.encode_to_numpy(joined, allowed_special="all").astype(dtype), n_bytes
        border = np.array([encoding.eot_token])  # a text has those characters in it, and they mean nothing there
        arrays = [border if t is None else encoding.encode_to_numpy(t, disallowed_special=()) for t in batch]
        return np.concatenate(arrays).astype(dtype), n_bytes

    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting = deque()  # bounded: the memory does not grow with the corpus
        for batch in batches(parts, bar):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 4 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the lock of the data folder, so that two preparations do not write into each other's files."""
    DATA.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if fcntl:
            folder = os.open(DATA, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)  # waits
        yield


def check_replaceable(folder: Path, sources: list[Path]) -> None:
    """Raise InputError unless data/<name> is absent, or a data set of ours that holds nothing of the source's."""
    if any(folder.resolve() in path.resolve().parents for path in sources):
        raise InputError(f"the text lies in {folder}, where its tokens would go: move or rename it first")
    if folder.exists():
        ours = {"train.bin", "val.bin", "meta.json"}
        strangers = [folder.name] if not folder.is_dir() else sorted({path.name for path in folder.iterdir()} - ours)
        if strangers:
            raise InputError(f"{folder} holds something else than a data set ({strangers[0]}): move it or rename the text")


@alone()
def prepare(source: str, tokenizer: str = "bytes", glob: str = "*.txt", shards: int = 1) -> str:
    """Make data/<name> from a NAME or PATH; returns the name.

    An old data/<name> is replaced only when the new one is complete. Raises InputError.
    """
    encoding = get_encoding(tokenizer)
    if tokenizer.endswith(".tiktoken"):
        tokenizer = str(Path(tokenizer).resolve())
        print("a .tiktoken file holds ranks only: splitting text with GPT-2's regular expression")
    name, description, *splits = find_source(source, glob, shards)
    dtype = next(t for t in ("uint8", "uint16", "uint32") if encoding.max_token_value <= np.iinfo(t).max)
    folder = DATA / name
    recover(folder)
    check_replaceable(folder, [part.path for parts in splits for part in parts])
    for path in DATA.iterdir():
        if path.name.startswith(f".{name}.new-"):  # of a preparation that was killed
            shutil.rmtree(path)
    new = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=DATA))
    meta = {"name": name, "source": description, "tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "dtype": dtype}
    meta["source_bytes"] = sum(path.stat().st_size for path in {part.path for split in splits for part in split})
    sha256 = hashlib.sha256()
    try:
        with tqdm(total=meta["source_bytes"], unit="B", unit_scale=True, desc=f"tokenizing {name}") as bar:
            for split, parts in zip(("train", "val"), splits):
                n_tokens = n_bytes = 0
                with open(new / f"{split}.bin", "wb") as file:
                    for tokens, length in tokenize(parts, encoding, dtype, bar):
                        file.write(tokens)
                        sha256.update(tokens)
                        n_tokens, n_bytes = n_tokens + len(tokens), n_bytes + length
                if n_tokens == 0:
                    raise InputError(f"{description} is too short to be split into training and validation text")
                meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": n_bytes}
        total = meta["train_bytes"] + meta["val_bytes"]
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
    name = name_of(path) if is_path else source
    recover(DATA / name)
    if not (DATA / name / "meta.json").exists():
        return prepare(source)
    if is_path:
        meta = load(name)[0]
        if meta["source"] != str(path.resolve()):
            raise InputError(f"data/{name} was prepared from another place; to replace it: prepare_data.py {source}")
        size = meta.get("source_bytes", meta["train_bytes"] + meta["val_bytes"])
        if path.is_file() and size != path.stat().st_size:
            advice = f"run prepare_data.py {source}, or use the old text with --data {name}"
            raise InputError(f"{source} has changed since data/{name} was prepared: {advice}")
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
            arrays.append(np.memmap(path, meta["dtype"], "r"))
            if (highest := arrays[-1].max()) >= (n := meta["vocab_size"]):
                raise InputError(f"{path} holds the token {highest}, the last is {n - 1}; run prepare_data.py again")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is incomplete or damaged ({error}); run prepare_data.py again") from None
    return meta, *arrays


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = f"{', '.join(NAMES)}, a folder, or a file: text or JSON lines, either also as .gz"
    parser.add_argument("source", nargs="?", default="stdlib", metavar="NAME|PATH", help=help)
    parser.add_argument("--tokenizer", default="bytes", help="bytes (default), gpt2, or a .tiktoken file")
    parser.add_argument("--glob", default="*.txt", help='which files of a folder (default "*.txt")')
    parser.add_argument("--shards", type=int, default=1, help="how many training shards of c4 (default 1)")
    args = parser.parse_args()
    try:
        meta, *_ = load(prepare(args.source, args.tokenizer, args.glob, args.shards))
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    kind = f"{meta['dtype']}, vocabulary {meta['vocab_size']:,}, {meta['bytes_per_token']:.2f} bytes a token"
    counts = f"{meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens"
    print(f"data/{meta['name']}: {counts} ({kind})")


if __name__ == "__main__":
    main()
