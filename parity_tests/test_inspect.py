"""What a model makes of a text: labels, inspections, draws without replacement, and scripts/inspect_logits.py."""

import io
import itertools
import json
import os
import sys

import inspect_logits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_close, random_ids, random_pair, refused, refused_by_tyro
from scipy import stats

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.data.tokenizer import CharTokenizer, GPT2Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.generation.sampling import draw_without_replacement
from flaxgpt.interpret.labels import token_id, token_label, token_labels
from flaxgpt.interpret.record import _record, inspect_tokens
from flaxgpt.interpret.report import candidates
from flaxgpt.interpret.scores import entropy, log_softmax, rank, top_ids
from flaxgpt.model import forward, init_params
from flaxgpt.optim import make_optimizer
from flaxgpt.run.export import export
from flaxgpt.run.source import Source
from flaxgpt.state import init_state
from torch_ref.interventions import tapped

GPT2 = GPT2Tokenizer()
PURPLE = "I think more people would eat tumeric if it were purple."
MILK = "I like oat milk in my"
TOY = ["closer=4.51", "every=0.89", "effort=-1.90", "forward=6.75", "inches=1.63", "moves=-1.62", "pizza=-1.89", "toward=6.28", "you=1.79"]


# Labels


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" red", "␣red"),
        ("\n", r"\n"),
        ("\t", r"\t"),
        ("\\", r"\\"),
        ("\x00", r"\x00"),
        ("\u00a0", r"\u00a0"),
        ("\u200b", r"\u200b"),
        ("\u0336", r"\u0336"),
        ("é", "é"),
        (" [", "␣["),
        ("<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_a_label_shows_what_would_be_invisible(text, label):
    (i,) = GPT2.encode(text)
    assert token_label(GPT2, i) == label


def test_a_byte_that_is_no_character_is_shown_as_one():
    first, *rest = GPT2.encode("␣")  # its own bytes, e2 90 a3, in pieces
    assert token_label(GPT2, first).startswith(r"\xe2")
    assert "".join(token_label(GPT2, i) for i in (first, *rest)) == r"\xe2\x90\xa3"
    assert token_label(CharTokenizer("a␣"), 1) == r"\u2423"
    assert token_label(CharTokenizer("a\U000e0001"), 1) == r"\U000e0001"


def test_no_two_tokens_have_one_label_and_padding_has_some():
    labels = token_labels(GPT2, 50304)
    assert len(set(labels)) == 50304
    assert all(label and label.isprintable() and " " not in label for label in labels)
    assert (labels[2266], labels[198], labels[50256], labels[50300]) == ("␣red", r"\n", "<|endoftext|>", r"\#50300")


def test_a_token_is_found_by_its_text_and_pieces_are_shown_if_it_is_not_one():
    assert token_id(GPT2, " coffee") == 6891
    with pytest.raises(InputError, match="'tumeric' is 2 tokens, not one: t umeric"):
        token_id(GPT2, "tumeric")
    with pytest.raises(InputError, match="'coffee' is 2 tokens, not one: co ffee; with a space before it, it is one"):
        token_id(GPT2, "coffee")
    with pytest.raises(InputError, match="empty"):
        token_id(GPT2, "")


def test_the_texts_of_the_lesson_have_the_published_tokens():
    ids = GPT2.encode(PURPLE)
    assert (len(PURPLE), len(ids)) == (56, 13)
    assert (GPT2.decode([ids[4]]), GPT2.decode([ids[5]])) == (" would", " eat")
    assert len(GPT2.encode(MILK)) == 7


# Scores


def test_scores_are_those_of_scipy():
    logits_TV = 10 * np.random.default_rng(0).standard_normal((5, 97)).astype(np.float32)
    expected = stats.entropy(np.exp(log_softmax(logits_TV.astype(np.float64))), axis=-1)
    np.testing.assert_allclose(log_softmax(logits_TV), torch.log_softmax(torch.from_numpy(logits_TV), -1), rtol=1e-5)
    np.testing.assert_allclose(entropy(log_softmax(logits_TV)), expected, rtol=1e-5)
    np.testing.assert_allclose(entropy(log_softmax(np.zeros(97))), np.log(97))
    assert entropy(log_softmax(np.array([0, -np.inf, -np.inf]))) == 0


def test_equal_logits_share_a_rank_and_are_listed_by_id():
    logits_V = np.array([1.0, 3.0, 2.0, 3.0, 0.0])
    assert [int(rank(logits_V, i)) for i in range(5)] == [4, 1, 3, 1, 5]
    assert top_ids(logits_V, 3).tolist() == [1, 3, 2]
    assert top_ids(logits_V, 1).tolist() == [1]
    assert top_ids(logits_V, 99).tolist() == [1, 3, 2, 0, 4]
    assert top_ids(np.zeros(5), 2).tolist() == [0, 1]
    np.testing.assert_array_equal(rank(np.tile(logits_V, (2, 1)), np.array([2, 3])), [3, 1])
    ranks = [row.rank for row in candidates(logits_V, "abcde", range(5))]
    assert ranks == [4, 1, 3, 1, 5]


# Inspections


@pytest.fixture(scope="module")
def pair():
    return random_pair(SMALL)


@pytest.fixture(scope="module")
def alphabet():
    return CharTokenizer("".join(map(chr, range(33, 33 + SMALL.vocab_size))))


@pytest.fixture(scope="module")
def inspection(pair, alphabet):
    return inspect_tokens(pair[1], SMALL, alphabet, random_ids(SMALL, (11,)), lens=4, attention=True)


def test_what_belongs_to_a_position_is_about_the_token_after_it(pair, inspection):
    ids_T = inspection.ids_T
    logits_TV = np.asarray(forward(pair[1], SMALL, ids_T[None])[0])
    np.testing.assert_allclose(inspection.logits_TV, logits_TV, atol=1e-5)
    log_probs_TV = jax.nn.log_softmax(logits_TV)
    for t, following in enumerate(ids_T[1:]):
        np.testing.assert_allclose(inspection.next_log_probs_T[t], log_probs_TV[t, following], rtol=1e-5)
        assert inspection.next_ranks_T[t] == sorted(logits_TV[t], reverse=True).index(logits_TV[t, following]) + 1
    np.testing.assert_array_equal(inspection.surprises_T[1:], -inspection.next_log_probs_T[:-1])
    assert np.isnan(inspection.next_log_probs_T[-1])
    assert np.isnan(inspection.surprises_T[0])
    assert inspection.next_ranks_T[-1] == 0
    assert len(inspection.labels_V) == SMALL.vocab_size


def test_looking_does_not_change_the_logits(pair, alphabet, inspection):
    plain = inspect_tokens(pair[1], SMALL, alphabet, inspection.ids_T)
    np.testing.assert_array_equal(plain.logits_TV, inspection.logits_TV)
    assert plain.lens is None
    assert plain.weights_LNTS is None


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "vocab_multiple": 8}], ids=["untied", "tied, padded"])
def test_the_lens_is_the_final_norm_and_the_head_of_each_residual_stream(alphabet, changes):
    cfg = SMALL.replace(**changes)
    model, params = random_pair(cfg)
    ids_T = random_ids(cfg, (9,), seed=3)
    lens = inspect_tokens(params, cfg, alphabet, ids_T, lens=4).lens
    points = ["drop_emb.output", *(f"trf_blocks.{i}.output" for i in range(cfg.n_layers))]
    with torch.no_grad(), tapped(model, set(points)) as taps:
        logits_TV = model(torch.from_numpy(ids_T)[None])[0]
    with torch.no_grad():
        log_probs_MTV = torch.stack([model.out_head(model.final_norm(taps[point][0])) for point in points]).log_softmax(-1)
    np.testing.assert_array_equal(log_probs_MTV[-1], logits_TV.log_softmax(-1))  # the last layer's lens is the model
    top = log_probs_MTV.topk(4)
    np.testing.assert_array_equal(lens.top_ids_MTK, top.indices)
    assert_close("logit lens", lens.top_log_probs_MTK, top.values, 2e-6)
    next_MT1 = torch.from_numpy(ids_T[1:])[None, :, None].expand(len(points), -1, -1)
    of_next_MT1 = log_probs_MTV[:, :-1].gather(-1, next_MT1)
    assert_close("logit lens", lens.next_log_probs_MT[:, :-1], of_next_MT1[..., 0], 2e-6)
    np.testing.assert_array_equal(lens.next_ranks_MT[:, :-1], 1 + (log_probs_MTV[:, :-1] > of_next_MT1).sum(-1))
    assert np.isnan(lens.next_log_probs_MT[:, -1]).all()
    assert (lens.next_ranks_MT[:, -1] == 0).all()


