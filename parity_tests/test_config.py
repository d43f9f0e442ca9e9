import dataclasses
import json
import subprocess
import sys

import pytest

from flaxgpt.config import PRESETS, GPTConfig, TrainConfig


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_of_every_preset(name):
    cfg = TrainConfig.preset(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert GPTConfig.from_dict(json.loads(json.dumps(cfg.model.to_dict()))) == GPTConfig.preset(name)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().emb_dim = 3


def test_gpt2_presets_have_the_released_shapes():
    shapes = {name: (c.n_layers, c.n_heads, c.emb_dim) for name in PRESETS if name.startswith("gpt2") for c in [GPTConfig.preset(name)]}
    assert shapes == {
        "gpt2-124m": (12, 12, 768),
        "gpt2-355m": (24, 16, 1024),
        "gpt2-774m": (36, 20, 1280),
        "gpt2-1558m": (48, 25, 1600),
    }
    for name in shapes:
        cfg = GPTConfig.preset(name)
        assert (cfg.context_length, cfg.vocab_size, cfg.qkv_bias, cfg.tie_embeddings) == (1024, 50257, True, True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"emb_dim": 10, "n_heads": 4}, "emb_dim"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"drop_rate": float("nan")}, "drop_rate"),
        ({"n_layers": 0}, "n_layers"),
        ({"vocab_size": "50257"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"init": "xavier"}, "init"),
        ({"activation": "relu"}, "activation"),
        ({"bias": False, "qkv_bias": True}, "qkv_bias=False as well"),
        ({"width": 3}, "width"),
    ],
)
def test_a_bad_model_config_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 10, "grad_accum_steps": 4}, "grad_accum_steps"),
        ({"train_ratio": 1.0}, "train_ratio"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 1e-5}, "min_learning_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"decay_steps": 50, "warmup_steps": 50}, "decay_steps"),
        ({"seed": -1}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"fsdp": 5}, "fsdp"),
        ({"model": {"emb_dim": 10, "n_heads": 4}}, "n_heads"),
    ],
)
def test_a_bad_run_config_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig.from_dict(fields)


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'huge'.*verdict-124m"):
        GPTConfig.preset("huge")


@pytest.mark.parametrize("module", ["flaxgpt.config", "flaxgpt.run.cli", "flaxgpt.run.folder", "flaxgpt.convert.params"])
def test_modules_that_both_sides_share_load_no_framework(module):
    code = f"import {module}, sys; print(sorted({{'jax', 'flax', 'torch', 'optax'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
