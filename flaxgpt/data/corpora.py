"""A corpus, by name or path, as two files of tokens on disk: tokenized once, memory-mapped after that."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxgpt.data.token_files import Tokens, open_split, split_files
from flaxgpt.data.tokenizer import CharTokenizer, Tokenizer, get_tokenizer, load_tokenizer
from flaxgpt.errors import InputError

CACHE_VARIABLE = "FLAXGPT_CACHE"
"""Environment variable that moves the cache folder (default: ~/.cache/flaxgpt)."""


@dataclass(frozen=True)
class Corpus:
    """Tokens of both splits, uint16 and memory-mapped, and the tokenizer they came from."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer

    def fingerprint(self, *, scattered: bool = False) -> str:
        """Lengths, and hashes of up to a million tokens spread over each split, as JSON: enough to notice another text.

        Of a split with more, they are 16 pieces of 65536 tokens, so that little is read. `scattered`: single ones, as up to version 0.4,
        for which all is read.
        """
        splits = {}
        for name, tokens in (("train", self.train), ("val", self.val)):
            n = len(tokens)
            if scattered or n < 2**20:
                pieces = [tokens[:: n // 2**20 + 1]]
            else:
                pieces = [tokens[start : start + 2**16] for start in (i * (n - 2**16) // 15 for i in range(16))]
            splits[name] = {"tokens": n, "sha256": hashlib.sha256(np.concatenate(pieces)).hexdigest()}
        return json.dumps(splits, indent=2) + "\n"


def load_corpus(data: str, tokenizer: str, train_ratio: float) -> Corpus:
    """The tokens of a corpus, from the cache if this text was tokenized before.

    Args:
        data: a name (pydoc, or one of DOWNLOADS), a text file, a folder of .txt files, or a folder with
            train.bin and val.bin, or shards of them (see `flaxgpt.data.token_files.open_split`). They are used as they are; tokenizer.json
            beside them says what their tokens mean.
        tokenizer: "gpt2" or "char".
        train_ratio: the part of the characters, from the start, that is the training split.

    Raises:
        InputError: no such corpus, no network to fetch it, or a text that is empty or not UTF-8.
    """
    try:
        if data not in NAMES and split_files(Path(data).expanduser(), "train"):
            return _open_tokens(Path(data).expanduser(), tokenizer)
        documents = _documents(data)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, or no such user's home
        raise InputError(f"can't read {data} ({getattr(error, 'strerror', None) or error})") from None
    text = (CharTokenizer if tokenizer == "char" else get_tokenizer(tokenizer)).separator.join(documents)
    if not text.strip():
        raise InputError(f"{data} holds no text")
    key = hashlib.sha256(f"{tokenizer} {train_ratio} ".encode() + text.encode()).hexdigest()
    folder = cache_dir() / "tokens" / key[:16]
    if not folder.is_dir():
        _write_tokens(folder, text, CharTokenizer(text) if tokenizer == "char" else get_tokenizer(tokenizer), train_ratio)
    return _open_tokens(folder, tokenizer)


def cache_dir() -> Path:
    """Where downloads and tokens are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/flaxgpt").expanduser()


DOWNLOADS = {
    "the-verdict": (
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    "tinyshakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
"""Name -> (address, sha256) of the corpora that are fetched once."""

NAMES = ("pydoc", *DOWNLOADS)
"""Every corpus that has a name."""


def download(name: str) -> Path:
    """The file of a named corpus: the one in the cache, else fetched, checked and put there.

    Raises:
        InputError: it can't be fetched, or what is in the cache or came is not the expected file.
    """
    url, expected = DOWNLOADS[name]
    target = cache_dir() / f"{name}.txt"
    if not target.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                body = reply.read()
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise InputError(f"could not fetch {name} from {url} ({reason}); put the file at {target}, or use --data pydoc") from None
        if hashlib.sha256(body).hexdigest() != expected:
            raise InputError(f"what {url} sent is not the expected {name} (sha256 differs); put the right file at {target}")
        _atomically(target, lambda path: path.write_bytes(body))
    elif hashlib.sha256(target.read_bytes()).hexdigest() != expected:
        raise InputError(f"{target} is not the expected {name} (sha256 differs); delete it to fetch it again")
    return target


def _documents(data: str) -> list[str]:
    path = Path(data).expanduser()
    if data == "pydoc":
        return _pydoc()
    if data in DOWNLOADS:
        return [read_text(download(data))]
    if path.is_file():
        return [read_text(path)]
    if path.is_dir():
        return [read_text(file) for file in text_files(path)]
    raise InputError(f"no corpus {data!r}: expected one of {', '.join(NAMES)}, a text file, or a folder of .txt files")


def text_files(folder: Path) -> list[Path]:
    """The .txt files in a folder and in those within it, sorted.

    Raises:
        InputError: there are none.
    """
    if files := sorted(folder.rglob("*.txt")):
        return files
    raise InputError(f"the folder {folder} holds no .txt files, nor train.bin and val.bin")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it is not UTF-8.
        OSError: it can't be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); convert it first") from None


def _pydoc() -> list[str]:
    """The prose of Python's own language reference, which every installation carries: about 250,000 characters.

    Grammar, examples, tables and repeated paragraphs are left out. The text differs a little between Python versions.
    """
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n"))
    prose = [p for p in paragraphs if re.fullmatch(r"[A-Z*].*[.:)]", p) and "::=" not in p and ">>>" not in p]
    # One kind of quotation mark, dash and so on keeps the alphabet to printable ASCII: 95 characters at most.
    plain = "\n\n".join(prose).translate(str.maketrans("‘’“”–—…", "''\"\"--."))
    return [plain.encode("ascii", "ignore").decode()]


def _write_tokens(folder: Path, text: str, tokenizer: Tokenizer, train_ratio: float) -> None:
    cut = int(train_ratio * len(text))

    def write(path: Path) -> None:
        path.mkdir()
        for name, part in (("train", text[:cut]), ("val", text[cut:])):
            np.asarray(tokenizer.encode(part), dtype=np.uint16).tofile(path / f"{name}.bin")
        (path / "tokenizer.json").write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")

    _atomically(folder, write)


def _open_tokens(folder: Path, tokenizer: str) -> Corpus:
    described = folder / "tokenizer.json"
    loaded = load_tokenizer(described) if described.is_file() else get_tokenizer("gpt2")
    if loaded.kind != tokenizer:
        raise InputError(f"the tokens in {folder} are of the tokenizer {loaded.kind!r}, not {tokenizer!r}: pass --tokenizer {loaded.kind}")
    splits = (open_split(folder, name, loaded.vocab_size) for name in ("train", "val"))
    return Corpus(*splits, loaded)


def _atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary path beside the target, then rename it: the target is whole or absent."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as scratch:
            write(Path(scratch) / target.name)
            if not target.exists():  # another process may have been faster
                (Path(scratch) / target.name).rename(target)
    except OSError as error:
        raise InputError(f"can't write {target} ({error.strerror}); {CACHE_VARIABLE} moves the cache folder") from None