def test_the_last_layer_of_the_lens_is_the_prediction_of_the_model(inspection):
    lens = inspection.lens
    np.testing.assert_array_equal(lens.next_ranks_MT[-1], inspection.next_ranks_T)
    np.testing.assert_allclose(lens.next_log_probs_MT[-1], inspection.next_log_probs_T, rtol=1e-5)
    for t, logits_V in enumerate(inspection.logits_TV):
        np.testing.assert_array_equal(lens.top_ids_MTK[-1, t], top_ids(logits_V, 4))


def test_the_lens_holds_the_logits_of_one_layer_at_a_time():
    cfg, T = SMALL.replace(n_layers=5), 7
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    program = str(jax.make_jaxpr(lambda params, ids_T: _record(params, cfg, ids_T, 3, False))(params, jnp.zeros(T, jnp.int32)))
    assert f"f32[{T},{cfg.vocab_size}]" in program
    assert f"f32[{cfg.n_layers + 1},{T},{cfg.vocab_size}]" not in program
    assert f"f32[{cfg.n_layers},{T},{cfg.vocab_size}]" not in program


def test_attention_rows_sum_to_1_are_causal_and_equal_torchs(pair, inspection):
    weights_LNTS, (model, _) = inspection.weights_LNTS, pair
    T = len(inspection.ids_T)
    assert weights_LNTS.shape == (SMALL.n_layers, SMALL.n_heads, T, T)
    np.testing.assert_allclose(weights_LNTS.sum(-1), 1, rtol=1e-6)
    assert (weights_LNTS[..., np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] == 0).all()
    points = [f"trf_blocks.{i}.att.dropout.input" for i in range(SMALL.n_layers)]
    with torch.no_grad(), tapped(model, set(points)) as taps:
        model(torch.from_numpy(inspection.ids_T)[None])
    assert_close("attention weights", weights_LNTS, torch.stack([taps[point][0] for point in points]), 7e-7)


