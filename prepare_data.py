"""Text in, tokens out: data/<name>/{train.bin, val.bin, meta.json}.

    python prepare_data.py                      # stdlib: the sources of this Python's standard library
    python prepare_data.py shakespeare          # Tiny Shakespeare, 1 MB, downloaded
    python prepare_data.py tinystories          # TinyStories by GPT-4 (Eldan and Li, 2023), 2 GB
    python prepare_data.py c4 --shards 4        # English C4, the paper's corpus: 4 of 1024 shards, 0.3 GB each
    python prepare_data.py notes.txt            # your own text; the last 10 % is for validation
    python prepare_data.py notes.jsonl.gz       # a {"text": ...} a line; every tenth document is for validation
    python prepare_data.py folder --glob "*.md" # your own files; 5 % of the files are for validation
    python prepare_data.py notes.txt --tokenizer gpt2
    python prepare_data.py notes.txt --tokenizer hf:TinyLlama/TinyLlama_v1.1

The .bin files are plain arrays of token ids, in the smallest of uint8, uint16 and uint32 that holds the
vocabulary; documents are separated by end-of-text. Text streams from the disk, so a corpus may be larger than
the memory; a single line of it may not. A data set is complete when its meta.json is there, which is written last.
"""

import argparse
import base64
import contextlib
import difflib
import gzip
import hashlib
import http.client
import json
import os
import random
import re
import sys
import sysconfig
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
END_OF_TEXT = "<|endoftext|>"
META = {"name": str, "source": str, "tokenizer": str, "vocab_size": int, "dtype": str, "source_bytes": int}
META |= {"train_tokens": int, "train_bytes": int, "val_tokens": int, "val_bytes": int}
META |= {"bytes_per_token": float, "sha256": str}
PIECE = 2**17  # about how much text, in bytes or characters, is read and tokenized as one string


class InputError(Exception):
    """A user's mistake, told in one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help tells more)\n")


# Tokenizers


class Tokenizer(NamedTuple):
    n_vocab: int
    end_of_text: int  # the token between two documents
    encode_batch: Callable[[list[str]], list]  # texts -> the token ids of each, on all cores; no special tokens
    decode: Callable[[list[int]], str]

    def encode(self, text: str) -> list[int]:
        return list(self.encode_batch([text])[0])


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", "gpt2", "FILE.tiktoken" or "hf:NAME_OR_FOLDER". Raises InputError if it cannot be had."""
    if name == "bytes":
        table = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()]
        return Tokenizer(
            n_vocab=257,
            end_of_text=256,
            encode_batch=lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts],
            decode=lambda ids: b"".join(table[i] for i in ids).decode(errors="replace"),
        )
    if name.startswith("hf:"):
        return hf_tokenizer(name.removeprefix("hf:"))
    if name == "gpt2" or name.endswith(".tiktoken"):
        return tiktoken_tokenizer(name)
    raise InputError(f"unknown tokenizer {name!r}: use bytes, gpt2, a file that ends in .tiktoken, or hf:NAME_OR_FOLDER")


def tiktoken_tokenizer(name: str) -> Tokenizer:
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    if name == "gpt2":
        try:
            encoding = tiktoken.get_encoding("r50k_base")  # GPT-2's, under the name of its single file
        except Exception as error:
            ways = "go online once, or set TIKTOKEN_CACHE_DIR to a filled cache, or pass --tokenizer r50k_base.tiktoken"
            reason = f"neither in tiktoken's cache nor downloadable ({type(error).__name__})"
            raise InputError(f"GPT-2's tokenizer is {reason}: {ways}") from None
    else:
        if not Path(name).is_file():
            raise InputError(f"cannot read the tokenizer {name}: there is no such file")
        try:
            pairs = [line.split() for line in Path(name).read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except ValueError:
            raise InputError(f"{name} is not in tiktoken's format, lines of a base64 token and its rank") from None
        if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([i]) in ranks for i in range(256)):
            raise InputError(f"{name} is cut short or damaged: its ranks have gaps, or a single byte has none")
        # The file has no regular expression that splits text into words; GPT-2's is assumed.
        special = {END_OF_TEXT: len(ranks)}
        encoding = tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(
        n_vocab=encoding.n_vocab,
        end_of_text=encoding.eot_token,
        encode_batch=lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1),
        decode=encoding.decode,
    )


