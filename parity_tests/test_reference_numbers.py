"""Published outputs of the reference: a GPT-2 124M taught in a well-known course on building an LLM from scratch.

The torch side reproduces them after `torch.manual_seed(123)`; its weights carried over give the same here.
"""

import jax
import numpy as np
import pytest
import torch
from conftest import assert_close, forward

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.params import from_torch
from flaxgpt.data.corpora import load_corpus
from flaxgpt.data.tokenizer import get_tokenizer
from flaxgpt.generation.generate import generate
from flaxgpt.loss import next_token_loss
from flaxgpt.run.folder import read_metrics
from flaxgpt.run.log import RunLog
from flaxgpt.run.setup import prepare
from flaxgpt.step import make_eval_step
from torch_ref.data.loader import create_dataloaders
from torch_ref.generation.generate import generate_text_simple
from torch_ref.model import GPTModel
from torch_ref.step import calc_loss_loader, evaluate_model
from torch_ref.train import train

pytestmark = pytest.mark.usefixtures("all_cores")

VERDICT = TrainConfig.preset("verdict-124m")
SHAPE = {"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
SEVEN = SHAPE | {"drop_rate": 0.1, "qkv_bias": False}
INPUTS = np.array([[16833, 3626, 6100], [40, 1107, 588]])
TARGETS = np.array([[3626, 6100, 345], [1107, 588, 11311]])
EFFORT = " rentingetic wasnم refres RexMeCHicular stren"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(123)
    return GPTModel(SEVEN).eval()


@pytest.fixture(scope="module")
def params(reference):
    return jax.device_put(from_torch(reference.state_dict(), VERDICT.model))


def test_the_preset_is_the_published_config(reference):
    assert {name: getattr(VERDICT.model, name) for name in SEVEN} == SEVEN
    assert sum(p.numel() for p in reference.parameters()) == 162_419_712


def test_greedy_text_of_the_untrained_model(reference, params):
    tokenizer = get_tokenizer("gpt2")
    prompt = np.array([tokenizer.encode("Every effort moves you")])
    theirs = generate_text_simple(reference, torch.from_numpy(prompt), 10, 256)
    assert tokenizer.decode(theirs[0].tolist()) == "Every effort moves you" + EFFORT
    np.testing.assert_array_equal(generate(params, VERDICT.model, prompt, 10), theirs)


def test_softmax_argmax_loss_and_perplexity_of_the_untrained_model(reference, params):
    tokenizer = get_tokenizer("gpt2")
    with torch.no_grad():
        theirs = reference(torch.from_numpy(INPUTS))
    ours = forward(params, VERDICT.model, INPUTS)
    assert_close("logits, 124M", ours, theirs, 5e-6)
    for logits in (ours, theirs.numpy()):
        probabilities = np.asarray(jax.nn.softmax(logits))
        assert probabilities.shape == (2, 3, 50257)
        assert probabilities.argmax(-1).tolist() == [[16657, 339, 42826], [49906, 29669, 41751]]
        assert tokenizer.decode([16657, 339, 42826]) == " Armed heNetflix"
        chosen = np.take_along_axis(probabilities, TARGETS[..., None], axis=-1)[..., 0]
        published = [[7.4541e-05, 3.1061e-05, 1.1563e-05], [1.0337e-05, 5.6776e-05, 4.7559e-06]]
        np.testing.assert_allclose(chosen, published, rtol=5e-5)  # five digits are published
        loss = next_token_loss(logits, TARGETS)
        assert float(loss) == pytest.approx(10.7940, abs=5e-5)
        # The published perplexity is exp of the float32 loss, which is good to about 1e-6: 0.05 here.
        assert float(np.exp(loss)) == pytest.approx(48725.82, abs=0.1)


def test_batched_decoding_at_context_1024():
    torch.manual_seed(123)
    model = GPTModel(SEVEN | {"context_length": 1024}).eval()
    cfg = GPTConfig(**SEVEN | {"context_length": 1024})
    params = jax.device_put(from_torch(model.state_dict(), cfg))
    hello = np.array([[15496, 11, 314, 716]])
    expected = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert generate_text_simple(model, torch.from_numpy(hello), 10, 1024)[0, 4:].tolist() == expected
    two = np.array([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    together = generate(params, cfg, np.concatenate([hello, two]), 10)
    assert together[0, 4:].tolist() == expected
    for i in range(2):
        alone = generate_text_simple(model, torch.from_numpy(two[i : i + 1]), 5, 1024)[0]
        np.testing.assert_array_equal(together[i + 1, : len(alone)], alone)


def test_the_data_of_the_published_run(verdict):
    tokenizer = get_tokenizer("gpt2")
    assert (len(verdict), len(tokenizer.encode(verdict))) == (20479, 5145)
    corpus = load_corpus("the-verdict", "gpt2", 0.9)
    assert tokenizer.decode(corpus.train[:].tolist()) == verdict[: int(0.9 * 20479)]
    train_loader, val_loader = create_dataloaders(corpus.train, corpus.val, VERDICT)
    assert [tuple(inputs.shape) for inputs, _ in train_loader] == [(2, 256)] * 9
    assert [tuple(inputs.shape) for inputs, _ in val_loader] == [(2, 256)]


def test_an_empty_loader_has_loss_nan(reference):
    assert np.isnan(calc_loss_loader(reference, [], 5))


def test_the_validation_loss_before_training_on_both_sides(verdict, reference, params):
    corpus = load_corpus("the-verdict", "gpt2", 0.9)
    _, val_loader = create_dataloaders(corpus.train, corpus.val, VERDICT)
    assert calc_loss_loader(reference, val_loader, 99) == pytest.approx(10.98110, abs=1e-5)
    [(inputs, targets)] = val_loader
    loss = jax.jit(make_eval_step(VERDICT.model))(params, (inputs.numpy(), targets.numpy()))
    assert float(loss) == pytest.approx(10.98110, abs=1e-5)


@pytest.mark.slow  # 48 s of one core: ten batches through 162 million parameters on each side
def test_losses_before_training_on_both_sides(verdict, reference, params):
    corpus = load_corpus("the-verdict", "gpt2", 0.9)
    train_loader, val_loader = create_dataloaders(corpus.train, corpus.val, VERDICT)
    torch.manual_seed(123)
    train_loss, val_loss = evaluate_model(reference, train_loader, val_loader, VERDICT.replace(eval_batches=99))  # all there are
    assert train_loss == pytest.approx(10.98758, abs=1e-5)
    assert val_loss == pytest.approx(10.98110, abs=1e-5)
    eval_step = jax.jit(make_eval_step(VERDICT.model))
    for loader, published in ((train_loader, 10.98758), (val_loader, 10.98110)):
        losses = [float(eval_step(params, (inputs.numpy(), targets.numpy()))) for inputs, targets in loader]
        assert np.mean(losses) == pytest.approx(published, abs=1e-5)


@pytest.mark.slow  # about 80 s on two cores
def test_the_published_training_run_at_steps_0_and_5(verdict, tmp_path):
    cfg, corpus = prepare(VERDICT.replace(max_steps=6, sample_tokens=0), tmp_path / "run")
    with RunLog(tmp_path / "run") as log:
        train(cfg, corpus, log)
    losses = {r["step"]: [r["train/loss"], r["val/loss"]] for r in read_metrics(tmp_path / "run") if "val/loss" in r}
    assert losses.keys() == {0, 5}
    assert losses[0] == pytest.approx([9.781, 9.933], abs=6e-4)
    assert losses[5] == pytest.approx([8.111, 8.339], abs=6e-4)