def test_one_token_and_a_bfloat16_model_can_be_inspected(pair, alphabet):
    one = inspect_tokens(pair[1], SMALL, alphabet, [5], lens=200, attention=True)
    assert one.lens.top_ids_MTK.shape == (SMALL.n_layers + 1, 1, SMALL.vocab_size)
    assert one.weights_LNTS.tolist() == np.ones((SMALL.n_layers, SMALL.n_heads, 1, 1)).tolist()
    half = inspect_tokens(pair[1], SMALL.replace(dtype="bfloat16"), alphabet, [5, 6, 7], lens=2, attention=True)
    assert {half.logits_TV.dtype, half.weights_LNTS.dtype, half.lens.top_log_probs_MTK.dtype} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(half.lens.next_ranks_MT[-1], half.next_ranks_T)


def test_tokens_that_only_the_model_has_are_shown_as_ids_and_never_drawn(call, tmp_path, pair):
    short = CharTokenizer("".join(map(chr, range(33, 43))))
    assert inspect_tokens(pair[1], SMALL, short, [50]).labels_V[9:12] == ("*", r"\#10", r"\#11")
    export(Source(tmp_path, SMALL, short, pair[1]), tmp_path / "model", "run")
    found = json.loads(call(inspect_logits, "--checkpoint", "model", "--text", "!", "--draws", 50, "--steps", 9, "--json")[1])
    assert found["shape"] == [1, 97]
    assert {row["id"] for row in found["draws"]["without_replacement"]} == {*range(10)}
    assert {step["chosen"]["id"] for step in found["steps"]} <= {*range(10)}


