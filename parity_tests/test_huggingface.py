"""Hugging Face's GPT-2 in and out: models made by `transformers` itself, and what is refused. Nothing is downloaded."""

import json
import os
import shutil
import subprocess
import sys

import convert_checkpoint
import huggingface_hub
import jax
import numpy as np
import pytest
import sample
import torch
import train_jax
import train_torch
from conftest import SCRIPTS, SMALL, assert_equal_bits, forward, random_pair, refused
from hugging_face import NARROW, make_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import flaxgpt
from flaxgpt.convert.files import Tensors
from flaxgpt.convert.huggingface import config_from_huggingface, config_to_huggingface, from_huggingface, to_huggingface
from flaxgpt.data.tokenizer import get_tokenizer
from flaxgpt.data.tokenizer_files import tokenizer_files
from flaxgpt.errors import InputError

TEXT = "It’s 1,234 größer\n\n  than naïve 你好 code():\treturn  x<|endoftext|>The end 🙂"


def as_arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same_model(params, cfg, theirs):
    """Logits at every position (at most 4.3e-7 apart when this was written), and greedy text."""
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, cfg.context_length))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    found = np.asarray(forward(params, cfg, ids))
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert errors.max() < 3e-6, (
        f"the logits differ by {errors.max():.1e} at (row, position) {np.unravel_index(errors.argmax(), errors.shape)}"
    )
    prompt, new = torch.from_numpy(ids[:, :4]), cfg.context_length - 4
    greedy = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    np.testing.assert_array_equal(flaxgpt.generate(params, cfg, ids[:, :4], new, temperature=0.0), greedy.numpy())


@pytest.mark.parametrize("name", ["plain", "sharded", "float16", "bfloat16"])
def test_what_save_pretrained_wrote_computes_the_same_here(folders, name):
    assert (folders / name / "model.safetensors.index.json").is_file() == (name == "sharded")
    params, cfg, tokenizer = flaxgpt.load(folders / name)
    assert cfg.tie_embeddings == (name in ("plain", "bfloat16"))
    assert tokenizer.kind == "gpt2"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_same_model(params, cfg, GPT2LMHeadModel.from_pretrained(folders / name, dtype=torch.float32).eval())


@pytest.mark.parametrize("name", ["plain", "sharded", "float16", "bfloat16"])
def test_the_round_trip_is_bit_exact_tensor_by_tensor(folders, name):
    saved = Tensors.of_folder(folders / name)
    params, cfg, _ = flaxgpt.load(folders / name)
    back = to_huggingface(params, cfg)
    assert back.keys() == saved.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, np.asarray(saved[key], np.float32), err_msg=key)
    assert_equal_bits(from_huggingface(back, cfg), params)


@pytest.mark.parametrize("tied", [True, False])
def test_keys_have_the_prefix_or_not_and_buffers_are_ignored(tied):
    model = make_model(NARROW, vocab_size=97, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)
    cfg = config_from_huggingface(model.config.to_dict())
    state_dict = as_arrays(model)
    params = from_huggingface(state_dict, cfg)
    assert_same_model(params, cfg, model)
    masks = {f"transformer.h.{i}.attn.{name}": np.ones((1, 1)) for i in range(2) for name in ("bias", "masked_bias")}
    bare = {key.removeprefix("transformer."): value for key, value in (state_dict | masks).items()}
    for other in (state_dict | masks, bare):
        assert_equal_bits(from_huggingface(other, cfg), params)
    if tied:
        del bare["lm_head.weight"]
        assert_equal_bits(from_huggingface(bare, cfg), params)
        with pytest.raises(InputError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
            from_huggingface(bare | {"lm_head.weight": bare["wte.weight"] + 1}, cfg)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in to_huggingface(params, cfg).items()}, strict=not tied)


