"""Models in and out in every format but Hugging Face's (`test_huggingface.py`): nanoGPT's checkpoints, state_dicts, run folders."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import jax
import nanogpt
import numpy as np
import parity_report
import pytest
import sample
import torch
import train_jax
import train_torch
from conftest import ONE_LAYER, SCRIPTS, SMALL, assert_equal_bits, forward, random_ids, random_pair, refused
from hugging_face import NARROW, make_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_huggingface import assert_same_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import flaxgpt
from flaxgpt.convert.nanogpt import config_from_nanogpt, config_to_nanogpt
from flaxgpt.convert.params import cropped, named_parameters
from flaxgpt.data.tokenizer import CharTokenizer, get_tokenizer
from flaxgpt.data.tokenizer_files import meta_bytes, read_meta, read_tokenizer, tokenizer_files
from flaxgpt.errors import InputError
from flaxgpt.generation.text import complete_text, stream
from flaxgpt.run.cli import parse_train
from flaxgpt.run.export import export
from flaxgpt.run.source import Source, open_source
from torch_ref import checkpoint as torch_checkpoint

TEXT = "".join(sorted(set("\x00\t\n\r\x1f !\"#'.\\abĠéẞ́‍\u2028\u3000你🙂<unk>")))
TINY = SMALL.replace(vocab_size=len(nanogpt.CHARS), tie_embeddings=True, bias=False, activation="gelu")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A model without biases and with exact GELU, as nanoGPT's are, in our own safetensors."""
    path = tmp_path_factory.mktemp("formats") / "model.safetensors"
    export(Source(path, TINY, CharTokenizer(nanogpt.CHARS), random_pair(TINY)[1]), path, "safetensors")
    return path


@pytest.fixture
def pickles_read_here(monkeypatch):
    """What a process of its own runs to read a pickle runs in this one: starting it, and importing torch there, takes two seconds."""

    def run(command, **_):
        assert command[:3] == [sys.executable, "-m", torch_checkpoint.__name__]
        code, said = 0, io.StringIO()
        with monkeypatch.context() as patched, contextlib.redirect_stderr(said):
            patched.setattr(sys, "argv", command[2:])
            try:
                torch_checkpoint.main()
            except SystemExit as stop:
                code = stop.code
        return subprocess.CompletedProcess(command, code, stderr=said.getvalue())

    monkeypatch.setattr("flaxgpt.convert.files.subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))


def assert_same_logits(found, expected):
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert errors.max() < 3e-6, f"the logits differ by {errors.max():.1e}"  # 1.1e-6 when this was written


@pytest.mark.parametrize("bias", [False, True])
def test_a_checkpoint_of_nanogpt_computes_the_same_here_on_both_sides(tmp_path, bias):
    weights = nanogpt.save_checkpoint(tmp_path / "out", bias)
    nanogpt.save_meta(tmp_path / "out" / "meta.pkl")
    ours, theirs = flaxgpt.load(tmp_path / "out" / "ckpt.pt"), torch_checkpoint.load(tmp_path / "out")
    assert (ours.cfg.bias, ours.cfg.qkv_bias, ours.cfg.activation, ours.cfg.tie_embeddings) == (bias, bias, "gelu", True)
    assert ours.tokenizer.chars == theirs.tokenizer.chars == nanogpt.CHARS
    ids = random_ids(ours.cfg, (2, 16))
    expected = nanogpt.logits(weights, nanogpt.ARGS, torch.from_numpy(ids)).numpy()
    for found in (forward(ours.params, ours.cfg, ids), theirs.model(torch.from_numpy(ids)).detach().numpy()):
        assert_same_logits(found, expected)


@pytest.mark.usefixtures("pickles_read_here")
@pytest.mark.parametrize("to", ["run", "huggingface", "nanogpt", "torch", "safetensors"])
def test_every_format_comes_back_as_it_went_out(call, file, to):
    code, out, err = call(convert_checkpoint, file, "out", "--to", to)
    assert code == 0, err
    before, after = flaxgpt.load(file), flaxgpt.load("out")
    assert after.tokenizer.to_dict() == before.tokenizer.to_dict()
    if to == "huggingface":
        assert "no biases anywhere" in out
        assert after.cfg == TINY.replace(bias=True, qkv_bias=True)
        for name, tensor in named_parameters(after.params, after.cfg).items():
            expected = named_parameters(before.params, before.cfg).get(name, np.zeros_like(tensor))
            np.testing.assert_array_equal(tensor, expected, err_msg=name)
    else:
        assert after.cfg == before.cfg
        assert_equal_bits(after.params, before.params)
    refused(call(convert_checkpoint, file, "out", "--to", to), "out exists")
    if to == "run":
        assert "--resume does not" in out
        refused(call(train_jax, "--out-dir", "out", "--resume"), "no state of an optimizer.*--init-from out")
        code, text, err = call(sample, "--checkpoint", "out", "--prompt", "ab", "--max-new-tokens", 9)
        assert (code, len(text)) == (0, 12), err


@pytest.mark.usefixtures("pickles_read_here")
def test_what_is_trained_here_is_the_same_reloaded_and_in_transformers(call, tmp_path):
    shape = ("--n-layers", 2, "--n-heads", 2, "--emb-dim", 16, "--context-length", 120, "--qkv-bias", "--activation", "gelu")
    run = (*shape, "--tokenizer", "gpt2", "--batch-size", 2, "--max-steps", 2, "--warmup-steps", 0, "--learning-rate", 0.01)
    assert call(train_jax, *run, "--eval-batches", 1, "--sample-tokens", 0, "--out-dir", "run")[0] == 0
    for target, to, options in (("hf", "huggingface", ("--shard-gb", 0.002)), ("model.pth", "torch", ())):
        code, _, err = call(convert_checkpoint, "run", target, "--to", to, *options)
        assert code == 0, err
    with pytest.raises(InputError, match=r"a run of train_jax\.py.*--to torch first"):
        torch_checkpoint.load("run")
    before = flaxgpt.load("run")
    ids = random_ids(before.cfg, (1, 120))
    for target in ("hf", "model.pth"):
        after = flaxgpt.load(target)
        assert_equal_bits(after.params, before.params)
        np.testing.assert_array_equal(forward(after.params, after.cfg, ids), forward(before.params, before.cfg, ids))
    assert len(list((tmp_path / "hf").glob("model-0000?-of-00002.safetensors"))) == 2
    theirs, prompt = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), torch.from_numpy(ids[:, :20])
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(flaxgpt.generate(before.params, before.cfg, ids[:, :20], 100), greedy.numpy())