@pytest.mark.parametrize(
    ("ids", "options", "pattern"),
    [
        ([], {}, "at least one"),
        ([[1, 2]], {}, "one text"),
        ([0.5], {}, "integer"),
        ([97], {}, "vocabulary of 97"),
        ([-1], {}, "vocabulary of 97"),
        ([1] * 17, {}, "17 tokens, and the model's context 16"),
        ([1], {"lens": -1}, "lens=-1"),
    ],
)
def test_what_can_not_be_inspected_is_refused(pair, alphabet, ids, options, pattern):
    with pytest.raises(InputError, match=pattern):
        inspect_tokens(pair[1], SMALL, alphabet, ids, **options)


def test_a_model_whose_logits_are_not_finite_is_refused(pair, alphabet):
    damaged = jax.tree.map(lambda x: x * jnp.nan, pair[1])
    with pytest.raises(InputError, match="not all finite"):
        inspect_tokens(damaged, SMALL, alphabet, [1])


# Draws without replacement

WORDS = np.log([0.5, 0.25, 0.15, 0.1])


def pairs_without_replacement(probs):
    """The exact probability of each ordered pair: p_i p_j / (1 - p_i)."""
    pairs = itertools.permutations(range(len(probs)), 2)
    return {(i, j): probs[i] * probs[j] / (1 - probs[i]) for i, j in pairs}


def draw_pairs(n):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(jax.vmap(lambda key: draw_without_replacement(jnp.asarray(WORDS, jnp.float32), key, 2))(keys))


def fits(pairs, expected):
    counts = [int((pairs == pair).all(-1).sum()) for pair in expected]
    assert sum(counts) == len(pairs), "a pair was drawn that can't be"
    return stats.chisquare(counts, len(pairs) * np.array([*expected.values()])).pvalue > 1e-3


def test_draws_without_replacement_have_the_exact_probabilities_of_ordered_draws():
    pairs = draw_pairs(10_000)
    assert fits(pairs, pairs_without_replacement(np.exp(WORDS)))
    assert not fits(pairs, pairs_without_replacement(np.array([0.47, 0.28, 0.15, 0.1])))
    assert not fits(pairs[:, ::-1], pairs_without_replacement(np.exp(WORDS))), "the order of the draws is not noticed"


def test_draws_without_replacement_are_distinct_and_begin_with_the_ordinary_draw():
    logits_V = jnp.asarray(np.random.default_rng(0).standard_normal(50), jnp.float32)
    for seed in range(20):
        key = jax.random.key(seed)
        drawn = draw_without_replacement(logits_V, key, 50).tolist()
        assert sorted(drawn) == [*range(50)]
        assert drawn[0] == jax.random.categorical(key, logits_V)
        assert draw_without_replacement(logits_V, key, 3).tolist() == drawn[:3]


# The script


CFG = GPTConfig(n_layers=2, n_heads=2, emb_dim=16, context_length=16, drop_rate=0.0)


