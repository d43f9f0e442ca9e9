import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxgpt.data.tokenizer import CharTokenizer, get_tokenizer, load_tokenizer


@settings(deadline=None, derandomize=True)  # the first call loads the vocabulary
@given(st.text())
def test_gpt2_round_trips_any_text(text):
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_gives_the_published_ids():
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.encode(" coffee") == [6891]
    assert len(tokenizer.encode("I think more people would eat tumeric if it were purple.")) == 13


def test_end_of_text_is_one_token():
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert tokenizer.decode([64, 50256, 65]) == "a<|endoftext|>b"


def test_characters_are_numbered_in_code_point_order():
    tokenizer = CharTokenizer("banana\n")
    assert tokenizer.chars == "\nabn"
    assert tokenizer.encode("nab") == [3, 1, 2]
    assert tokenizer.decode([3, 1, 2]) == "nab"


def test_unknown_characters_and_ids_are_named():
    with pytest.raises(ValueError, match="'xz'"):
        CharTokenizer("abc").encode("axz")
    with pytest.raises(ValueError, match=r"\[3, -1\]"):
        CharTokenizer("abc").decode([0, 3, -1])
    with pytest.raises(ValueError, match=r"\[50257\]"):
        get_tokenizer("gpt2").decode([50257])


@pytest.mark.parametrize("tokenizer", [get_tokenizer("gpt2"), CharTokenizer("größe 你好")], ids=["gpt2", "char"])
def test_a_saved_tokenizer_comes_back(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer.to_dict()), encoding="utf-8")
    assert load_tokenizer(path).encode("öß") == tokenizer.encode("öß")


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "sentencepiece"}', '{"kind": "char"}'])
def test_a_damaged_description_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(path)
