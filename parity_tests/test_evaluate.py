"""Evaluation: each number against the reference computed by hand, the guide's loop over transformers' model, and synthetic series."""

import io
import json
import math
import sys
from types import SimpleNamespace

import evaluate as script
import jax
import numpy as np
import pytest
import torch
from conftest import FLAGS, SMALL, TEXT, random_ids, random_pair, refused, refused_by_tyro, trained
from hugging_face import NARROW, make_model

from flaxgpt.checkpoint import load
from flaxgpt.config import GPTConfig
from flaxgpt.data.tokenizer import CharTokenizer, GPT2Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.evaluation.estimate import BLOCKS, BlockSums, ratio
from flaxgpt.evaluation.evaluate import byte_lengths, evaluate, scored_tokens
from flaxgpt.evaluation.windows import UNSCORED, SlidingWindows
from flaxgpt.model import init_params
from flaxgpt.run.cli import parse_train

ALPHABET = CharTokenizer("".join(map(chr, range(32, 32 + SMALL.vocab_size))))  # the last two of its characters have two bytes


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 10, 17, 40])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1), (7, 5)])
def test_every_token_but_the_first_is_scored_once_in_order_and_has_enough_before_it(length, context, stride):
    tokens = np.arange(1000, 1000 + length, dtype=np.uint16)
    windows = SlidingWindows(tokens, context=context, stride=stride, batch_size=3, multiple=4)
    batches = list(windows)
    assert len({inputs.shape + targets.shape for inputs, targets in batches}) == 1, "batches of several shapes are compiled several times"
    assert batches[0][0].shape[1] % 4 == 0
    scored = []
    for inputs_BT, targets_BT in batches:
        for b, t in np.argwhere(targets_BT != UNSCORED):
            seen = inputs_BT[b, : t + 1].tolist()
            target = int(targets_BT[b, t])
            assert seen == list(range(target - len(seen), target)), "what stands before a token is not what the text has there"
            assert len(seen) >= min(target - 1000, context - stride + 1)
            assert len(seen) <= context
            scored.append(target)
    assert scored == tokens[1:].tolist()