def test_every_fault_of_a_state_dict_is_named_in_one_error():
    model = make_model(NARROW, vocab_size=97, tie_word_embeddings=False)
    cfg, state_dict = config_from_huggingface(model.config.to_dict()), as_arrays(model)
    del state_dict["transformer.h.1.attn.c_attn.bias"], state_dict["lm_head.weight"]
    state_dict |= {"transformer.h.2.ln_1.weight": np.ones(16), "score.weight": np.ones(1), "transformer.ln_f.bias": np.ones(15)}
    with pytest.raises(InputError, match="does not fit") as error:
        from_huggingface(state_dict, cfg)
    for part in (
        "missing: transformer.h.1.attn.c_attn.bias, lm_head.weight",
        "unknown: transformer.h.2.ln_1.weight, score.weight",
        "transformer.ln_f.bias is (15,), expected (16,)",
    ):
        assert part in str(error.value)


def test_a_model_without_qkv_biases_goes_out_with_zero_ones_and_comes_back():
    cfg = SMALL.replace(qkv_bias=False)
    params = random_pair(cfg)[1]
    state_dict = to_huggingface(params, cfg)
    assert not state_dict["transformer.h.1.attn.c_attn.bias"].any()
    assert_equal_bits(from_huggingface(state_dict, cfg), params)
    state_dict["transformer.h.1.attn.c_attn.bias"][3] = 1
    with pytest.raises(InputError, match=r"no such biases, but they are not zero: transformer\.h\.1\.attn\.c_attn\.bias"):
        from_huggingface(state_dict, cfg)


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_goes_out_and_comes_back(tied):
    cfg = SMALL.replace(qkv_bias=True, tie_embeddings=tied, drop_rate=0.2)
    assert config_from_huggingface(config_to_huggingface(cfg)) == cfg
    theirs = GPT2Config(**config_to_huggingface(cfg)).to_dict()
    assert config_from_huggingface(theirs) == cfg