@pytest.fixture(scope="module")
def params():
    return random_pair(CFG)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    """A run folder: a model of GPT-2's tokens with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    export(Source(folder, CFG, GPT2, params), folder, "run")
    return folder


@pytest.fixture
def run(call, folder):
    return lambda *args: call(inspect_logits, "--checkpoint", folder, *args)


@pytest.fixture
def ask(run):
    """The JSON of one call."""

    def ask(*args):
        code, out, err = run(*args, "--json", "--seed", 1)
        assert code == 0, err
        return json.loads(out)

    return ask


@pytest.fixture(scope="module")
def logits_of(params):
    """By another way than the script's: logits_TV of a text."""
    padded_logits = jax.jit(lambda tokens_BT: forward(params, CFG, tokens_BT)[0])

    def logits_of(ids):
        return np.asarray(padded_logits(np.pad([ids], [(0, 0), (0, CFG.context_length - len(ids))])))[: len(ids)]

    return logits_of


def test_the_table_shows_shapes_tokens_and_the_ten_likeliest(run, logits_of):
    code, out, err = run("--text", PURPLE, "--position", "-1", "--top", 10, "--seed", 1)
    assert code == 0
    assert err == "seed 1\n"
    assert "logits (13, 50257)" in out
    assert "␣would" in out
    logits_TV = logits_of(GPT2.encode(PURPLE))
    lines = out[out.index("likeliest next tokens") :].splitlines()[2:12]
    for place, (line, i) in enumerate(zip(lines, np.argsort(-logits_TV[-1])[:10], strict=True), start=1):
        assert line.split()[-4:-2] == [f"{place}", token_label(GPT2, int(i))]
        assert abs(float(line.split()[-2]) - logits_TV[-1, i]) < 0.006
    assert max(map(len, out.splitlines()[1:])) <= 80, "a table is wider than a terminal"


def test_a_chosen_token_has_its_logit_rank_and_probability(run, ask, logits_of):
    logits_TV = logits_of(GPT2.encode("The sky is"))
    red, blue = ask("--text", "The sky is", "--token", " red", "--token", " blue")["tokens"]
    assert (red["token"], red["id"], blue["token"]) == ("␣red", 2266, "␣blue")
    assert red["logit"] == pytest.approx(logits_TV[-1, 2266], abs=1e-5)
    assert red["probability"] == pytest.approx(np.exp(log_softmax(logits_TV)[-1, 2266]), rel=1e-5)
    assert red["rank"] == (logits_TV[-1] > logits_TV[-1, 2266]).sum() + 1
    (earlier,) = ask("--text", "The sky is", "--token", " red", "--position", "-2")["tokens"]
    assert earlier["logit"] == pytest.approx(logits_TV[1, 2266], abs=1e-5)
    assert ask("--text", "The sky is", "--token", " red", "--position", "1")["tokens"] == [earlier]
    assert "␣red   2266" in run("--text", "The sky is", "--token", " red", "--seed", 1)[1]


def test_json_has_every_position_with_what_comes_next(ask, logits_of):
    found = ask("--text", PURPLE, "--top", 3, "--lens", 2, "--attention")
    ids = GPT2.encode(PURPLE)
    log_probs_TV = log_softmax(logits_of(ids))
    assert (found["shape"], found["text"], found["position"]) == ([13, 50257], PURPLE, 12)
    for t, place in enumerate(found["places"]):
        assert (place["position"], place["id"], place["token"]) == (t, ids[t], token_label(GPT2, ids[t]))
        assert [row["id"] for row in place["top"]] == np.argsort(-log_probs_TV[t])[:3].tolist()
        assert place["entropy"] == pytest.approx(-(np.exp(log_probs_TV[t]) * log_probs_TV[t]).sum(), rel=1e-4)
        assert place["surprise"] == (None if t == 0 else pytest.approx(-log_probs_TV[t - 1, ids[t]], rel=1e-4))
        if t < 12:
            assert place["next"]["probability"] == pytest.approx(np.exp(log_probs_TV[t, ids[t + 1]]), rel=1e-4)
            assert found["lens"][t][-1]["next_rank"] == place["next"]["rank"]
    assert found["places"][12]["next"] is None
    assert [layer["layer"] for layer in found["lens"][0]] == [0, 1, 2]
    assert np.shape(found["attention"]) == (2, 2, 13, 13)


