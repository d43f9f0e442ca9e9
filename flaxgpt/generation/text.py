"""Text -> its continuation, whole or as it comes: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from flaxgpt.config import GREEDY, GPTConfig, SamplingConfig
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.edits import Edits
from flaxgpt.errors import InputError
from flaxgpt.generation.generate import Completion, Request
from flaxgpt.generation.sampling import Function
from flaxgpt.types import Params

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
    params: Params,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    *,
    stop: Sequence[str] = (),
    key: jax.Array | None = None,
    eos_id: int | None = None,
    num_samples: int = 1,
    top_log_probs: int | None = None,
    functions: Sequence[Function] = (),
    edits: Edits | None = None,
) -> list[Text]:
    """Continue each prompt, all in one batch; `num_samples` continuations of one prompt are next to each other.

    The tokenizer is the one that the model was trained with; of a padded vocabulary, tokens that the tokenizer lacks are never chosen.
    Prompts are of any lengths, none of them empty; the text ends before the first of the `stop` strings. The other arguments are
    those of `flaxgpt.generation.generate.complete`.

    Raises:
        InputError: as `complete`, and for an empty stop string.
    """
    options = {"key": key, "eos_id": eos_id, "num_samples": num_samples, "top_log_probs": top_log_probs}
    options |= {"functions": functions, "edits": edits}
    request = Request.of(params, cfg, _encode(tokenizer, prompts, stop), max_new_tokens, _within(tokenizer, cfg, sampling), **options)
    readers = [Reader(tokenizer, stop, eos_id) for _ in request.prompts]
    texts = [""] * len(readers)
    for done in _progress(request, readers, every=_CHUNK if stop else max_new_tokens):
        for b, reader in enumerate(readers):
            texts[b] += reader.read(done.ids(b))
    return [_text(prompts[b // num_samples], texts[b] + reader.rest(), done, b, reader) for b, reader in enumerate(readers)]


def stream(
    params: Params,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: SamplingConfig = GREEDY,
    *,
    stop: Sequence[str] = (),
    key: jax.Array | None = None,
    eos_id: int | None = None,
    num_samples: int = 1,
    top_log_probs: int | None = None,
    functions: Sequence[Function] = (),
    edits: Edits | None = None,
) -> Generator[str, None, Text]:
    """Yield the continuation of one prompt piece by piece, as each token is chosen; return it whole.

    Arguments are those of `complete_text`.

    Raises:
        InputError: as `complete_text`, and for more than one sample.
    """
    options = {"key": key, "eos_id": eos_id, "num_samples": num_samples, "top_log_probs": top_log_probs}
    options |= {"functions": functions, "edits": edits}
    request = Request.of(params, cfg, _encode(tokenizer, [prompt], stop), max_new_tokens, _within(tokenizer, cfg, sampling), **options)
    if num_samples > 1:
        raise InputError(f"num_samples={num_samples}: one text can be streamed at a time")
    return _stream(request, Reader(tokenizer, stop, eos_id), prompt)


class Reader:
    """The tokens of one row -> its text, as far as it is certain. The end token has no text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), eos_id: int | None = None) -> None:
        self._tokenizer, self._stop, self._eos_id = tokenizer, stop, eos_id
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps back the bytes of half a character
        self._held = ""  # the end of the text, while it could be the beginning of a stop string
        self.n_read = 0
        self.stopped = False  # whether a stop string was found

    def read(self, ids: list[int]) -> str:
        """What is new in the text, given all the row's tokens so far."""
        text = ""
        for i in ids[self.n_read :]:
            if self.stopped:
                break
            self.n_read += 1
            if i != self._eos_id:
                text += self._add(self._utf8.decode(self._tokenizer.decode_bytes([i])))
        return text

    def rest(self) -> str:
        """What was kept back until now, when no more tokens come."""
        text = "" if self.stopped else self._add(self._utf8.decode(b"", final=True))
        return text + self._held

    def _add(self, text: str) -> str:
        text = self._held + text
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        beginnings = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        certain = len(text) - max(beginnings, default=0)
        self._held = text[certain:]
        return text[:certain]


def _within(tokenizer: Tokenizer, cfg: GPTConfig, sampling: SamplingConfig) -> SamplingConfig:
    """The same settings, with the tokens banned that the model's vocabulary is padded with."""
    return sampling.replace(banned=(*sampling.banned, *range(tokenizer.vocab_size, cfg.vocab_size)))


def _encode(tokenizer: Tokenizer, prompts: Sequence[str], stop: Sequence[str]) -> list[list[int]]:
    if not all(stop):
        raise InputError("stop has an empty string, which every text begins with")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(ids):
        raise InputError("the prompt is empty: give at least one character")
    return ids


def _stream(request: Request, reader: Reader, prompt: str) -> Generator[str, None, Text]:
    pieces = []
    for done in _progress(request, [reader], every=1):
        pieces.append(reader.read(done.ids(0)))
        if pieces[-1]:
            yield pieces[-1]
    pieces.append(reader.rest())
    if pieces[-1]:
        yield pieces[-1]
    return _text(prompt, "".join(pieces), done, 0, reader)


def _progress(request: Request, readers: list[Reader], every: int) -> Generator[Completion, None, None]:
    """What there is after each `every` tokens, until every row has ended, by the end token or where its reader stopped."""
    n = min(every, request.max_new_tokens)
    state = request.decode(request.prefill(), n) if n else None
    while True:
        done = request.completion(state)
        yield done
        stopped_B = np.array([reader.stopped for reader in readers])
        if n == request.max_new_tokens or (done.ended_B | stopped_B).all():
            return
        n = min(n + every, request.max_new_tokens)
        state = request.decode(state.end(stopped_B), n)


def _text(prompt: str, text: str, done: Completion, b: int, reader: Reader) -> Text:
    n, log_probs, top = reader.n_read, None, None
    if done.log_probs_BT is not None:
        log_probs = done.log_probs_BT[b, :n].tolist()
        pairs = zip(done.top_ids_BTK[b, :n].tolist(), done.top_log_probs_BTK[b, :n].tolist(), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in pairs]
    finish = "stop" if reader.stopped else "eos" if done.ended_B[b] else "length"
    return Text(prompt, text, done.ids_BT[b, :n].tolist(), finish, log_probs, top)