def test_exact_gelu_of_hugging_face_is_exact_here():
    model = make_model(NARROW, vocab_size=97, activation_function="gelu", bos_token_id=None, eos_token_id=None)
    cfg = flaxgpt.GPTConfig(vocab_size=97, context_length=24, emb_dim=16, n_heads=2, n_layers=2, qkv_bias=True, tie_embeddings=True)
    params = flaxgpt.from_huggingface({name: tensor.numpy() for name, tensor in model.state_dict().items()}, cfg)
    assert_same_model(params, cfg.replace(activation="gelu"), model)
    with pytest.raises(AssertionError, match="the logits differ by"):
        assert_same_model(params, cfg, model)


@pytest.mark.usefixtures("pickles_read_here")
def test_a_state_dict_of_the_reference_comes_in_with_masks_and_prefixes_or_without(call):
    model, params = random_pair(SMALL)
    course = {"model_state_dict": model.state_dict(), "config": {**SMALL.to_dict(), "drop_rate": 0.0}}
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}, "bare.pth")
    torch.save(course, "named.pth")
    torch_checkpoint.save_model(model, Path("bare.safetensors"))
    for name in ("bare.pth", "bare.safetensors"):
        loaded = flaxgpt.load(name, n_heads=4)
        assert loaded.cfg == SMALL
        assert loaded.tokenizer is None
        assert_equal_bits(loaded.params, params)
    assert_equal_bits(flaxgpt.load("named.pth").params, params)
    refused(call(sample, "--init-from", "bare.safetensors"), r"does not say how many attention heads.*--n-heads N")
    refused(call(convert_checkpoint, "bare.safetensors", "out", "--to", "run", "--n-heads", 4), "what its tokens mean.*--meta")
    assert call(convert_checkpoint, "bare.safetensors", "out.safetensors", "--to", "safetensors", "--n-heads", 4)[0] == 0
    assert flaxgpt.load("out.safetensors").cfg == SMALL
    refused(call(convert_checkpoint, "out.safetensors", "out", "--to", "torch", "--n-heads", 4), "has its own config")
    refused(call(sample, "--init-from", "out.safetensors"), r"not known what the tokens of out\.safetensors mean")