def test_attention_is_in_the_json_on_the_page_or_in_both(run, tmp_path):
    for flags, in_json, on_page in (([], False, True), (["--attention", "--no-attention-maps"], True, False)):
        code, out, err = run("--text", "The sky", "--json", "--html", "page.html", *flags)
        assert code == 0, err
        assert (json.loads(out)["attention"] is not None) == in_json
        assert ('"attention":null' not in (tmp_path / "page.html").read_text()) == on_page


def test_what_is_no_file_is_not_replaced_by_one(run, tmp_path):
    os.mkfifo(tmp_path / "page.html")  # as /dev/null, which an ordinary file must not take the place of
    refused(run("--text", "The sky", "--html", "page.html"), "page.html: it is not a file")
    assert (tmp_path / "page.html").is_fifo()


def test_five_are_drawn_without_replacement_and_five_with_it(run, ask):
    draws = ask("--text", "The sky is")["draws"]
    assert len({row["id"] for row in draws["without_replacement"]}) == len(draws["with_replacement"]) == 5
    few = ask("--text", "The sky is", "--top-k", 3)["draws"]  # as many as there are
    assert sorted(row["rank"] for row in few["without_replacement"]) == [1, 2, 3]
    assert sum(row["probability"] for row in few["without_replacement"]) == pytest.approx(1, rel=1e-5)
    assert len(few["with_replacement"]) == 5
    assert ask("--text", "The sky is", "--draws", 0)["draws"] is None
    once, again, other = (run("--text", "The sky is", "--seed", seed)[1] for seed in (1, 1, 2))
    assert once == again != other


def test_token_by_token_shows_the_candidates_of_each_step(run, ask, logits_of):
    steps = ask("--text", MILK, "--steps", 4, "--top", 3)["steps"]
    ids = [*GPT2.encode(MILK), *(step["chosen"]["id"] for step in steps)]
    for step, log_probs_V in zip(steps, log_softmax(logits_of(ids))[-5:-1], strict=True):  # each given all that was chosen before it
        assert [row["id"] for row in step["top"]] == np.argsort(-log_probs_V)[:3].tolist()
        assert step["top"][0] == step["chosen"]
        assert step["chosen"]["probability"] == pytest.approx(np.exp(log_probs_V.max()), rel=1e-4)
    drawn = ask("--text", MILK, "--steps", 4, "--top", 3, "--temperature", "2")["steps"]
    assert [step["chosen"] for step in drawn] != [step["chosen"] for step in steps]
    out = run("--text", MILK, "--steps", 4, "--top", 3, "--temperature", "2", "--seed", 1)[1]
    assert out.count("chosen") == 4


def test_a_promoted_token_comes_first_and_nothing_is_left_of_it_afterwards(run, ask, logits_of):
    logits_TV = logits_of(GPT2.encode(MILK))
    found = ask("--text", MILK, "--promote", " coffee")["promotion"]
    first, *others = found["promoted"]
    assert (first["token"], first["rank"]) == ("␣coffee", 1)
    assert first["logit"] == pytest.approx(logits_TV[-1].max() + 10, abs=1e-5)
    assert [row["logit"] for row in others] == [row["logit"] for row in found["before"][:-1]]
    assert found["token"]["rank"] > 1
    assert found["before"] == found["after"]
    assert found["identical"] is True
    out = run("--text", MILK, "--promote", " coffee", "--seed", 1)[1]
    assert "taken away, all logits are bit for bit what they were" in out


def test_a_text_comes_from_a_file_or_standard_input(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The sky\nis")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sky\nis"))
    expected = run("--text", "The sky\nis", "--seed", 1)[1]
    assert run("--text", "FILE:text.txt", "--seed", 1)[1] == expected
    assert run("--text", "-", "--seed", 1)[1] == expected


