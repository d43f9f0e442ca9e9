import jax
import numpy as np
import pytest
import torch
from conftest import SMALL, random_pair

from flaxgpt.config import GPTConfig
from flaxgpt.convert.params import from_torch, to_torch
from torch_ref.model import GPTModel


@pytest.mark.parametrize("biases", [{"bias": False}, {}, {"qkv_bias": True}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_is_exact_and_loads_strictly(biases, tied):
    cfg = SMALL.replace(tie_embeddings=tied, **biases)
    model, params = random_pair(cfg)
    state_dict = to_torch(params, cfg)
    original = model.state_dict()
    assert state_dict.keys() == original.keys()
    for key, value in state_dict.items():
        np.testing.assert_array_equal(value, original[key], err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, from_torch(state_dict, cfg), params)
    GPTModel(cfg).load_state_dict({key: torch.from_numpy(value) for key, value in state_dict.items()})


def test_keys_are_those_of_checkpoints_in_the_wild():
    cfg = GPTConfig(vocab_size=5, context_length=4, emb_dim=2, n_heads=1, n_layers=1, qkv_bias=True)
    att = [f"att.{name}.{part}" for name in ("W_query", "W_key", "W_value", "out_proj") for part in ("weight", "bias")]
    ff = [f"ff.layers.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    norms = [f"norm{i}.{part}" for i in (1, 2) for part in ("scale", "shift")]
    blocks = [f"trf_blocks.0.{name}" for name in ("att.mask", *att, *ff, *norms)]
    expected = {"tok_emb.weight", "pos_emb.weight", *blocks, "final_norm.scale", "final_norm.shift", "out_head.weight"}
    assert set(GPTModel(cfg).state_dict()) == expected


def test_masks_may_be_absent_on_both_sides():
    model, params = random_pair(SMALL)
    without = {key: value for key, value in model.state_dict().items() if not key.endswith("mask")}
    jax.tree.map(np.testing.assert_array_equal, from_torch(without, SMALL), params)
    assert GPTModel(SMALL).load_state_dict(without).missing_keys == []


def test_a_tied_head_may_be_absent_but_not_different():
    cfg = SMALL.replace(tie_embeddings=True)
    state_dict = to_torch(random_pair(cfg)[1], cfg)
    head = state_dict.pop("out_head.weight")
    from_torch(state_dict, cfg)
    with pytest.raises(ValueError, match=r"out_head\.weight differs from tok_emb\.weight"):
        from_torch(state_dict | {"out_head.weight": head + 1}, cfg)


def test_every_fault_is_named_in_one_error():
    state_dict = to_torch(random_pair(SMALL)[1], SMALL)
    del state_dict["trf_blocks.1.ff.layers.2.bias"], state_dict["pos_emb.weight"]
    state_dict |= {"trf_blocks.2.norm1.scale": np.ones(32), "lm_head": np.ones(1), "final_norm.scale": np.ones(31)}
    with pytest.raises(ValueError, match="does not fit") as error:
        from_torch(state_dict, SMALL)
    for part in (
        "missing: pos_emb.weight, trf_blocks.1.ff.layers.2.bias",
        "unknown: trf_blocks.2.norm1.scale, lm_head",
        "final_norm.scale is (31,), expected (32,)",
    ):
        assert part in str(error.value)


def test_parameters_of_another_config_are_refused():
    params = random_pair(SMALL)[1]
    with pytest.raises(ValueError, match=r"wrong shape: .*trf_blocks/att/W_query/kernel is \(2, 32, 32\), expected \(3, 32, 32\)"):
        to_torch(params, SMALL.replace(n_layers=3))
    with pytest.raises(ValueError, match="unknown: out_head/kernel"):
        to_torch(params, SMALL.replace(tie_embeddings=True))
