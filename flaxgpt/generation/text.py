"""Text -> its continuation, whole or as it comes: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flaxgpt.config import GPTConfig
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.generation.generate import Completion, Request

_CHUNK = 32  # Tokens decoded between two looks at the text, where nobody reads along but a stop string is to be found.


@dataclass(frozen=True)
class Text:
    """The continuation of one prompt."""

    prompt: str
    text: str
    """The new text, without the end token or the stop string."""
    ids: list[int]
    """The new tokens, with the end token, or those that completed the stop string."""
    finish: Literal["length", "eos", "stop"]
    log_probs: list[float] | None
    """Of each new token, under the model itself; if asked for, as the next one."""
    top: list[list[tuple[int, float]]] | None
    """For each new token the likeliest ones at its place, with their log-probabilities."""


def complete_text(
    params: Any,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> list[Text]:
    """Continue each prompt, all in one batch; `num_samples` continuations of one prompt are next to each other.

    Args:
        params: the model's parameters, stacked or `unstack`ed.
        cfg: the model's config.
        tokenizer: the one it was trained with.
        prompts: texts of any lengths, none of them empty.
        max_new_tokens: tokens to add to each.
        stop: the text ends before the first of these strings.
        **options: the other arguments of `flaxgpt.generation.generate.complete`.

    Raises:
        InputError: as `complete`, and for an empty stop string.
    """
    request = _request(params, cfg, tokenizer, prompts, max_new_tokens, stop, options)
    readers = [Reader(tokenizer, stop, options.get("eos_id")) for _ in request.prompts]
    texts = [""] * len(readers)
    done = request.completion(None)
    for done in _progress(request, readers, every=_CHUNK if stop else max_new_tokens):
        for b, reader in enumerate(readers):
            texts[b] += reader.read(done.ids(b))
    per_prompt = len(readers) // len(prompts)
    return [_text(prompts[b // per_prompt], texts[b] + reader.rest(), done, b, reader) for b, reader in enumerate(readers)]


def stream(
    params: Any, cfg: GPTConfig, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, *, stop: Sequence[str] = (), **options: Any
) -> Generator[str, None, Text]:
    """Yield the continuation of one prompt piece by piece, as each token is chosen; return it whole.

    Arguments and errors are those of `complete_text`.
    """
    request = _request(params, cfg, tokenizer, [prompt], max_new_tokens, stop, options)
    if len(request.prompts) > 1:
        raise InputError(f"num_samples={len(request.prompts)}: one text can be streamed at a time")
    return _stream(request, Reader(tokenizer, stop, options.get("eos_id")), prompt)


class Reader:
    """The tokens of one row -> its text, as far as it is certain."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), eos_id: int | None = None) -> None:
        self._tokenizer, self._stop, self._eos_id = tokenizer, stop, eos_id
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps back the bytes of half a character
        self._held = ""  # the end of the text, while it could be the beginning of a stop string
        self.n_read = 0
        self.finish: Literal["length", "eos", "stop"] = "length"

    def read(self, ids: list[int]) -> str:
        """What is new in the text, given all the row's tokens so far."""
        text = ""
        for i in ids[self.n_read :]:
            if self.finish != "length":
                break
            self.n_read += 1
            if i == self._eos_id:
                self.finish = "eos"
            else:
                text += self._add(self._utf8.decode(self._tokenizer.decode_bytes([i])))
        return text

    def rest(self) -> str:
        """What was kept back until now, when no more tokens come."""
        if self.finish == "stop":
            return ""
        text = self._add(self._utf8.decode(b"", final=True))
        return text if self.finish == "stop" else text + self._held

    def _add(self, text: str) -> str:
        text = self._held + text
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.finish, self._held = "stop", ""
            return text[: min(found)]
        beginnings = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        certain = len(text) - max(beginnings, default=0)
        self._held = text[certain:]
        return text[:certain]


def _request(
    params: Any, cfg: GPTConfig, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str], options: dict
) -> Request:
    if not all(stop):
        raise InputError("stop has an empty string, which every text begins with")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(ids):
        raise InputError("the prompt is empty: give at least one character")
    return Request.of(params, cfg, ids, max_new_tokens, **options)


def _stream(request: Request, reader: Reader, prompt: str) -> Generator[str, None, Text]:
    pieces = []
    done = request.completion(None)
    for done in _progress(request, [reader], every=1):
        pieces.append(reader.read(done.ids(0)))
        if pieces[-1]:
            yield pieces[-1]
    pieces.append(reader.rest())
    if pieces[-1]:
        yield pieces[-1]
    return _text(prompt, "".join(pieces), done, 0, reader)


def _progress(request: Request, readers: list[Reader], every: int) -> Generator[Completion, None, None]:
    """What there is after each `every` tokens, until all the rows' readers have seen their end."""
    if not request.max_new_tokens:
        return
    n = min(every, request.max_new_tokens)
    state = request.decode(request.prefill(), n)
    while True:
        yield request.completion(state)
        ended = [reader.finish != "length" for reader in readers]
        if n == request.max_new_tokens or all(ended):
            return
        n = min(n + every, request.max_new_tokens)
        state = request.decode(request.stopped(state, ended), n)


def _text(prompt: str, text: str, done: Completion, b: int, reader: Reader) -> Text:
    n, log_probs, top = reader.n_read, None, None
    if done.log_probs_BT is not None:
        log_probs = done.log_probs_BT[b, :n].tolist()
        pairs = zip(done.top_ids_BTK[b, :n].tolist(), done.top_log_probs_BTK[b, :n].tolist(), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in pairs]
    return Text(prompt, text, done.ids_BT[b, :n].tolist(), reader.finish, log_probs, top)