def test_a_preset_has_the_weights_that_training_begins_with(call):
    code, out, _ = call(inspect_logits, "--preset", "tiny", "--text", "The", "--json", "--seed", 123)
    assert code == 0
    found = json.loads(out)
    run = TrainConfig.preset("tiny")
    run = run.replace(seed=123, model=run.model.replace(vocab_size=found["shape"][1]))
    params = jax.jit(lambda: init_state(run, make_optimizer(run)).params)()  # as training draws them
    ids = [place["id"] for place in found["places"]]
    logits_TV = jax.jit(forward, static_argnums=1)(params, run.model, np.array([ids]))[0]
    for place, logits_V in zip(found["places"], logits_TV, strict=True):
        assert place["top"][0]["logit"] == pytest.approx(float(logits_V.max()), abs=1e-5)
        assert place["top"][0]["id"] == logits_V.argmax()


def toy(call, *args):
    code, out, err = call(inspect_logits, "--logits", *TOY, *args, "--json", "--seed", 123)
    assert code == 0, err
    return json.loads(out)


def test_the_toy_vocabulary_decodes_as_published(call):
    found = toy(call, "--top-k", 3)
    words = found["words"]
    assert found["argmax"] == "forward"
    assert [word["word"] for word in words if word["left_logit"] is not None] == ["closer", "forward", "toward"]
    assert sorted((word["left_logit"] for word in words if word["left_logit"]), reverse=True) == pytest.approx([6.75, 6.28, 4.51])
    np.testing.assert_allclose([words[i]["left_probability"] for i in (0, 3, 7)], [0.0615, 0.5775, 0.3610], atol=5e-5)
    assert all(word["draws"] == 0 for word in words if word["left_logit"] is None)
    logits_V = torch.tensor([word["logit"] for word in words])
    assert found["temperatures"] == [1, 0.1, 5]
    for column, temperature in enumerate(found["temperatures"]):
        expected = torch.softmax(logits_V / temperature, 0)
        np.testing.assert_allclose([word["probabilities"][column] for word in words], expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1, 5])
def test_draws_from_the_toy_vocabulary_have_its_probabilities(call, temperature):
    found = toy(call, "--temperature", temperature)
    counts, probs = ([word[name] for word in found["words"]] for name in ("draws", "left_probability"))
    assert sum(counts) == found["count"] == 1000
    rare = np.array(probs) * 1000 < 5  # where the chi-square approximation does not hold: put together
    observed, expected = (np.append(np.array(x)[~rare], np.array(x)[rare].sum()) for x in (counts, probs))
    held = expected > 0
    assert stats.chisquare(observed[held], 1000 * expected[held] / expected.sum()).pvalue > 1e-3
    assert [word["probabilities"][found["temperatures"].index(temperature)] for word in found["words"]] == pytest.approx(probs)


