"""The third side of the ladder can fail, and is what `transformers` computes. (test_ladder.py climbs all of it.)"""

import numpy as np
import pytest
import torch
from bugs import BUGS, planted
from conftest import SMALL
from test_bugs import FAST
from test_ladder import HUGGING_FACE, climb
from transformers import GPT2LMHeadModel, TopKLogitsWarper
from transformers.models.gpt2 import modeling_gpt2

import flaxgpt
from flaxgpt.config import TrainConfig
from flaxgpt.convert.huggingface import from_huggingface
from flaxgpt.convert.params import named_parameters
from flaxgpt.parity import flax_side
from flaxgpt.parity.bounds import BOUNDS
from flaxgpt.parity.compare import compare
from flaxgpt.parity.problem import make_problem
from torch_ref.parity import huggingface_side


@pytest.fixture(scope="module")
def problem():
    return make_problem(TrainConfig(model=SMALL.replace(qkv_bias=True, drop_rate=0.1)), batch=4, steps=2)


def option(**options):
    """A config.json with which Hugging Face's model is another one."""

    def change(monkeypatch):
        usual = huggingface_side.config_to_huggingface
        monkeypatch.setattr(huggingface_side, "config_to_huggingface", lambda cfg: usual(cfg) | options)

    return change


def half_the_gradient_of_the_queries(monkeypatch):
    usual = modeling_gpt2.eager_attention_forward
    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", lambda m, q, *args, **more: usual(m, (q + q.detach()) / 2, *args, **more))


def dropout_without_rescaling(monkeypatch):
    usual = modeling_gpt2.GPT2MLP.forward
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", lambda self, x: usual(self, x) * (1 - self.training * self.dropout.p))


def top_k_that_drops_ties(monkeypatch):
    def exactly_k(self, input_ids, scores):
        return scores.masked_fill((-scores).argsort().argsort() >= self.top_k, -torch.inf)

    monkeypatch.setattr(TopKLogitsWarper, "__call__", exactly_k)


FAULTS = (
    ("layer norm with eps 1e-6", "activations", option(layer_norm_epsilon=1e-6), "trf_blocks.0.norm1.out"),
    ("erf GELU", "activations", option(activation_function="gelu"), "trf_blocks.0.ff.hidden"),
    ("no 1/sqrt(head size)", "activations", option(scale_attn_weights=False), "trf_blocks.0.att.weights"),
    ("scores divided by the layer", "activations", option(scale_attn_by_inverse_layer_idx=True), "trf_blocks.1.att.weights"),
    ("half the gradient of the queries", "gradients", half_the_gradient_of_the_queries, "backward/trf_blocks.1.att.query"),
    ("dropout without rescaling", "dropout", dropout_without_rescaling, "loss (the reference's masks)"),
    ("top-k that drops ties", "generation", top_k_that_drops_ties, "draws among ties, temperature 0.7, top-k 5"),
)


def fault(name, rung, change, first):
    return pytest.param(rung, change, first, id=name, marks=pytest.mark.slow if rung in ("dropout", "generation") else ())


@pytest.mark.parametrize(("rung", "change", "first"), [fault(*row) for row in FAULTS])
def test_a_fault_in_hugging_faces_model_is_caught_on_its_rung(problem, monkeypatch, rung, change, first):
    change(monkeypatch)
    (result,) = climb(problem, (rung,), "float64", theirs=HUGGING_FACE)
    assert [row.name for row in result.failures][:1] == [first]


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(bug, id=bug.name, marks=() if bug.name in FAST[:1] else pytest.mark.slow)  # slow: about six minutes on two cores
        for bug in BUGS
        if bug.side == "flaxgpt"
    ],
)
def test_a_bug_of_flaxgpts_is_caught_without_torch_refs_model(problem, bug):
    with planted(bug) as side:
        (result,) = climb(problem, (bug.rung,), "float64", ours=side, theirs=HUGGING_FACE)
    assert not result.passed, f"{bug.name} in {bug.module} goes unnoticed on rung {bug.rung}"
    # Nothing is edited between the halves of a block on this side; what is missing there shows in the gradient.
    first = "backward/trf_blocks.1.shortcut1" if "shortcut1" in bug.old and bug.rung == "edits" else bug.first
    assert first in (None, result.failures[0].name), "it is noticed, but somewhere else"


def within(what, found, expected, scales=None):
    differences = compare(found, expected, scales)
    worst = max(differences, key=differences.get)
    assert differences[worst] < BOUNDS[what].float32, f"{what}: {worst} differs by {differences[worst]:.1e}"


@pytest.mark.parametrize("name", ["plain", "sharded"])  # tied; untied
def test_loss_gradients_and_an_update_are_those_of_transformers_by_itself(folders, name):
    """Loaded, called and updated as its users do it: with its own loss, and without this project's side."""
    params, model, _ = flaxgpt.load(folders / name)
    cfg = TrainConfig(model=model.replace(drop_rate=0.0), learning_rate=1e-3, warmup_steps=0, clip_norm=None, decay="all", batch_size=2)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (2, model.context_length))
    batch, weights = (ids[:, :-1], ids[:, 1:]), named_parameters(params, model)
    ours = flax_side.passes(cfg.model, weights, batch, "float32")

    theirs = GPT2LMHeadModel.from_pretrained(folders / name, dtype=torch.float32)

    def named(tensors):
        return named_parameters(from_huggingface({key: tensor.detach().numpy() for key, tensor in tensors.items()}, model), model)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay)
    tokens = torch.from_numpy(ids)
    loss = theirs.eval()(tokens, labels=tokens).loss  # which shifts them by one
    loss.backward()
    gradients = named({key: parameter.grad for key, parameter in theirs.named_parameters()})
    optimizer.step()

    within("loss", ours["loss"], {"loss": loss.detach().numpy()})
    # That of the key's bias is zero, and measured as on the ladder.
    sizes = {key: np.linalg.norm(gradients[key.replace("key", "query")]) for key in gradients if key.endswith("W_key.bias")}
    within("gradients", ours["gradients"], gradients, sizes)

    zeros = {key: np.zeros_like(gradient) for key, gradient in gradients.items()}
    updated = flax_side.adamw(cfg, weights, gradients, {"exp_avg": zeros, "exp_avg_sq": zeros}, 0, "float32")
    after = named(dict(theirs.named_parameters()))
    moved = {key: np.linalg.norm(after[key] - weights[key]) + 1e-3 * np.linalg.norm(weights[key]) for key in after}
    within("adamw/parameter", {key: updated[f"parameter/{key}"] for key in after}, after, moved)
    for part in ("exp_avg", "exp_avg_sq"):
        moments = named({key: optimizer.state[parameter][part] for key, parameter in theirs.named_parameters()})
        within(f"adamw/{part}", {key: updated[f"{part}/{key}"] for key in moments}, moments)
