"""The files of tokenizers: Hugging Face's for GPT-2's and for one of characters, and nanoGPT's meta.pkl; read and written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from flaxgpt.data.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer, Tokenizer, gpt2_files
from flaxgpt.errors import InputError


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder: GPT-2's, or one of characters as `tokenizer_files` writes it.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt; with none of them, `guess_tokenizer` decides.
        vocab_size: of the model; more than the tokenizer has where it is padded.

    Raises:
        InputError: it is another tokenizer, one of more tokens than the model has, or its files are damaged.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")):
        return guess_tokenizer(vocab_size)
    tokenizer: Tokenizer = GPT2Tokenizer()
    expected, name = _gpt2_json(), "tokenizer.json"
    try:
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if found["model"].get("type") == "WordLevel":
                tokenizer = CharTokenizer("".join(found["model"]["vocab"]))
                expected = _char_json(tokenizer)
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
        raise InputError(f"{folder / name} is not GPT-2's tokenizer, nor one of characters as flaxgpt writes it: no other one is read")
    if tokenizer.vocab_size > vocab_size:
        raise InputError(f"{folder / name} has {tokenizer.vocab_size} tokens, but the model's vocab_size is {vocab_size}")
    return tokenizer


def guess_tokenizer(vocab_size: int) -> Tokenizer | None:
    """GPT-2's tokenizer for a model with as many tokens, or padded to 50304 of them as nanoGPT pads it; else none."""
    return GPT2Tokenizer() if vocab_size in (GPT2Tokenizer.vocab_size, 50304) else None


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files from which `transformers` makes the same tokenizer, name -> content."""
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    if isinstance(tokenizer, CharTokenizer):
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {"tokenizer.json": json.dumps(_char_json(tokenizer)), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    merges, vocab = (path.read_text(encoding="utf-8") for path in gpt2_files())
    config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "vocab.json": vocab,
        "merges.txt": merges,
        "tokenizer.json": json.dumps(_gpt2_json(), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def read_meta(path: Path) -> CharTokenizer:
    """The vocabulary of characters in a meta.pkl, of which nothing is executed.

    Raises:
        InputError: the file is not there or damaged, holds anything but plain values, or no characters numbered in their order.
    """
    try:
        with path.open("rb") as file:
            meta = _Plain(file).load()
        chars = "".join(sorted(meta["stoi"], key=meta["stoi"].get))
        whole = meta["stoi"] == {char: i for i, char in enumerate(chars)} and meta["itos"] == dict(enumerate(chars))
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(f"{path} is not a nanoGPT vocabulary of characters that can be read safely ({error})") from None
    tokenizer = CharTokenizer(chars)
    if not whole or tokenizer.chars != chars:
        raise InputError(f"{path}: expected single characters, numbered in code point order, by stoi and itos alike")
    return tokenizer


def meta_bytes(tokenizer: CharTokenizer) -> bytes:
    """The inverse of `read_meta`: what nanoGPT's `prepare.py` writes for this vocabulary."""
    itos = dict(enumerate(tokenizer.chars))
    return pickle.dumps({"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": {char: i for i, char in itos.items()}})


class _Plain(pickle.Unpickler):
    """Builds dicts, strings and numbers, for which a pickle needs no name of anything to call."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are read")

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("it refers to what is outside")


def _char_json(tokenizer: CharTokenizer) -> dict[str, Any]:
    """A tokenizer of characters as the package `tokenizers` writes it; a character that it has not is an error there too."""
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    vocab = {char: i for i, char in enumerate(tokenizer.chars)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": each,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},  # it is not in the vocabulary
    }


def _gpt2_json() -> dict[str, Any]:
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
    tokens = model["vocab"] | {token["content"]: token["id"] for token in values["added_tokens"]}
    if model.get("type") == "WordLevel":
        return tokens, values["normalizer"], before, values["decoder"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    adds = None if (after := values.get("post_processor")) is None or after["type"] == "ByteLevel" else after  # tokens around a text
    return (
        tokens,
        merges,
        adds,
        model.get("dropout"),
        values["normalizer"],
        before["type"],
        before["add_prefix_space"],
        before.get("use_regex", True),
    )


def _merges(text: str) -> list[str]:
    """The merges, in their order, of a merges.txt."""
    return [line for line in text.split("\n") if line and not line.startswith("#version")]