def test_the_toy_vocabulary_as_a_table(call):
    out = call(inspect_logits, "--logits", *TOY, "--top-k", 3, "--count", 10, "--seed", 1)[1]
    assert "argmax: forward" in out
    line = next(line for line in out.splitlines() if "toward" in line)
    assert line.split()[:3] == ["7", "toward", "6.28"]
    assert "0.3610" in line
    assert out.count("-inf") == 6


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        ([], "--text"),
        (["--text", ""], "the text is empty"),
        (["--text", "FILE:absent.txt"], "text.*absent.txt"),
        (["--text", "FILE:latin1.txt"], "text.*UTF-8"),
        (["--text", "FILE:empty.txt"], "the text is empty"),
        (["--text", "a\udcff"], "text: it is not UTF-8"),
        (["--text", "a " * 40], "context 16"),
        (["--text", MILK, "--token", "tumeric"], "2 tokens, not one: t umeric"),
        (["--text", MILK, "--token", "coffee"], "co ffee; with a space before it"),
        (["--text", MILK, "--token", ""], "token is empty"),
        (["--text", MILK, "--token", "\udcff"], "not UTF-8"),
        (["--text", MILK, "--promote", "\udcff"], "not UTF-8"),
        (["--text", MILK, "--html", "absent/page.html"], "absent/page.html.* a folder that is not there"),
        (["--text", MILK, "--html", "."], "can't write .: it is not a file"),
        (["--text", MILK, "--html", "x" * 300], "File name too long"),
        (["--text", MILK, "--plots", "empty.txt"], "can't write empty.txt"),
        (["--text", MILK, "--logit-bias", "40", "1e30", "--temperature", "1e-6", "--repetition-penalty", "1e-6"], "is not finite"),
        (["--text", MILK, "--promote", "tumeric"], "2 tokens, not one: t umeric"),
        (["--text", MILK, "--position", "7"], "position=7: the text has 7 tokens, numbered 0 to 6"),
        (["--text", MILK, "--position", "-8"], "position=-8"),
        (["--text", MILK, "--top", "0"], "top=0"),
        (["--text", MILK, "--draws", "-1"], "draws=-1"),
        (["--text", MILK, "--draws", "1001"], "draws=1001: expected 0 to 1,000"),
        (["--text", MILK, "--steps", "-1"], "steps=-1"),
        (["--text", MILK, "--steps", "99999999999"], "max_new_tokens"),
        (["--text", MILK, "--lens", "-1"], "lens=-1"),
        (["--text", MILK, "--attention"], "--attention is for --json"),
        (["--text", MILK, "--seed", "-1"], "seed=-1"),
        (["--text", MILK, "--banned", "60000"], "banned.*60000"),
        (["--text", MILK, "--count", "3"], "--count: only with --logits"),
        (["--text", MILK, "--temperatures", "3"], "--temperatures: only with --logits"),
        (["--text", MILK, "--preset", "tiny"], "give one of"),
        (["--text", MILK, "--init-from", "gpt2"], "give one of"),
        (["--logits", "a=1"], "give one of"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, tmp_path, args, pattern):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    refused(run(*args), pattern)


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--text", "a"], "give one of"),
        (["--checkpoint", "absent", "--text", "a"], "absent"),
        (["--preset", "absent", "--text", "a"], "unknown preset 'absent'"),
        (["--preset", "tiny", "--text", "ö"], "'ö'"),
        (["--preset", "tiny", "--text", "a", "--token", "the"], "3 tokens, not one: t h e$"),
        (["--logits", "a"], "'a' is not a word and a finite logit"),
        (["--logits", "=1"], "'=1' is not a word"),
        (["--logits", "a=b"], "'a=b' is not a word"),
        (["--logits", "a=nan"], "'a=nan' is not a word"),
        (["--logits", "a=inf"], "'a=inf' is not a word"),
        (["--logits", "a=1", "a=2"], "'a' is there twice"),
        (["--logits", "a=1", "--text", "a"], "--text: only with a model"),
        (["--logits", "a=1", "--steps", "2", "--promote", "a"], "--steps, --promote: only with a model"),
        (["--logits", "a=1", "--temperatures", "0"], "temperatures"),
        (["--logits", "a=1", "--temperatures", "1e308"], "temperatures"),
        (["--logits", "a\udcff=1", "b=2"], "not UTF-8"),
        (["--logits", "a=1", "--count", "-1"], "count=-1"),
        (["--logits", "a=1", "--banned", "0"], "none left"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_without_a_run_folder_is_one_line(call, args, pattern):
    refused(call(inspect_logits, *args), pattern)


def test_a_model_whose_tokens_are_not_known_is_refused(call, tmp_path, pair):
    export(Source(tmp_path, SMALL, None, pair[1]), tmp_path / "model.safetensors", "safetensors")
    refused(call(inspect_logits, "--init-from", "model.safetensors", "--text", "a"), "not known what the tokens of model.safetensors mean")


def test_flags_that_do_not_fit_are_explained_by_tyro(run):
    refused_by_tyro(run("--text", MILK, "--top", "many"), "--top")
    refused_by_tyro(run("--text", MILK, "--temperature", "-1"), "temperature")
