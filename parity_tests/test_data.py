import io
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.data import corpora as corpus
from flaxgpt.data.loader import eval_batches, train_batches
from flaxgpt.data.windows import Windows
from torch_ref.data.loader import create_dataloaders

TOKENS = np.arange(100, dtype=np.uint16)


def run_config(**fields) -> TrainConfig:
    model = GPTConfig(vocab_size=100, context_length=8, emb_dim=8, n_heads=2, n_layers=1)
    return TrainConfig(**{"model": model, "batch_size": 3, **fields})


@pytest.mark.parametrize("length", [0, 4, 5, 8, 9, 12, 13, 100])
@pytest.mark.parametrize("stride", [1, 3, 4, 7])
def test_windows_start_a_stride_apart_and_their_targets_are_one_token_later(length, stride):
    windows = Windows(TOKENS[:length], 4, stride)
    starts = range(0, length - 4, stride)
    assert len(windows) == len(starts)
    for i, start in enumerate(starts):
        inputs, targets = windows[i]
        assert inputs.dtype == targets.dtype == np.int32
        assert inputs.tolist() == list(range(start, start + 4))
        assert targets.tolist() == list(range(start + 1, start + 5))


def test_a_batch_is_a_function_of_seed_and_step():
    cfg = run_config(stride=1)
    one, two = train_batches(TOKENS, cfg), train_batches(TOKENS, cfg)
    for step in (40, 3, 0):  # in any order
        np.testing.assert_array_equal(one[step], two[step])
    assert not np.array_equal(one[0], train_batches(TOKENS, cfg.replace(seed=7))[0])


@pytest.mark.parametrize("drop_last", [True, False])
def test_every_epoch_visits_every_window_once_in_another_order(drop_last):
    cfg = run_config(stride=1, drop_last=drop_last)  # 92 windows in batches of 3
    batches = train_batches(TOKENS, cfg)
    starts = [int(window[0]) for step in range(92) for window in batches[step][0]]
    size = 90 if drop_last else 92
    epochs = [starts[i : i + size] for i in range(0, 3 * size, size)]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [b.shape for b in batches[31]] == [(3, 8), (3, 8)]


def test_without_shuffling_the_order_is_that_of_the_text():
    batches = train_batches(TOKENS, run_config(shuffle=False))
    assert batches[0][0][:, 0].tolist() == [0, 8, 16]
    assert batches[1][0][:, 0].tolist() == [24, 32, 40]


def test_evaluation_takes_all_batches_if_there_are_fewer():
    cfg = run_config(eval_batches=100)
    assert len(eval_batches(TOKENS, cfg, "training")) == 4  # 12 windows
    assert len(eval_batches(TOKENS, cfg.replace(eval_batches=2), "validation")) == 2
    (inputs, _), *more = eval_batches(TOKENS[:20], cfg, "validation")
    assert inputs.shape == (2, 8), "a split of two windows is one batch of two"
    assert not more


def test_torch_loaders_hold_the_same_windows():
    cfg = run_config()
    train, val = create_dataloaders(TOKENS, TOKENS[:20], cfg)
    ours = sorted(int(w[0]) for step in range(4) for w in train_batches(TOKENS, cfg)[step][0])
    assert sorted(int(w[0]) for inputs, _ in train for w in inputs) == ours
    assert [inputs.shape for inputs, _ in val] == [torch.Size([2, 8])]
    assert {side.dtype for batch in (*train, *val) for side in batch} == {torch.int64}
    assert {side.dtype for side in train_batches(TOKENS, cfg)[0]} == {np.dtype(np.int32)}


def test_a_text_shorter_than_one_window_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"training split has 8 tokens.*context_length"):
        train_batches(TOKENS[:8], run_config())
    with pytest.raises(ValueError, match=r"validation split has 3 tokens"):
        eval_batches(TOKENS[:3], run_config(), "validation")
    with pytest.raises(ValueError, match=r"2 windows, fewer than batch_size=3"):
        train_batches(TOKENS[:20], run_config())


