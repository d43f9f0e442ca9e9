"""Text as it comes: whole characters, stop strings over several tokens, the same text as when it comes at once."""

import jax
import pytest
from conftest import SMALL, random_pair
from hypothesis import given
from hypothesis import strategies as st

from flaxgpt.config import GREEDY, SamplingConfig
from flaxgpt.data.tokenizer import CharTokenizer, GPT2Tokenizer
from flaxgpt.generation.decode import unstack
from flaxgpt.generation.text import Reader, complete_text, stream

CHARS = CharTokenizer("".join(map(chr, [*range(32, 127), 0xDF, 0x20AC])))  # 97 of them, as many as SMALL has tokens


class Bytes:
    """A tokenizer of single bytes: most characters take several tokens."""

    def decode_bytes(self, ids):
        return bytes(ids)


@pytest.fixture(scope="module")
def model():
    return unstack(random_pair(SMALL)[1], SMALL), SMALL, CHARS


def test_this_many_characters_are_needed():
    assert CHARS.vocab_size == SMALL.vocab_size


@given(st.text(), st.text(min_size=1, max_size=4))
def test_pieces_are_whole_characters_and_end_before_the_stop_string(text, stop):
    for whole in (text, text + stop + text):
        reader, ids = Reader(Bytes(), [stop]), list(whole.encode())
        pieces = [reader.read(ids[: n + 1]) for n in range(len(ids))]
        assert "".join(pieces) + reader.rest() == whole.split(stop)[0]
        assert reader.stopped == (stop in whole)


def test_a_character_waits_for_its_last_byte_and_a_stop_string_for_its_end():
    euro = list("€".encode())
    reader = Reader(Bytes(), ["END"])
    pieces = [reader.read(ids) for ids in (euro[:1], euro[:2], euro, [*euro, *b"E"], [*euro, *b"EN"], [*euro, *b"EN!"])]
    assert pieces == ["", "", "€", "", "", "EN!"]
    unfinished = Reader(Bytes())
    assert unfinished.read(euro[:2]) == ""
    assert unfinished.rest() == "�"


def test_tokens_after_the_one_that_completes_a_stop_string_are_not_read():
    reader = Reader(Bytes(), ["ab", "zz"])
    assert reader.read(list(b"xyzabc")) == "xyz"
    assert (reader.n_read, reader.stopped, reader.rest()) == (5, True, "")


def test_gpt2_tokens_that_split_a_character_are_joined():
    tokenizer = GPT2Tokenizer()
    ids = tokenizer.encode("naïve 日本 🙂")
    assert "�" in "".join(tokenizer.decode([i]) for i in ids), "a case in which tokens are parts of characters"
    reader = Reader(tokenizer)
    assert "".join(reader.read(ids[: n + 1]) for n in range(len(ids))) == "naïve 日本 🙂"


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig()], ids=["greedy", "drawn"])
def test_a_stream_is_the_text_that_comes_at_once(model, sampling):
    options = {"sampling": sampling, "key": jax.random.key(1)}
    (whole,) = complete_text(*model, ["To be"], 40, **options)
    assert (len(whole.ids), whole.finish, whole.text) == (40, "length", CHARS.decode(whole.ids))
    pieces = stream(*model, "To be", 40, **options)
    assert "".join(pieces) == whole.text
    for stop in (whole.text[:1], whole.text[9:12], whole.text[-2:]):
        (cut,) = complete_text(*model, ["To be"], 40, stop=[stop], **options)
        assert (cut.text, cut.finish) == (whole.text.split(stop)[0], "stop")
        assert cut.ids == whole.ids[: len(cut.text + stop)]
        assert "".join(stream(*model, "To be", 40, stop=[stop], **options)) == cut.text


def test_rows_of_a_batch_stop_each_for_itself(model):
    free = complete_text(*model, ["a", "Some more", "xyz"], 40)
    stop, eos = free[0].text[5:7], free[1].ids[20]
    cut = complete_text(*model, ["a", "Some more", "xyz"], 40, stop=[stop], eos_id=eos, top_log_probs=2)
    for row, wanted in zip(cut, free, strict=True):
        n = len(row.ids)
        assert row.ids == wanted.ids[:n]
        assert len(row.log_probs) == len(row.top) == n
        assert row.top[0][0] == (row.ids[0], pytest.approx(row.log_probs[0])), "greedy: the likeliest is the chosen one"
        ends = {"stop": row.text + stop == CHARS.decode(row.ids), "eos": row.ids[-1] == eos, "length": n == 40}
        assert ends[row.finish]
    assert cut[0].finish != "length"


def test_the_whole_text_is_what_a_stream_returns(model):
    def collect():
        text = yield from stream(*model, "To be", 10)
        results.append(text)

    results = []
    pieces = list(collect())
    assert results[0].text == "".join(pieces)
    assert results == complete_text(*model, ["To be"], 10)
    assert list(stream(*model, "To be", 0)) == []
    assert complete_text(*model, ["To be"], 0)[0].text == ""


@pytest.mark.parametrize(
    ("options", "named"), [({"stop": [""]}, "stop"), ({"num_samples": 2}, "num_samples"), ({"prompt": ""}, "prompt")], ids=str
)
def test_bad_arguments_are_refused_before_anything_is_read(model, options, named):
    with pytest.raises(ValueError, match=named):
        stream(*model, **{"prompt": "To be", "max_new_tokens": 5} | options)