@pytest.mark.usefixtures("pickles_read_here")
def test_files_are_recognised_by_what_is_in_them(call, file):
    Path("weights.bin").write_bytes(file.read_bytes())
    torch.save({"model_state_dict": random_pair(SMALL)[0].state_dict(), "config": SMALL.to_dict()}, "really-a-pickle.safetensors")
    assert flaxgpt.load("weights.bin").cfg == TINY
    assert flaxgpt.load("really-a-pickle.safetensors").cfg == SMALL


def test_safetensors_whose_first_byte_is_that_of_a_pickle_are_safetensors(file, tmp_path):
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    for n in range(0, 256, 8):  # the file begins with the length of the header, a multiple of 8
        save_file(load_file(file), tmp_path / "model", metadata | {"filler": "x" * n})
        if (tmp_path / "model").read_bytes()[:1] == b"\x80":
            break
    else:
        raise AssertionError("no header had this length")
    assert flaxgpt.load(tmp_path / "model").cfg == TINY


def test_the_scripts_take_a_file_in_place_of_a_folder(call):
    cfg = SMALL.replace(vocab_size=50304, qkv_bias=True, emb_dim=8, n_layers=1, activation="gelu", tie_embeddings=True)
    export(Source(Path("a"), cfg, get_tokenizer("gpt2"), random_pair(cfg)[1]), Path("padded"), "safetensors")
    code, out, err = call(sample, "--init-from", "padded", "--prompt", "The end", "--max-new-tokens", 9)
    assert code == 0, err
    code, out, err = call(parity_report, "--init-from", "padded", "--rungs", 1, "--length", 8)
    assert code == 0, out + err
    run = ("--init-from", "padded", "--batch-size", 2, "--eval-batches", 1, "--sample-tokens", 3, "--context-length", 8, "--max-steps", 1)
    no_update = ("--learning-rate", 0, "--min-learning-rate", 0)
    for trainer in (train_jax, train_torch):
        code, _, err = call(trainer, *run, *no_update, "--out-dir", trainer.__name__)
        assert code == 0, err
        tuned = flaxgpt.load(trainer.__name__)
        assert tuned.cfg == cfg.replace(vocab_size=50257, context_length=8), "the padding and the last positions are left out"
        assert_equal_bits(tuned.params, cropped(flaxgpt.load("padded").params, tuned.cfg))


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_is_cropped_to_the_same_logits(tied):
    cfg = SMALL.replace(tie_embeddings=tied)
    params, smaller = random_pair(cfg)[1], cfg.replace(vocab_size=90, context_length=9)
    ids = random_ids(smaller, (2, 9))
    whole = flaxgpt.forward(params, cfg, ids)[..., :90]
    np.testing.assert_allclose(flaxgpt.forward(cropped(params, smaller), smaller, ids), whole, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_pad_the_vocabulary_are_never_written(temperature):
    tokenizer, params = CharTokenizer("abcdef"), random_pair(ONE_LAYER)[1]
    key, settings = jax.random.key(0), flaxgpt.SamplingConfig(temperature=temperature, banned=(2,))
    as_many = settings.replace(banned=(2,) * (ONE_LAYER.vocab_size - 6 + 1))  # which compiles to the program of the rest
    free = flaxgpt.generate(params, ONE_LAYER, [[0, 1]], 40, as_many, key=key)[0, 2:]
    assert 2 not in free
    assert free.max() >= 6, "the model itself does not want to write them, so nothing is tested"
    (text,) = complete_text(params, ONE_LAYER, tokenizer, ["ab"], 40, settings, key=key)
    assert set(text.ids) <= {0, 1, 3, 4, 5}
    assert "".join(stream(params, ONE_LAYER, tokenizer, "ab", 40, settings, key=key)) == text.text


def test_a_padded_model_goes_to_hugging_face_with_its_padding_suppressed(tmp_path):
    cfg = SMALL.replace(vocab_size=50304, emb_dim=8, tie_embeddings=True, qkv_bias=True)
    source = Source(tmp_path, cfg, get_tokenizer("gpt2"), random_pair(cfg)[1])
    (note,) = export(source, tmp_path / "out", "huggingface")
    assert "padded from 50257 to 50304" in note
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == [*range(50257, 50304)]
    back = flaxgpt.load(tmp_path / "out")
    assert (back.cfg, back.tokenizer.vocab_size) == (cfg, 50257)


def test_the_config_of_nanogpt_goes_both_ways_and_other_models_are_refused_by_name(call, tmp_path):
    args = {**nanogpt.ARGS, "bias": False}
    assert config_to_nanogpt(config_from_nanogpt(args)) == args
    for change, named in (({"rope": True}, "rope is not known"), ({"n_head": 5}, "n_heads=5"), ({"dropout": "no"}, "drop_rate='no'")):
        with pytest.raises(InputError, match=named):
            config_from_nanogpt(args | change)
    del args["bias"]
    with pytest.raises(InputError, match="no bias"):
        config_from_nanogpt(args)
    source = Source(tmp_path, SMALL, CharTokenizer(TEXT), random_pair(SMALL)[1])
    with pytest.raises(InputError, match=r"tie_embeddings is off; its GELU is the tanh approximation"):
        export(source, tmp_path / "ckpt.pt", "nanogpt", write_pickle=torch_checkpoint.write_pickle)
    assert [*tmp_path.iterdir()] == []


def test_nanogpts_own_strict_names_are_written(file, tmp_path):
    source = open_source(file)
    export(source, tmp_path / "ckpt.pt", "nanogpt", write_pickle=torch_checkpoint.write_pickle)
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "bias": False, "vocab_size": TINY.vocab_size, "dropout": 0.0}
    assert saved["model_args"] == args
    assert saved["model"].keys() == nanogpt.random_weights(False, args).keys()
    assert saved["model"]["lm_head.weight"].data_ptr() == saved["model"]["transformer.wte.weight"].data_ptr(), "it is saved twice"
    ids = random_ids(TINY, (2, 16))
    expected = nanogpt.logits(saved["model"], args, torch.from_numpy(ids)).numpy()
    assert_same_logits(forward(flaxgpt.load(file).params, TINY, ids), expected)
    assert (tmp_path / "meta.pkl").is_file()
    with pytest.raises(InputError, match=r"meta\.pkl exists"):
        export(source, tmp_path / "other.pt", "nanogpt", write_pickle=torch_checkpoint.write_pickle)
    assert not (tmp_path / "other.pt").exists()