def test_pydoc_is_plain_english_prose(private_cache):
    data = corpus.load_corpus("pydoc", "char", 0.9)
    text = data.tokenizer.decode(data.train[:].tolist())
    assert len(text) > 100_000
    assert set(text) <= {"\n", *map(chr, range(32, 127))}
    assert sum(char.isalpha() or char == " " for char in text) / len(text) > 0.85


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_the_split_is_by_characters_and_tokenizing_happens_once(tokenizer, private_cache, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("Every effort moves you. " * 10, encoding="utf-8")
    first = corpus.load_corpus(str(path), tokenizer, 0.75)
    text = path.read_text()
    assert first.tokenizer.decode(first.train[:].tolist()) == text[: int(0.75 * len(text))]
    assert first.tokenizer.decode(first.val[:].tolist()) == text[int(0.75 * len(text)) :]
    monkeypatch.setattr(corpus, "_write_tokens", lambda *_: pytest.fail("tokenized again"))
    again = corpus.load_corpus(str(path), tokenizer, 0.75)
    np.testing.assert_array_equal(again.train[:], first.train[:])
    assert isinstance(again.train[:], np.memmap)


def test_a_folder_of_texts_is_joined_by_the_end_of_text_token(private_cache, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two")
    data = corpus.load_corpus(str(tmp_path), "gpt2", 0.99)
    assert data.tokenizer.decode([*data.train[:], *data.val[:]]).startswith("one<|endoftext|>tw")


def test_a_folder_of_token_files_is_used_as_it_is(private_cache, tmp_path):
    for name in ("train", "val"):
        TOKENS.tofile(tmp_path / f"{name}.bin")
    data = corpus.load_corpus(str(tmp_path), "gpt2", 0.9)
    np.testing.assert_array_equal(data.train[:], TOKENS)
    assert not private_cache.exists()
    with pytest.raises(ValueError, match="--tokenizer gpt2"):
        corpus.load_corpus(str(tmp_path), "char", 0.9)
    np.array([50257], np.uint16).tofile(tmp_path / "val.bin")
    data = corpus.load_corpus(str(tmp_path), "gpt2", 0.9)
    with pytest.raises(ValueError, match=r"val\.bin has the token id 50257 at token 0 \(byte 0\)"):
        _ = data.val[:]
    (tmp_path / "val.bin").unlink()
    with pytest.raises(ValueError, match=r"val\.bin is missing"):
        corpus.load_corpus(str(tmp_path), "gpt2", 0.9)


@pytest.mark.parametrize(("content", "message"), [(b"", "no text"), (b" \n", "no text"), (b"caf\xe9", "not UTF-8.*byte 3")])
def test_unusable_files_are_refused_and_leave_no_trace(content, message, private_cache, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.load_corpus(str(path), "gpt2", 0.9)
    assert not private_cache.exists()


def test_an_unknown_corpus_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="pydoc, the-verdict, tinyshakespeare"):
        corpus.load_corpus("nope", "gpt2", 0.9)
    with pytest.raises(ValueError, match=r"no \.txt files"):
        corpus.load_corpus(str(tmp_path), "gpt2", 0.9)


def test_a_download_is_checked_kept_and_not_repeated(private_cache, monkeypatch):
    body = b"some text"
    monkeypatch.setitem(corpus.DOWNLOADS, "the-verdict", ("https://example.invalid/x", corpus.hashlib.sha256(body).hexdigest()))
    calls = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: calls.append(url) or io.BytesIO(body))
    assert corpus.download("the-verdict").read_bytes() == body
    assert corpus.download("the-verdict").read_bytes() == body
    assert calls == ["https://example.invalid/x"]
    assert [p.name for p in private_cache.iterdir()] == ["the-verdict.txt"]


def test_a_download_that_is_another_file_is_refused_and_not_kept(private_cache, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
    with pytest.raises(ValueError, match="sha256 differs"):
        corpus.download("the-verdict")
    assert not private_cache.exists()


def test_no_network_is_one_clear_error(private_cache, monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"could not fetch tinyshakespeare.*put the file at .*tinyshakespeare\.txt"):
        corpus.download("tinyshakespeare")
    assert not private_cache.exists()


def test_a_damaged_file_in_the_cache_is_noticed(private_cache):
    private_cache.mkdir()
    (private_cache / "the-verdict.txt").write_text("other")
    with pytest.raises(ValueError, match="sha256 differs"):
        corpus.download("the-verdict")


def test_microbatches_do_not_decide_which_windows_are_evaluated():
    tokens = np.arange(22 * 16 + 1, dtype=np.uint16)
    cfg = TrainConfig(model=GPTConfig(context_length=16), batch_size=16)
    evaluated = [np.concatenate([x for x, _ in eval_batches(tokens, cfg.replace(grad_accum_steps=n), "validation")]) for n in (1, 2, 4, 8)]
    for other in evaluated[1:]:
        np.testing.assert_array_equal(other, evaluated[0])
