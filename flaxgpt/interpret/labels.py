"""Token ids <-> how they are shown and typed: spaces visible, nothing that a terminal or a picture could swallow."""

from __future__ import annotations

import unicodedata

from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.errors import InputError

SPACE = "␣"
_ESCAPES = {" ": SPACE, "\n": r"\n", "\r": r"\r", "\t": r"\t", "\\": r"\\"}


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    r"""How a token is shown; no two tokens are shown alike.

    A space is ␣. After a backslash: n, r, t as in Python; xe2, a byte that is no whole character; u2028, a character that can't be seen
    (or that would change another one, or is ␣ itself); #50300, the id of a token that the model has and the tokenizer has not.

    Args:
        tokenizer: what the ids mean.
        token_id: at least 0.
    """
    if token_id >= tokenizer.vocab_size:
        return rf"\#{token_id}"
    text = tokenizer.decode_bytes([token_id]).decode("utf-8", errors="surrogateescape")
    return "".join(_shown(char, first=i == 0) for i, char in enumerate(text))


def token_labels(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, ...]:
    """The labels of all tokens of a model, whose vocabulary may be larger than the tokenizer's: it is padded then."""
    return tuple(token_label(tokenizer, i) for i in range(vocab_size))


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The token that is this text.

    Raises:
        InputError: it is none, or several, which are shown; or characters that the tokenizer does not know.
    """
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise InputError("the token is empty: give the text of one token")
    pieces = " ".join(token_label(tokenizer, i) for i in ids)
    hint = "; with a space before it, it is one" if tokenizer.kind == "gpt2" and len(tokenizer.encode(f" {text}")) == 1 else ""
    raise InputError(f"{text!r} is {len(ids)} tokens, not one: {pieces}{hint}")


def _shown(char: str, *, first: bool) -> str:
    code = ord(char)
    if char in _ESCAPES:
        return _ESCAPES[char]
    if 0xDC80 <= code <= 0xDCFF:  # where "surrogateescape" puts a byte that is not UTF-8
        return rf"\x{code - 0xDC00:02x}"
    joins = first and unicodedata.category(char).startswith("M")  # it would be drawn over what stands before the label
    if char.isprintable() and char != SPACE and not joins:
        return char
    return rf"\x{code:02x}" if code < 0x80 else rf"\u{code:04x}" if code < 0x10000 else rf"\U{code:08x}"