class Evil:
    """What a pickle can do: run a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def test_no_pickle_is_ever_executed(call, tmp_path):
    torch.save({"model": Evil(), "model_args": {}}, "evil.pt")
    Path("legacy.pth").write_bytes(pickle.dumps(Evil()))
    refused(call(convert_checkpoint, "evil.pt", "made", "--to", "safetensors"), "not a state_dict that can be read safely")
    refused(call(sample, "--init-from", "legacy.pth"), "not a state_dict that can be read safely")
    nanogpt.save_checkpoint(tmp_path / "out", bias=False)
    Path("out/meta.pkl").write_bytes(pickle.dumps({"stoi": Evil(), "itos": {}}))
    refused(call(convert_checkpoint, "out", "made", "--to", "run"), r"meta\.pkl is not a nanoGPT vocabulary.*names (posix|nt)\.system")
    refused(call(convert_checkpoint, "out", "made", "--to", "run", "--meta", "absent.pkl"), r"can't read absent\.pkl")
    assert not Path("executed").exists()
    assert not Path("made").exists()


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), pickle.dumps({"stoi": {"a": 0}})[:-4], b"", b"\x80", b"I1\n."], ids=range(5))
def test_what_is_no_vocabulary_of_nanogpt_is_refused(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.pkl is not a nanoGPT vocabulary of characters that can be read safely"):
        read_meta(tmp_path / "meta.pkl")


def test_what_would_be_rounded_or_overwritten_is_said(call, file, tmp_path):
    wide = {name: tensor.astype(np.float64) for name, tensor in load_file(file).items()}
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    save_file(wide, tmp_path / "wide.safetensors", metadata)
    code, out, _ = call(convert_checkpoint, tmp_path / "wide.safetensors", tmp_path / "out", "--to", "safetensors")
    assert code == 0
    assert "float64 tensors were rounded to float32: final_norm.scale" in out
    save_file({"_orig_mod.tok_emb.weight": wide["tok_emb.weight"], **wide}, tmp_path / "twice.safetensors", metadata)
    refused(
        call(convert_checkpoint, tmp_path / "twice.safetensors", "x", "--to", "run"), "twice, with and without _orig_mod.: _orig_mod.tok"
    )


def test_a_vocabulary_of_nanogpt_comes_in_and_goes_out(tmp_path):
    nanogpt.save_meta(tmp_path / "meta.pkl", TEXT)
    assert read_meta(tmp_path / "meta.pkl").chars == TEXT
    assert pickle.loads(meta_bytes(CharTokenizer(TEXT))) == pickle.loads((tmp_path / "meta.pkl").read_bytes())
    wrong = ({"stoi": {"a": 0, "b": 2}}, {"itos": {0: "a"}}, {"stoi": {"b": 0, "a": 1}, "itos": {0: "b", 1: "a"}}, {"stoi": {"ab": 0}})
    for changes in wrong:
        nanogpt.save_meta(tmp_path / "meta.pkl", "ab", **changes)
        with pytest.raises(InputError, match="single characters, numbered in code point order"):
            read_meta(tmp_path / "meta.pkl")


@pytest.mark.usefixtures("pickles_read_here")
@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda path: path.write_bytes(b""), "is damaged or can't be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "is damaged or can't be read"),
        (lambda path: path.write_bytes(b"PK\3\4 and no more"), "not a state_dict that can be read safely"),
        (lambda path: torch.save([1, 2], path), "holds no state_dict"),
        (lambda path: torch.save({"model": {}, "model_args": {"n_layer": torch.ones(1)}}, path), "by what is no plain value"),
        (lambda path: torch.save({"model": {}, "model_args": {"n_layer": 2}}, path), "no n_head; no n_embd"),
        (lambda path: torch.save({"lm_head.weight": torch.ones(2, 2), "wte.weight": torch.ones(2, 2)}, path), "in a folder with a config"),
        (lambda path: torch.save({"wte.weight": torch.ones(2, 2).to_sparse()}, path), "wte.weight is sparse_coo of float32"),
        (
            lambda path: torch.save({"wte.weight": torch.ones(2, dtype=torch.int8)}, path),
            "spoilt has tensors .* wte.weight is strided of int8",
        ),
        (lambda path: torch.save({"h": torch.ones(1), "f": os.getcwd}, path), r"would run \w+\.getcwd"),
        (lambda path: torch.save({"_orig_mod.tok_emb.weight": torch.ones(1), "tok_emb.weight": torch.ones(1)}, path), "attention heads"),
        (lambda path: save_file({"x": np.ones(2, np.float32)}, path), "neither a state_dict of the reference nor .*: it has x"),
        (lambda path: save_file(load_file(path), path, {"flaxgpt": "["}), "describes its model by damaged metadata"),
        (lambda path: save_file(load_file(path), path, {"flaxgpt": '{"config": {"width": 3}}'}), "unknown GPTConfig fields"),
        (lambda path: save_file({**load_file(path), "tok_emb.x": np.ones(1)}, path, {"flaxgpt": '{"config": {}}'}), "unknown: tok_emb.x"),
    ],
    ids=range(15),
)
def test_what_is_wrong_with_a_file_is_one_line(call, file, tmp_path, make, pattern):
    path = tmp_path / "spoilt"
    path.write_bytes(file.read_bytes())
    make(path)
    refused(call(convert_checkpoint, path, "out", "--to", "torch"), pattern)
    assert [*tmp_path.iterdir()] == [path]


def test_without_torch_the_line_says_how_to_install_it(call, monkeypatch, file):
    torch.save({}, "model.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(call(sample, "--init-from", "model.pth"), r'only torch reads safely: pip install -e "\.\[parity\]" \(or "flaxgpt\[parity\]"\)')
    monkeypatch.delitem(sys.modules, "torch_ref.checkpoint")
    refused(call(convert_checkpoint, file, "out", "--to", "torch"), r'--to torch needs torch: pip install -e "\.\[parity\]"')


def test_the_reference_loads_the_same_things(file, folders):
    for source in (file, folders / "plain"):
        ours, theirs = flaxgpt.load(source), torch_checkpoint.load(source)
        assert theirs.cfg == ours.cfg
        for name, tensor in named_parameters(ours.params, ours.cfg).items():
            np.testing.assert_array_equal(theirs.model.state_dict()[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--block_size=64", "--n_layer=4"], "--block_size -> --context-length; --n_layer -> --n-layers"),
        (
            ["--max_iters", "2000", "--compile=False", "--device=cpu"],
            "--max_iters -> --max-steps; --compile -> leave it out.*; --device ->",
        ),
        (["--bias=False"], "--bias -> --bias or --no-bias"),
        (["--gradient-accumulation-steps", "8"], "--grad-accum-steps; --batch-size is that of a whole update"),
        (["config/train_shakespeare_char.py"], "a config is not a file here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("trainer", [train_jax, train_torch], ids=lambda m: m.__name__)
def test_flags_of_nanogpt_are_answered_with_ours(call, tmp_path, trainer, flags, named):
    refused(call(trainer, *flags), named)
    assert [*tmp_path.iterdir()] == []


def test_every_flag_that_nanogpt_is_answered_with_is_one_of_ours(capsys):
    from flaxgpt.run import cli

    with pytest.raises(SystemExit):
        parse_train("", ["--help"])
    ours = capsys.readouterr().out
    for theirs, answer in cli._FLAGS_OF_NANOGPT.items():
        for word in answer.replace(";", " ").replace(",", " ").split():
            assert not word.startswith("--") or word in ours, f"--{theirs} is answered with {word}, which is no flag"


def test_a_tokenizer_of_characters_is_exactly_that_of_the_package_tokenizers(tmp_path):
    ours = CharTokenizer(TEXT)
    for name, text in tokenizer_files(ours).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*TEXT, TEXT, TEXT[::-1], "\r\n\r\n  a\n\n", "<unk>" if set("<unk>") <= set(TEXT) else "a", ""):
        assert theirs.encode(text).ids == ours.encode(text), repr(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text, repr(text)
    with pytest.raises(Exception, match="Missing"):
        theirs.encode("aZ")
    back = read_tokenizer(tmp_path, len(TEXT) + 3)
    assert back.to_dict() == ours.to_dict()
    with pytest.raises(InputError, match=f"has {len(TEXT)} tokens, but the model's vocab_size is {len(TEXT) - 1}"):
        read_tokenizer(tmp_path, len(TEXT) - 1)
    lower = json.loads((tmp_path / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(lower))
    with pytest.raises(InputError, match="nor one of characters as flaxgpt writes it"):
        read_tokenizer(tmp_path, len(TEXT))


MEASURE = """
import os, resource, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, flaxgpt.checkpoint
from flaxgpt import sharding
from flaxgpt.config import TrainConfig
from flaxgpt.optim import make_optimizer
from flaxgpt.run.export import export
from flaxgpt.run.source import open_source
from flaxgpt.state import create_state
from pathlib import Path

