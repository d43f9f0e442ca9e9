"""A model of Hugging Face's in place of random weights: sampled, fine-tuned by both trainers, compared."""

import shutil
from pathlib import Path

import numpy as np
import parity_report
import pytest
import replay
import sample
import torch
import train_jax
import train_torch
from conftest import FLAGS, assert_equal_bits, refused
from transformers import GPT2LMHeadModel

import flaxgpt
from flaxgpt.data.tokenizer import get_tokenizer
from flaxgpt.run.cli import parse_train
from flaxgpt.run.folder import load_config


def test_sampling_takes_a_folder_in_place_of_a_run(call, folders):
    code, out, err = call(sample, "--init-from", folders / "plain", "--prompt", "The end", "--max-new-tokens", 5, "--temperature", 0)
    assert code == 0, err
    ids = torch.tensor([get_tokenizer("gpt2").encode("The end")])
    theirs = GPT2LMHeadModel.from_pretrained(folders / "plain").eval()
    greedy = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out == get_tokenizer("gpt2").decode(greedy[0].tolist()) + "\n"
    code, out, _ = call(sample, "--init-from", folders / "plain", "--max-new-tokens", 1)
    assert code == 0
    assert out.startswith("<|endoftext|>")
    refused(call(sample, "--init-from", folders / "plain", "--checkpoint", "a"), "--checkpoint.*--init-from.*not both")


NO_UPDATE = ("--learning-rate", 0, "--min-learning-rate", 0, "--drop-rate", 0)
TUNE = FLAGS[FLAGS.index("--context-length") : FLAGS.index("--data")]  # what is compiled for them serves test_survival.py as well


@pytest.mark.parametrize("trainer", [train_jax, train_torch], ids=lambda m: m.__name__)
def test_fine_tuning_starts_from_the_weights_with_its_positions_cropped(call, folders, trainer):
    code, _, err = call(trainer, "--init-from", folders / "plain", *TUNE, *NO_UPDATE, "--max-steps", 1, "--out-dir", "a")
    assert code == 0, err
    source, tuned = flaxgpt.load(folders / "plain"), flaxgpt.load("a")
    assert tuned.cfg.replace(context_length=24, drop_rate=0.1) == source.cfg
    assert tuned.params["pos_emb"]["embedding"].shape == (8, 16)
    tokens = np.arange(8)[None] * 1000
    np.testing.assert_array_equal(flaxgpt.forward(tuned.params, tuned.cfg, tokens), flaxgpt.forward(source.params, source.cfg, tokens))


def test_a_resumed_fine_tuning_is_bit_for_bit_the_one_that_never_stopped(call, plain):
    run = ("--init-from", plain, *TUNE)
    assert call(train_jax, *run, "--max-steps", 4, "--out-dir", "whole")[0] == 0
    assert call(train_jax, *run, "--max-steps", 2, "--out-dir", "parts")[0] == 0
    shutil.rmtree(plain)
    code, out, err = call(train_jax, "--out-dir", "parts", "--resume", "--max-steps", 4)
    assert code == 0, err
    assert "updates 2 to 3" in out
    assert_equal_bits(flaxgpt.load("parts").params, flaxgpt.load("whole").params)
    resumed = parse_train("", ["--init-from", str(plain), "--out-dir", "parts", "--resume"])
    assert resumed.config == load_config(Path("parts")), "the same command with --resume should not ask for the source either"


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--emb-dim", 32, "--no-qkv-bias"), r"leave out emb_dim=32 \(there 16\), qkv_bias=False \(there True\)"),
        (("--context-length", 25), "context_length=25.*learned 24 positions.*no embedding"),
        (("--tokenizer", "char"), "needs the tokenizer gpt2.*the run's char"),
        (("--data", "nope"), "no corpus 'nope'"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_a_run_that_contradicts_its_source_is_refused(call, folders, tmp_path, flags, pattern):
    refused(call(train_jax, "--init-from", folders / "plain", *flags, "--out-dir", "a"), pattern)
    assert not (tmp_path / "a").exists()


def test_a_replay_has_no_other_weights_to_start_from(call, folders):
    refused(call(replay, "--init-from", folders / "plain"), "leave out --init-from")


def test_dropout_is_the_sources_unless_a_flag_says_otherwise(folders):
    source = ["--init-from", str(folders / "plain")]
    assert parse_train("", source).config.model.drop_rate == 0.1
    assert parse_train("", [*source, "--drop-rate", "0.3"]).config.model.drop_rate == 0.3


def test_the_ladder_climbs_on_weights_of_hugging_face(call, folders):
    code, out, err = call(parity_report, "--init-from", folders / "plain", "--rungs", 1, "--length", 8)
    assert code == 0, out + err
    assert "passed:" in out
    refused(call(parity_report, "--init-from", folders / "plain", "--preset", "tiny"), "--init-from brings its own")