def hf_tokenizer(name: str) -> Tokenizer:
    """A checkpoint's own tokenizer, by a name on the Hugging Face hub or a folder, so that its model can be fine-tuned."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(f'the tokenizer hf:{name} needs transformers: pip install -e ".[hf]"') from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such folder or name, no network, a damaged file
        raise InputError(f"cannot load the tokenizer hf:{name} ({one_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer hf:{name} has no eos token, which separates documents")
    # The characters of a special token, "</s>" say, are plain text where a text has them.
    plain = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
    hf = Tokenizer(
        # len(tokenizer), unless its ids have gaps. The model's vocabulary may be larger, padded to a round number.
        n_vocab=max(tokenizer.get_vocab().values()) + 1,
        end_of_text=tokenizer.eos_token_id,
        encode_batch=lambda texts: tokenizer(texts, verbose=False, **plain)["input_ids"],
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
    )
    # Losses are counted per byte of the text, so a tokenizer that drops or changes some of it would flatter the model.
    probe = "Don't  stop.\n\n\tNot 1,234\u00e9 \u4f60 </s> !"
    if (back := hf.decode(hf.encode(probe))) != probe:
        raise InputError(f"the tokenizer hf:{name} does not give every text back: {probe!a} becomes {back!a}")
    return hf


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Sources


class Part(NamedTuple):
    """Documents of one file."""

    path: Path
    start: int = 0  # bytes of uncompressed text
    end: int = sys.maxsize
    tenth: bool | None = None  # of JSON lines: True for every tenth document, False for the others, None for all
    marked: bool = False  # END_OF_TEXT is written between the documents


def locate(source: str) -> tuple[str, Path | None]:
    """(name of the data set, path of its text or None) for a NAME or PATH. Raises InputError."""
    if source in NAMES:
        return source, None
    path = Path(source).resolve()
    if not source or not path.exists():
        names = sorted({*NAMES, *(meta.parent.name for meta in DATA.glob("*/meta.json"))})
        near = difflib.get_close_matches(source, names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"it is neither a file or folder nor one of {', '.join(names)}"
        raise InputError(f"no data {source!r}: {hint}")
    if not (path.is_file() or path.is_dir()):  # a pipe or a device would be waited for
        raise InputError(f"{source} is neither a file nor a folder")
    name = Path(path.name.removesuffix(".gz")).stem
    if not name.isprintable() or name.startswith(".") or name in ("", *NAMES):
        raise InputError(f"cannot name a data set {name!r}; rename {path}")
    return name, path


def check_replaceable(folder: Path, path: Path | None) -> None:
    """Raise InputError unless folder is absent, or holds nothing but a data set of ours."""
    if path and folder.resolve() in (path, *path.parents):
        raise InputError(f"the text lies in {folder}, where its tokens would go: move or rename it first")
    if folder.exists() or folder.is_symlink():
        ours = re.compile(r"(train\.bin|val\.bin|meta\.json)(\.\d+\.tmp)?")
        names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else [folder.name]
        if strangers := [name for name in names if not ours.fullmatch(name)]:
            raise InputError(f"{folder} holds something else than a data set ({strangers[0]}): move it or rename the text")


def find_parts(name: str, path: Path | None, glob: str, shards: int) -> tuple[str, list[Part], list[Part]]:
    """(description, training parts, validation parts) of what locate() returned; downloads what has to be."""
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts)]
        files = [file for file in files if (text := file.read_bytes()) == text.decode(errors="ignore").encode()]  # UTF-8
        return "standard library of Python " + ".".join(map(str, sys.version_info[:3])), *split_files(files, root)
    if name == "shakespeare":
        return SHAKESPEARE, *split_file(download_shakespeare())
    if name in HUB:
        try:
            from huggingface_hub import hf_hub_download
        except ImportError:
            raise InputError(f'{name} needs huggingface_hub: pip install -e ".[hf]"') from None
        repo, train, val, most = HUB[name]
        try:  # into the library's own cache, where nothing is downloaded twice
            files = [hf_hub_download(repo, file, repo_type="dataset") for file in (*map(train.format, range(shards)), val)]
        except Exception as error:  # of many kinds: no network, a proxy, a full disk
            raise InputError(f"cannot get {repo} from the Hugging Face hub ({one_line(error)})") from None
        parts = [Part(Path(file), marked=name == "tinystories") for file in files]
        return f"{repo}, {shards} of {most} shards", parts[:-1], parts[-1:]
    if path.is_file():
        return str(path), *split_file(path)
    try:
        files = [file for file in path.rglob(glob) if file.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--glob {glob!r} is no pattern for names in a folder ({error})") from None
    if inside := [file for file in files if (DATA / name).resolve() in file.parents]:
        raise InputError(f"{inside[0]} matches too, and is where the tokens go: choose another --glob")
    return str(path), *split_files(files, path)


def download_shakespeare() -> Path:
    path = DATA / "shakespeare.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise InputError(f"cannot download {SHAKESPEARE} ({error}): try later, or put a copy at {path}") from None
        if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            raise InputError(f"{SHAKESPEARE} did not send the expected file (its SHA-256 differs)")
        DATA.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        raise InputError(f"{path} is not Tiny Shakespeare (its SHA-256 differs): move it away")
    return path


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
        cut = file.seek(size * 9 // 10) + len(file.readline())
        while (line := file.readline()).startswith(b" "):  # LLaMA's tokenizer loses the space a document begins with
            cut += len(line)
        if cut == size:  # one huge line: cut it between two characters
            cut = file.seek(size * 9 // 10)
            start = file.read(4)
            cut += len(start) - len(start.lstrip(bytes(range(0x80, 0xC0))))
    return [Part(path, 0, cut)], [Part(path, cut, size)]


def is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple]:
    """(the file, the same uncompressed)"""
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            yield raw, file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or no gzip file ({error}); get it again") from None


# Tokenizing


def text_blocks(part: Part, bar: tqdm) -> Iterator[str | None]:
    """The text of a part in blocks of whole lines, None after each document. The bar counts bytes on the disk."""
    with opened(part.path) as (raw, file):
        place, counted, rest = file.seek(part.start), raw.tell(), ""
        while place < part.end and (lines := file.readlines(min(PIECE, part.end - place))):
            content = b"".join(lines)[: part.end - place]
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                place += error.start
                raise InputError(f"{part.path} is not UTF-8 text (near byte {place}); convert it first") from None
            place += len(content)
            bar.update(raw.tell() - counted)
            counted = raw.tell()
            if part.marked:
                *documents, rest = (rest + text).split(END_OF_TEXT)
                for document in documents:
                    yield from (document.strip(), None)
            else:
                yield text
        if place < part.end < sys.maxsize:
            raise InputError(f"{part.path} became shorter while it was read")
    yield from (rest.strip(), None)


def json_blocks(part: Part, bar: tqdm) -> Iterator[str | None]:
    """The same of JSON lines."""
    with opened(part.path) as (raw, file):
        counted = n = 0
        for number, line in enumerate(file, 1):
            n += not line.isspace()
            if line.isspace() or part.tenth not in (None, n % 10 == 2):
                continue
            bar.update(raw.tell() - counted)
            counted = raw.tell()
            try:
                text = json.loads(line)["text"]
                text.encode()  # fails if it is no text, or half a surrogate pair
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                raise InputError(f'{part.path}, line {number}: this is no JSON object with a "text" string') from None
            yield from (text[i : i + PIECE] for i in range(0, len(text), PIECE))
            yield None


def batches(parts: list[Part], bar: tqdm) -> Iterator[list[tuple[str, bool]]]:
    """The parts' text in lists of (piece, whether it begins a document). Pieces have about PIECE characters.

    A long document is cut before a space or line end that follows a letter or digit. No token spans such a place:
    the regular expressions of GPT-2 and its followers begin a new word there and look across no such place, and in
    SentencePiece's vocabularies a space only begins a token. So the tokens are those of the document as a whole.
    """
    batch, size = [], 0
    for part in parts:
        text, first = "", True
        for block in (json_blocks if is_jsonl(part.path) else text_blocks)(part, bar):
            text += block or ""
            cut = len(text)
            if block is not None:  # the document goes on
                places = range(len(text) - 1, max(0, len(text) - PIECE), -1) if len(text) >= PIECE else ()
                cut = next((i for i in places if text[i] in " \n" and text[i - 1].isalnum()), 0)
            if cut:
                batch.append((text[:cut], first))
                size, text, first = size + cut, text[cut:], False
            if block is None:
                first = True
            if size >= 16 * PIECE:
                yield batch
                batch, size = [], 0
    yield batch


def tokenize(parts: list[Part], tokenizer: Tokenizer, dtype: str, bar: tqdm) -> Iterator[tuple[np.ndarray, int]]:
    """(token ids, bytes of their text), piece by piece, end-of-text between the documents."""
    # LLaMA's tokenizer puts a space before each string. At the start of a document that is as it should be; a piece
    # that continues one gets a letter in front, as it had in the document, whose tokens are then taken off.
    n_letter, separator = len(tokenizer.encode("a")), np.array([], dtype)
    for batch in batches(parts, bar):
        encoded = tokenizer.encode_batch([text if first else "a" + text for text, first in batch]) if batch else []
        for (text, first), ids in zip(batch, encoded):
            if first:
                yield separator, 0
                separator = np.array([tokenizer.end_of_text], dtype)
            n_bytes = len(text) if text.isascii() else len(text.encode())
            yield np.asarray(ids if first else ids[n_letter:], dtype), n_bytes


def prepare(source: str, tokenizer: str = "bytes", glob: str = "*.txt", shards: int = 1) -> str:
    """Make data/<name> from a NAME or PATH; returns the name.

    An old data/<name> is replaced only when all of the new one is written. Raises InputError.
    """
    encoder = get_tokenizer(tokenizer)
    if Path(local := tokenizer.removeprefix("hf:")).exists():  # found from any folder later
        tokenizer = tokenizer[: -len(local)] + str(Path(local).resolve())
    name, path = locate(source)
    folder = DATA / name
    most = HUB[name][3] if name in HUB else 1
    if not 1 <= shards <= most:
        raise InputError(f"--shards {shards}: {source} has {most}" + " (it is for c4)" * (most == 1))
    check_replaceable(folder, path)
    new = {file: folder / f"{file}.{os.getpid()}.tmp" for file in ("train.bin", "val.bin", "meta.json")}
    dtype = next(t for t in ("uint8", "uint16", "uint32") if encoder.n_vocab - 1 <= np.iinfo(t).max)
    sha256 = hashlib.sha256()
    try:
        description, *splits = find_parts(name, path, glob, shards)
        meta = {"name": name, "source": description, "tokenizer": tokenizer, "vocab_size": encoder.n_vocab, "dtype": dtype}
        meta["source_bytes"] = sum(path.stat().st_size for path in {part.path for split in splits for part in split})
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):  # by a preparation that was killed
            left.unlink()
        with tqdm(total=meta["source_bytes"], unit="B", unit_scale=True, desc=f"tokenizing {name}") as bar:
            for split, parts in zip(("train", "val"), splits):
                n_tokens = n_bytes = 0
                with open(new[f"{split}.bin"], "wb") as file:
                    for tokens, length in tokenize(parts, encoder, dtype, bar):
                        file.write(tokens)
                        sha256.update(tokens)
                        n_tokens, n_bytes = n_tokens + len(tokens), n_bytes + length
                if n_tokens == 0:
                    raise InputError(f"{description} is too short to be split into training and validation text")
                meta |= {f"{split}_tokens": n_tokens, f"{split}_bytes": n_bytes}
        meta["bytes_per_token"] = (meta["train_bytes"] + meta["val_bytes"]) / (meta["train_tokens"] + meta["val_tokens"])
        meta["sha256"] = sha256.hexdigest()  # of train.bin followed by val.bin
        new["meta.json"].write_text(json.dumps(meta, indent=2) + "\n")
        (folder / "meta.json").unlink(missing_ok=True)
        for file, path in new.items():  # meta.json is the last
            path.replace(folder / file)
    except OSError as error:
        raise InputError(f"cannot prepare {folder}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            for path in new.values():
                path.unlink(missing_ok=True)
            folder.rmdir()  # which only an empty folder lets be done
    return name


def ensure(source: str) -> str:
    """The name of the data set for a NAME or PATH; if it is not there, it is made, with bytes as tokens."""
    if source == Path(source).name and (DATA / source / "meta.json").exists():
        return source
    name, path = locate(source)
    if path is None or not (DATA / name / "meta.json").exists():
        return prepare(source)
    if path != (DATA / name).resolve():
        meta = load(name)[0]
        if meta["source"] != str(path):
            raise InputError(f"data/{name} was prepared from another place; to replace it: prepare_data.py {source}")
        if path.is_file() and meta["source_bytes"] != path.stat().st_size:
            advice = f"run prepare_data.py {source}, or use the old text with --data {name}"
            raise InputError(f"{source} has changed since data/{name} was prepared: {advice}")
    return name


def load(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """(meta, train tokens, val tokens) of data/<name>, the tokens memory-mapped. Raises InputError."""
    folder = DATA / name
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for key, kind in META.items():
            if type(meta.get(key)) is not kind or kind is not str and not 0 < meta[key] < 2**63:
                raise ValueError(f"meta.json: {key} is {meta.get(key)!r}")
        if meta["dtype"] not in ("uint8", "uint16", "uint32"):
            raise ValueError(f"meta.json: dtype is {meta['dtype']!r}")
        arrays = []
        for split in ("train", "val"):
            path = folder / f"{split}.bin"
            expected = meta[f"{split}_tokens"] * np.dtype(meta["dtype"]).itemsize
            if path.stat().st_size != expected:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {expected}")
            arrays.append(np.memmap(path, meta["dtype"], "r"))
            if (highest := arrays[-1].max()) >= meta["vocab_size"]:
                raise ValueError(f"{path.name} holds the token {highest}, the last is {meta['vocab_size'] - 1}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder} is incomplete or damaged ({error}); run prepare_data.py again") from None
    return meta, *arrays


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # names of files may have characters that the console has not
        stream.reconfigure(errors="replace")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = f"{', '.join(NAMES)}, a folder, or a file: text or JSON lines, either also as .gz"
    parser.add_argument("source", nargs="?", default="stdlib", metavar="NAME|PATH", help=help)
    help = "bytes (default), gpt2, a .tiktoken file, or hf:NAME_OR_FOLDER, a tokenizer of the Hugging Face hub"
    parser.add_argument("--tokenizer", default="bytes", help=help)
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