def test_a_config_of_the_early_days_is_read():
    old = {
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
    }
    expected = flaxgpt.GPTConfig(qkv_bias=True, tie_embeddings=True, drop_rate=0.1)
    assert config_from_huggingface(old) == expected
    assert config_from_huggingface(old | {"activation_function": "gelu_pytorch_tanh", "n_inner": 3072}) == expected


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt2'"),
        ({"model_type": None}, "no model_type"),
        ({"n_layer": None, "n_head": None}, "no n_head; no n_layer"),
        ({"activation_function": "relu"}, "activation_function is 'relu', expected 'gelu_new' or 'gelu_pytorch_tanh' or 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, expected 1e-05"),
        ({"n_inner": 100}, "n_inner is 100, expected 4 n_embd"),
        ({"attn_pdrop": 0.0}, "resid_pdrop is 0.1, embd_pdrop is 0.1, attn_pdrop is 0.0: expected one rate"),
        ({"n_layer": "two"}, "n_layers='two'"),
        ({"vocab_size": 97}, r"wte\.weight is \(50257, 16\), expected \(97, 16\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_another_model_is_refused_by_name(call, plain, change, pattern):
    values = json.loads((plain / "config.json").read_text()) | change
    (plain / "config.json").write_text(json.dumps(values))
    refused(call(sample, "--init-from", plain), pattern)


def test_damaged_files_and_pickles_are_one_line(call, folders, plain, tmp_path):
    def result():
        return call(convert_checkpoint, plain, "out", "--to", "huggingface")

    weights = plain / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(result(), r"model\.safetensors is damaged")
    save_file({"transformer.wte.weight": np.ones((2, 2), np.int8)}, weights)
    refused(result(), r"not of floating-point numbers: transformer\.wte\.weight is I8")
    save_file({"transformer.wte.weight": np.ones((2, 2), np.float32)}, weights)
    refused(result(), r"missing: .*transformer\.ln_f\.bias.*wrong shape: transformer\.wte\.weight is \(2, 2\)")
    weights.unlink()
    refused(result(), r"has no model\.safetensors")
    (plain / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(result(), r"pytorch_model\.bin can run code.*safetensors")
    refused(call(sample, "--init-from", plain / "pytorch_model.bin"), r"pytorch_model\.bin is damaged or can't be read")
    for content in ("{}", '{"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}', "not json"):
        (plain / "model.safetensors.index.json").write_text(content)
        refused(result(), r"has no weight_map|lacks model-00001-of-00002\.safetensors|can't read .*index\.json")
    for content in ("[]", "not json"):
        (plain / "config.json").write_text(content)
        refused(result(), r"can't read .*config\.json")
    (plain / "config.json").unlink()
    refused(result(), r"can't read .*config\.json")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_tokenizer_that_is_not_gpt2s_is_refused(call, plain):
    def written(files, pattern):
        for name in tokenizer_files(get_tokenizer("gpt2")):
            (plain / name).unlink(missing_ok=True)
        for name, text in files.items():
            (plain / name).write_text(text, encoding="utf-8")
        if pattern is None:
            assert flaxgpt.load(plain).tokenizer.kind == "gpt2"
        else:
            refused(call(sample, "--init-from", plain), pattern)

    ours = tokenizer_files(get_tokenizer("gpt2"))
    vocab, fast = json.loads(ours["vocab.json"]), json.loads(ours["tokenizer.json"])
    swapped = json.dumps(vocab | {"!": vocab["A"], "A": vocab["!"]})
    lines = ours["merges.txt"].split("\n")
    pairs = [merge.split(" ") for merge in fast["model"]["merges"]]
    written(ours, None)
    written({"vocab.json": ours["vocab.json"], "merges.txt": ours["merges.txt"]}, None)
    written({"tokenizer.json": json.dumps(fast | {"model": fast["model"] | {"merges": pairs}})}, None)
    written({"vocab.json": swapped, "merges.txt": ours["merges.txt"]}, r"vocab\.json is not GPT-2's tokenizer")
    written({"vocab.json": ours["vocab.json"], "merges.txt": "\n".join([lines[0], lines[2], lines[1], *lines[3:]])}, r"merges\.txt is not")
    written(
        {"tokenizer.json": json.dumps(fast | {"pre_tokenizer": fast["pre_tokenizer"] | {"add_prefix_space": True}})},
        r"tokenizer\.json is not",
    )
    written({"tokenizer.json": "{}"}, r"tokenizer\.json does not describe a tokenizer")


def test_an_exported_run_is_transformers_own(call, tmp_path, monkeypatch):
    """Trained here, exported, loaded there and loaded back."""
    run = (
        "--tokenizer",
        "gpt2",
        "--n-layers",
        2,
        "--n-heads",
        2,
        "--emb-dim",
        16,
        "--context-length",
        16,
        "--batch-size",
        2,
        "--max-steps",
        2,
    )
    assert call(train_torch, *run, "--no-tie-embeddings", "--eval-batches", 1, "--sample-tokens", 0, "--out-dir", "a")[0] == 0
    code, out, err = call(convert_checkpoint, "a", "b", "--to", "huggingface")
    assert code == 0, err
    assert "no biases on query, key and value" in out
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    }
    assert {path.name for path in (tmp_path / "b").iterdir()} == expected
    before = {path: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    refused(call(convert_checkpoint, "a", "b", "--to", "huggingface"), "b exists")
    refused(call(convert_checkpoint, "a", "absent/b", "--to", "huggingface"), "no folder .*absent")
    assert {path: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before

    ours, theirs = flaxgpt.load("a"), AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert isinstance(theirs, GPT2LMHeadModel)
    assert theirs.lm_head.weight is not theirs.transformer.wte.weight
    assert_same_model(ours.params, ours.cfg, theirs)
    back = flaxgpt.load("b")
    ids = np.arange(16)[None]
    np.testing.assert_array_equal(forward(back.params, ours.cfg.replace(qkv_bias=True), ids), forward(back.params, back.cfg, ids))
    for name, tensor in to_huggingface(ours.params, ours.cfg).items():
        np.testing.assert_array_equal(load_file(tmp_path / "b" / "model.safetensors")[name], tensor, err_msg=name)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokenizer.is_fast
    assert tokenizer(TEXT)["input_ids"] == get_tokenizer("gpt2").encode(TEXT)
    assert tokenizer.decode(get_tokenizer("gpt2").encode(TEXT)) == TEXT
    assert len(tokenizer) == 50257


def test_a_tied_model_goes_out_as_it_came_in(call, folders, tmp_path):
    assert call(convert_checkpoint, folders / "plain", "out", "--to", "huggingface")[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (folders / "plain", tmp_path / "out"))
    assert_equal_bits(after, before)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    params, cfg, _ = flaxgpt.load(tmp_path / "out")
    assert_same_model(params, cfg, theirs)


def test_a_run_of_characters_goes_out_with_its_tokenizer_and_comes_back(call, tmp_path):
    run = ("--n-layers", 1, "--n-heads", 2, "--emb-dim", 16, "--context-length", 8, "--batch-size", 2, "--max-steps", 1)
    assert call(train_torch, *run, "--eval-batches", 1, "--sample-tokens", 0, "--out-dir", "a")[0] == 0
    assert call(convert_checkpoint, "a", "b", "--to", "huggingface")[0] == 0
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == expected
    ours, back = flaxgpt.load("a"), flaxgpt.load("b")
    assert back.tokenizer.to_dict() == ours.tokenizer.to_dict()
    text = ours.tokenizer.chars[::-1]
    assert AutoTokenizer.from_pretrained(tmp_path / "b")(text)["input_ids"] == ours.tokenizer.encode(text)
    assert_same_model(ours.params, ours.cfg, AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval())
    refused(call(train_jax, "--init-from", "a", "--out-dir", "c"), "needs the tokenizer gpt2.*the source's is char")


def test_a_model_in_the_hubs_cache_is_found_offline(folders, tmp_path):
    cached = tmp_path / "hub" / "models--openai-community--gpt2"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for file in (folders / "plain").iterdir():
        shutil.copy(file, cached / "blobs" / file.name)
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    program = """
import sys, flaxgpt
for name in ("gpt2", "openai-community/gpt2", sys.argv[1]):
    print(flaxgpt.load(name).cfg.emb_dim)
try:
    flaxgpt.load("gpt2-xl")
except flaxgpt.InputError as error:
    print(error)
"""
    (tmp_path / "empty").mkdir()
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPTS.parent)}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", program, str(snapshot)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path / "empty", check=False)
    assert done.returncode == 0, done.stderr
    *sizes, error = done.stdout.splitlines()
    assert sizes == ["16"] * 3
    assert "openai-community/gpt2-xl is not in the hub's cache, and HF_HUB_OFFLINE is set" in error


@pytest.mark.parametrize(
    ("name", "error", "pattern"),
    [
        ("runs/absent", "RepositoryNotFoundError", "no file or folder runs/absent, and the hub has no model runs/absent"),
        ("gpt2", "GatedRepoError", "none that you may read"),
        ("gpt2", "LocalEntryNotFoundError", "gpt2 is not in the hub's cache, and the hub can't be reached"),
        ("gpt2", "HfHubHTTPError", "can't be had from the hub"),
        ("a/b/c/d", None, "no file or folder a/b/c/d, and it is no id of a model on the hub"),
    ],
)
def test_what_the_hub_refuses_is_one_line(call, monkeypatch, name, error, pattern):
    def snapshot_download(*_, **__):
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if error:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused(call(sample, "--init-from", name, "--prompt", "a"), pattern)


def test_without_huggingface_hub_the_line_says_how_to_install_it(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(call(sample, "--init-from", "gpt2", "--prompt", "a"), r'no file or folder gpt2.*huggingface_hub: pip install -e "\.\[hf\]"')
