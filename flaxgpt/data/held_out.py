"""What a model is evaluated on, as the model's tokens: texts, one split of a corpus, or a file of tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from flaxgpt.data.corpora import load_corpus, read_text, text_files
from flaxgpt.data.token_files import Tokens, check_ids, open_tokens
from flaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from flaxgpt.errors import InputError


def tokens_of_texts(paths: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of texts, one after the other with the tokenizer's separator between them, uint16.

    Args:
        paths: text files, folders of .txt files, or - for standard input.
        tokenizer: the model's.

    Raises:
        InputError: one is not there, not UTF-8 or has characters that the tokenizer lacks, or there is no text in them.
    """
    texts = [text for path in paths for text in _texts(path)]
    if not any(text.strip() for text in texts):
        raise InputError(f"{', '.join(paths)}: there is no text in it")
    return np.asarray(tokenizer.encode(tokenizer.separator.join(texts)), np.uint16)


def tokens_of_split(data: str, split: Literal["train", "val"], tokenizer: Tokenizer, train_ratio: float) -> Tokens:
    """The tokens of one split of a corpus, cut as for training, uint16 and memory-mapped.

    Args:
        data: as `flaxgpt.data.corpora.load_corpus` takes it.
        split: which part.
        tokenizer: the model's.
        train_ratio: the part of the characters that is the training split.

    Raises:
        InputError: as `load_corpus`; or the corpus has another tokenizer, or a split without tokens.
    """
    corpus = load_corpus(data, tokenizer.kind, train_ratio)
    _check_tokenizer(corpus.tokenizer, tokenizer, data, "pass its text with --text")
    tokens = getattr(corpus, split)
    if not len(tokens):
        raise InputError(f"{data}: there are no tokens in its split {split!r}")
    return tokens


def tokens_of_file(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a file of uint16 (nanoGPT's layout), memory-mapped.

    A tokenizer.json beside it says what they mean; where there is none, they are taken for the model's.

    Raises:
        InputError: it is not there, is empty, has an odd number of bytes, an id outside the vocabulary, or tokens of another tokenizer.
    """
    tokens = open_tokens(path)
    if not len(tokens):
        raise InputError(f"{path} is empty: expected tokens, uint16")
    if (beside := path.with_name("tokenizer.json")).is_file():
        _check_tokenizer(load_tokenizer(beside), tokenizer, str(path), "tokenize its text with the model's")
    check_ids(tokens, tokenizer.vocab_size, path)
    return tokens


def _texts(path: str) -> list[str]:
    if path == "-":
        try:
            return [sys.stdin.buffer.read().decode()]
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8 text") from None
    try:
        expanded = Path(path).expanduser()
        return [read_text(file) for file in (text_files(expanded) if expanded.is_dir() else [expanded])]
    except (OSError, RuntimeError) as error:  # as in load_corpus
        raise InputError(f"can't read {path} ({getattr(error, 'strerror', None) or error})") from None


def _check_tokenizer(found: Tokenizer, expected: Tokenizer, what: str, remedy: str) -> None:
    if found.to_dict() != expected.to_dict():
        theirs, ours = ("of one alphabet", "another alphabet") if found.kind == expected.kind else (repr(found.kind), repr(expected.kind))
        raise InputError(f"the tokens of {what} have the tokenizer {theirs}, the model has {ours}: {remedy}")
