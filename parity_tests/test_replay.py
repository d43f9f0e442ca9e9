"""A run of the reference, recorded and repeated with its batches and masks."""

import csv
import math

import numpy as np
import pytest
import replay as replay_script
from conftest import SMALL, refused

from flaxgpt.config import TrainConfig
from flaxgpt.optim import make_optimizer
from flaxgpt.parity.flax_side import replay
from flaxgpt.parity.replay import COLUMNS
from flaxgpt.run.folder import read_metrics
from flaxgpt.run.log import RunLog
from flaxgpt.run.setup import prepare
from torch_ref.parity.replay import recorded_run
from torch_ref.train import train as train_torch

TEXT = "the cat sat on the mat and the dog sat on the log; " * 20
FLAGS = (
    "--tokenizer char --context-length 16 --emb-dim 32 --n-heads 4 --n-layers 1 --batch-size 4 "
    "--max-steps 20 --sample-tokens 8 --prompt the"
)


@pytest.fixture
def config(private_cache, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    model = SMALL.replace(drop_rate=0.2)
    return TrainConfig(
        model=model,
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        batch_size=4,
        max_steps=20,
        eval_every=5,
        eval_batches=3,
        sample_tokens=8,
    )


def test_the_recording_is_the_reference_s_own_run(config, tmp_path):
    cfg, corpus = prepare(config, tmp_path / "run")
    with RunLog(tmp_path / "run") as log:
        train_torch(cfg, corpus, log)
    expected = {r["step"]: (r["train/loss"], r["val/loss"]) for r in read_metrics(tmp_path / "run") if "val/loss" in r}
    _, updates = recorded_run(cfg, corpus)
    recorded = {u.step: u.evaluation[2:] for u in updates if u.evaluation}
    assert recorded == expected, "recording masks, or sampling, has changed what the generator draws"


def test_a_replay_in_float64_is_the_run_to_1e_12_and_writes_the_same_text(config, tmp_path):
    cfg, corpus = prepare(config, tmp_path / "run")
    weights, updates = recorded_run(cfg, corpus, "float64")
    evaluations = samples = 0
    for repeated in replay(cfg, weights, updates, "float64"):
        update = repeated.update
        assert math.isclose(repeated.loss, update.loss, rel_tol=1e-12), f"update {update.step}"
        assert math.isclose(repeated.grad_norm, update.grad_norm, rel_tol=1e-12), f"update {update.step}"
        if update.evaluation:
            evaluations += 1
            np.testing.assert_allclose((repeated.train_loss, repeated.val_loss), update.evaluation[2:], rtol=1e-12)
        if update.sample is not None:
            samples += 1
            assert repeated.sample == update.sample
    assert (evaluations, samples) == (5, 2)


def test_the_script_compares_evaluations_and_samples_and_draws_them(config, tmp_path, call):
    flags = ["--data", config.data, "--out-dir", str(tmp_path / "out"), *FLAGS.split()]
    code, out, err = call(replay_script, *flags)
    assert code == 0, err
    assert "samples:      2 of 2 equal" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "replay.csv", "replay.png", "samples.txt"}
    rows = list(csv.DictReader((tmp_path / "out" / "replay.csv").open()))
    assert list(rows[0]) == list(COLUMNS)
    assert len(rows) == 20
    for row in rows:
        assert float(row["flaxgpt/batch_loss"]) == pytest.approx(float(row["reference/batch_loss"]), rel=1e-5)
    assert (tmp_path / "out" / "samples.txt").read_text().count("--- after update") == 4
    refused(call(replay_script, *flags), "--overwrite")


def test_the_script_fails_when_the_runs_diverge(config, tmp_path, monkeypatch, call):
    monkeypatch.setattr("flaxgpt.parity.flax_side.make_optimizer", lambda cfg: make_optimizer(cfg.replace(learning_rate=2e-3)))
    flags = ["--data", config.data, "--out-dir", str(tmp_path / "out"), *FLAGS.split()]
    code, out, err = call(replay_script, *flags)
    assert code == 1, err
    assert "seen in the third decimal from step" in out


def test_a_training_run_is_not_replaced_by_a_replay(config, tmp_path, call):
    cfg, corpus = prepare(config.replace(max_steps=1), tmp_path / "run")
    with RunLog(tmp_path / "run") as log:
        train_torch(cfg, corpus, log)
    before = (tmp_path / "run" / "config.json").read_bytes()
    refused(call(replay_script, "--out-dir", tmp_path / "run", "--overwrite"), "holds a training run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("flag", [["--resume"], ["--dtype", "bfloat16"], ["--grad-accum-steps", "2"], ["--no-drop-last"]])
def test_what_can_t_be_replayed_is_said_in_one_line(flag, call):
    refused(call(replay_script, "--out-dir", "out", *flag), "replay|not a run folder")