def test_the_loss_is_that_of_the_reference_computed_by_hand():
    model, params = random_pair(SMALL)
    tokens = random_ids(SMALL, (75,)).astype(np.uint16)
    context, stride = 12, 5
    result = evaluate(params, SMALL, ALPHABET, tokens, context=context, stride=stride, batch_size=4)
    losses = []
    with torch.no_grad():
        for target in range(1, 75):
            window = max(0, -(-(target - context) // stride))  # the first one that reaches it
            start = window * stride
            logits_BTV = model(torch.tensor(tokens[None, start:target].astype(np.int64)))
            losses.append(float(torch.nn.functional.cross_entropy(logits_BTV[0, -1].double(), torch.tensor(int(tokens[target])))))
    n_bytes = len(ALPHABET.decode_bytes(tokens[1:]))
    assert n_bytes > 74, "no character of two bytes was drawn, so that bytes and tokens can't be told apart"
    assert result.loss.value == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=3e-6)
    assert result.bits_per_byte.value == pytest.approx(np.sum(losses) / math.log(2) / n_bytes, rel=1e-6)
    assert (result.tokens, result.bytes, result.context, result.stride) == (74, n_bytes, 12, 5)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """transformers' model, small but for its vocabulary, and what flaxgpt loads from its folder."""
    folder = tmp_path_factory.mktemp("model")
    make_model(NARROW).save_pretrained(folder)
    return SimpleNamespace(model=make_model(NARROW), folder=folder, ours=load(folder))


@pytest.mark.parametrize("stride", [7, 22])
def test_transformers_and_the_loop_of_its_guide_give_the_same_numbers(gpt2, stride):
    """The guide's own average weighs a window by one token less than it averages over: both are compared."""
    params, cfg, tokenizer = gpt2.ours
    tokens = random_ids(cfg, (150,)).astype(np.uint16)
    input_ids = torch.tensor(tokens[None].astype(np.int64))
    max_length, seq_len, prev_end_loc = 24, 150, 0
    means, counts, guide_counts = [], [], []
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        target_ids = input_ids[:, begin_loc:end_loc].clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            means.append(float(gpt2.model(input_ids[:, begin_loc:end_loc], labels=target_ids).loss))
        counts.append(int((target_ids[:, 1:] != -100).sum()))
        guide_counts.append(int((target_ids != -100).sum()) - 1)
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    assert sum(counts) == 149
    result = evaluate(params, cfg, tokenizer, tokens, context=max_length - 1, stride=stride, batch_size=2)
    assert result.loss.value == pytest.approx(np.average(means, weights=counts), rel=1e-6)

    windows = SlidingWindows(tokens, context=max_length - 1, stride=stride, batch_size=2)
    losses = np.concatenate([losses_N for _, losses_N in scored_tokens(params, cfg, windows, cfg.vocab_size)])
    ours = [part.mean() for part in np.split(losses, np.cumsum(counts)[:-1])]
    assert np.average(ours, weights=guide_counts) == pytest.approx(np.average(means, weights=guide_counts), rel=1e-6)
    assert np.average(ours, weights=guide_counts) != pytest.approx(result.loss.value, rel=1e-6), "the weights make no difference here"


def test_batches_strides_of_the_whole_context_and_dtypes_change_what_they_should_only():
    _, params = random_pair(SMALL)
    tokens = random_ids(SMALL, (120,)).astype(np.uint16)
    one = evaluate(params, SMALL, ALPHABET, tokens, stride=4, batch_size=1)
    many = evaluate(params, SMALL, ALPHABET, tokens, stride=4, batch_size=50)
    assert many.loss.value == pytest.approx(one.loss.value, rel=1e-6)
    assert many.loss.standard_error == pytest.approx(one.loss.standard_error, rel=1e-4)
    disjoint = evaluate(params, SMALL, ALPHABET, tokens, stride=SMALL.context_length)
    assert disjoint.tokens == one.tokens == 119
    assert disjoint.loss.value != pytest.approx(one.loss.value, rel=1e-4)
    rounded = evaluate(params, SMALL.replace(dtype="bfloat16"), ALPHABET, tokens, stride=4)
    assert rounded.loss.value == pytest.approx(one.loss.value, rel=2e-2)
    assert rounded.loss.value != one.loss.value
    assert evaluate(params, SMALL.replace(drop_rate=0.5), ALPHABET, tokens, stride=4, batch_size=1).loss.value == one.loss.value


def test_what_pads_a_vocabulary_has_no_probability():
    cfg, (_, params) = SMALL.replace(vocab_multiple=64), random_pair(SMALL)
    padding = cfg.padded_vocab - cfg.vocab_size
    padded = params | {"tok_emb": {"embedding": np.pad(params["tok_emb"]["embedding"], ((0, padding), (0, 0)))}}
    padded["out_head"] = {"kernel": np.pad(params["out_head"]["kernel"], ((0, 0), (0, padding)))}
    tokens = random_ids(SMALL, (40,))
    assert evaluate(padded, cfg, ALPHABET, tokens).loss.value == pytest.approx(
        evaluate(params, SMALL, ALPHABET, tokens).loss.value, rel=1e-6
    )


def test_only_a_few_logits_are_held():
    """The compiled program has no buffer of the size of all logits."""
    from flaxgpt.evaluation.evaluate import _losses

    cfg = GPTConfig(vocab_size=50257, context_length=1024, emb_dim=8, n_heads=1, n_layers=1, drop_rate=0.0)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    rows_BT = jax.ShapeDtypeStruct((8, 1024), np.int32)
    memory = _losses.lower(params, cfg, rows_BT, rows_BT).compile().memory_analysis().temp_size_in_bytes
    assert memory < 8 * 1024 * 50257 * 4 / 1.5, f"{memory:,} bytes of temporaries, almost as much as all logits would take"


@pytest.mark.parametrize("correlation", [0.0, 0.95])
def test_the_standard_error_is_right_for_dependent_tokens_and_that_of_single_ones_is_not(correlation):
    """An AR(1) series, whose mean has a known standard deviation; 300 texts of 6000 tokens."""
    n, texts = 6000, 300
    rng = np.random.default_rng(0)
    noise_NM = rng.normal(size=(n, texts))
    series_NM = np.empty_like(noise_NM)
    series_NM[0] = noise_NM[0] / math.sqrt(1 - correlation**2)
    for i in range(1, n):
        series_NM[i] = correlation * series_NM[i - 1] + noise_NM[i]
    true = 1 / (1 - correlation) / math.sqrt(n)  # but for the ends
    errors = []
    for losses_N in series_NM.T:
        sums = BlockSums(n)
        for part in np.split(losses_N, [100, 2001, 2002]):  # in pieces of any size
            sums.add(part, np.ones(len(part)))
        errors.append(sums.evaluation(1, 1).loss.standard_error)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(true, rel=0.08)
    single = np.sqrt(np.mean(series_NM.var(0))) / math.sqrt(n)
    assert (true / single > 5) == (correlation > 0)


def test_the_standard_error_of_a_ratio_is_that_of_many_repetitions():
    """Bits per byte: the bytes vary too, and with the nats. Against the spread of 2000 texts."""
    rng = np.random.default_rng(1)
    bytes_MK = rng.integers(50, 150, (2000, BLOCKS)).astype(float)
    nats_MK = 0.7 * bytes_MK + rng.normal(0, 5, bytes_MK.shape)
    estimates = [ratio(nats_K, bytes_K) for nats_K, bytes_K in zip(nats_MK, bytes_MK, strict=True)]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.sqrt(np.mean([estimate.standard_error**2 for estimate in estimates])) == pytest.approx(spread, rel=0.05)


def test_undefined_numbers_are_none():
    sums = BlockSums(10)
    sums.add(np.full(10, 800.0), np.zeros(10))
    result = sums.evaluation(1, 1)
    assert result.loss.value == 800
    assert result.loss.standard_error is None
    assert result.perplexity.value is result.perplexity.standard_error is None
    assert result.bits_per_byte.value is None


def test_bytes_are_those_of_the_text_and_the_end_of_a_text_has_none():
    tokenizer = GPT2Tokenizer()
    text = "Caf\u00e9 \U0001f600 <|endoftext|>two"
    assert byte_lengths(tokenizer)[tokenizer.encode(text)].sum() == len("Caf\u00e9 \U0001f600 two".encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder: a model that has hardly been trained, of single characters."""
    root = tmp_path_factory.mktemp("runs")
    (root / "corpus.txt").write_text(TEXT[:1290])  # 129 characters are for validation: 16 windows, 8 batches
    return trained(root, parse_train("", FLAGS).config.replace(data="corpus.txt", eval_batches=99)).folder


@pytest.fixture
def run(call, folder):
    return lambda *args: call(script, "--checkpoint", folder, *args)


def test_a_run_is_evaluated_on_its_own_validation_split_and_agrees_with_its_log(run, folder):
    """With windows that don't overlap, it is the loss of the last evaluation in training, whose windows are the same."""
    code, out, err = run("--stride", 8, "--json")
    assert code == 0, err
    result = json.loads(out)
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "val/loss" in line][-1]
    assert result["tokens"] == 128
    assert result["loss"]["value"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert result["loss"]["standard_error"] > 0
    assert "tokens/s" in err
    plain = run("--stride", 8)[1]
    assert f"{result['loss']['value']:.4f} ± {result['loss']['standard_error']:.4f} nats per token" in plain
    assert json.loads(run("--stride", 8, "--json", "--split", "train")[1])["tokens"] > result["tokens"]


def test_texts_come_from_files_folders_and_standard_input_and_tokens_from_a_file(run, folder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat on the log; " * 5)
    text = (tmp_path / "a.txt").read_text()
    expected = json.loads(run("--text", "a.txt", "--json")[1]) | {"text": ""}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert json.loads(run("--text", "-", "--json")[1]) | {"text": ""} == expected
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text(text)
    assert json.loads(run("--text", "sub", "--json")[1]) | {"text": ""} == expected
    saved = json.loads((folder / "tokenizer.json").read_text())
    np.array(CharTokenizer(saved["chars"]).encode(text), np.uint16).tofile(tmp_path / "val.bin")
    assert json.loads(run("--tokens", "val.bin", "--json")[1]) | {"text": ""} == expected


def test_several_texts_are_joined_by_the_end_of_text_token(call, gpt2, tmp_path):
    (tmp_path / "a.txt").write_text("Every effort")
    (tmp_path / "b.txt").write_text("moves you")
    (tmp_path / "c.txt").write_text("Every effort<|endoftext|>moves you")
    one, two = (
        json.loads(call(script, "--init-from", gpt2.folder, "--json", "--text", *names)[1]) for names in (["a.txt", "b.txt"], ["c.txt"])
    )
    assert one | {"text": ""} == two | {"text": ""}
    assert one["tokens"] == len(GPT2Tokenizer().encode("Every effort<|endoftext|>moves you")) - 1
    assert one["bytes"] == len(" effortmoves you")


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--text", "empty.txt"], "no text"),
        (["--text", "absent.txt"], "absent.txt.*No such file"),
        (["--text", "latin1.txt"], "not UTF-8"),
        (["--text", "other.txt"], "not in this run's alphabet"),
        (["--text", "one.txt"], "1 tokens"),
        (["--text", "hollow"], "no .txt files"),
        (["--data", "nothing"], "no corpus 'nothing'"),
        (["--data", "other.txt"], "--text"),
        (["--tokens", "absent.bin"], "absent.bin.*No such file"),
        (["--tokens", "odd.bin"], "3 bytes, an odd number"),
        (["--tokens", "empty.bin"], "empty"),
        (["--tokens", "beyond.bin"], r"id 999 at token 2 \(byte 4\), outside the vocabulary of"),
        (["--tokens", "gpt2/val.bin"], "tokenizer 'gpt2', the model has 'char'"),
        (["--stride", "0"], "stride=0: expected 1 to the context, 8"),
        (["--stride", "9"], "stride=9: expected 1 to the context, 8"),
        (["--context", "9"], "context=9"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--train-ratio", "1.5"], "train_ratio=1.5"),
        (["--text", "a", "--data", "b"], "exclude"),
        (["--init-from", "x"], "not both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, tmp_path, args, pattern):
    for name, text in (("empty", " \n"), ("other", "\u00f6" * 50), ("one", "t")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    np.array([1, 2, 999, 1], np.uint16).tofile(tmp_path / "beyond.bin")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "val.bin").write_bytes(b"abcd")
    (tmp_path / "gpt2" / "tokenizer.json").write_text('{"kind": "gpt2"}')
    result = run(*args)
    refused(result, pattern)
    assert result[1] == ""


def test_a_model_without_a_known_tokenizer_and_one_without_a_text_are_refused(call, tmp_path):
    make_model(NARROW, vocab_size=97).save_pretrained(tmp_path / "model")
    refused(call(script, "--init-from", "model", "--text", "x"), "not known what the tokens of model mean")
    refused(call(script, "--init-from", "model"), "give a text")
    refused(call(script, "--text", "x"), "give a run folder")
    refused_by_tyro(call(script, "--split", "test"), "split")


def test_damaged_weights_and_ids_beyond_the_vocabulary_are_named():
    _, params = random_pair(SMALL)
    tokens = random_ids(SMALL, (40,))
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(InputError, match="loss of token 1 is not finite"):
        evaluate(broken, SMALL, ALPHABET, tokens)
    tokens[7] = 97
    with pytest.raises(InputError, match="token id 97, outside the vocabulary of 97"):
        evaluate(params, SMALL, ALPHABET, tokens)
    tokens[7] = -3
    with pytest.raises(InputError, match="token id -3"):
        evaluate(params, SMALL, ALPHABET, tokens)
