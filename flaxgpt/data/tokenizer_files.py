"""The files of a Hugging Face tokenizer: recognising GPT-2's, and writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flaxgpt.data.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer, gpt2_files
from flaxgpt.errors import InputError


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, which must be GPT-2's.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt; with none of them, the size of the vocabulary decides.
        vocab_size: of the model.

    Raises:
        InputError: it is another tokenizer, or its files are damaged.
    """
    if vocab_size != GPT2Tokenizer.vocab_size:
        raise InputError(f"{folder}: vocab_size is {vocab_size}; of Hugging Face's tokenizers only GPT-2's is read, with 50257 tokens")
    expected, name = _tokenizer_json(), "tokenizer.json"
    try:
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            same = _meaning(found) == _meaning(expected)
        else:
            name = "vocab.json"
            same = not (folder / name).is_file() or json.loads((folder / name).read_text(encoding="utf-8")) == expected["model"]["vocab"]
            if same and (folder / "merges.txt").is_file():
                name = "merges.txt"
                same = _merges((folder / name).read_text(encoding="utf-8")) == expected["model"]["merges"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / name} does not describe a tokenizer ({type(error).__name__}: {error})") from None
    if not same:
        raise InputError(f"{folder / name} is not GPT-2's tokenizer, the only one of Hugging Face's that is read")
    return GPT2Tokenizer()


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files from which `transformers` makes GPT-2's tokenizer, name -> content; none for another tokenizer."""
    if tokenizer.kind != GPT2Tokenizer.kind:
        return {}
    merges, vocab = (path.read_text(encoding="utf-8") for path in gpt2_files())
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": 10**30}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "vocab.json": vocab,
        "merges.txt": merges,
        "tokenizer.json": json.dumps(_tokenizer_json(), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _tokenizer_json() -> dict[str, Any]:
    """GPT-2's tokenizer as the package `tokenizers` writes it."""
    merges, vocab = (path.read_text(encoding="utf-8") for path in gpt2_files())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 50256, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": model | {"vocab": json.loads(vocab), "merges": _merges(merges)},
    }


def _meaning(values: dict[str, Any]) -> tuple[Any, ...]:
    """What decides which ids a text has."""
    model, before = values["model"], values["pre_tokenizer"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = model["vocab"] | {token["content"]: token["id"] for token in values["added_tokens"]}
    return tokens, merges, values["normalizer"], before["type"], before["add_prefix_space"], before.get("use_regex", True)


def _merges(text: str) -> list[str]:
    """The merges, in their order, of a merges.txt."""
    return [line for line in text.split("\n") if line and not line.startswith("#version")]