folder, what = sys.argv[1:]
jax.numpy.zeros(1).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
source = open_source(folder)
if what == "load":
    kept = flaxgpt.load(folder)
elif what == "export":
    export(source, Path(folder).with_name("out"), "huggingface", shard_bytes=20_000_000)
else:
    cfg = TrainConfig(model=source.cfg, fsdp=4)
    kept = jax.block_until_ready(create_state(cfg, make_optimizer(cfg), sharding.make_mesh(4), source.params))
print((peak() - before) / sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A folder of 103 MB."""
    cfg = flaxgpt.GPTConfig(vocab_size=1000, context_length=64, emb_dim=512, n_heads=8, n_layers=8, qkv_bias=True, tie_embeddings=True)
    path = tmp_path_factory.mktemp("large") / "model"
    export(Source(path, cfg, None, random_pair(cfg)[1]), path, "huggingface")
    return path


@pytest.mark.parametrize(("what", "copies"), [("load", 1), ("create_state", 3), ("export", 0)])
def test_no_second_copy_of_a_model_is_in_memory(large, what, copies):
    """A state is three copies: the parameters and both moments. An export holds one file of the result at a time."""
    command = [sys.executable, "-c", MEASURE, str(large), what]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < copies + 0.75, f"{what} takes {float(done.stdout):.2f} times the size of the file"
