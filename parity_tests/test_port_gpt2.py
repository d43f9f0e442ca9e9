"""GPT-2 through the general door: the verdicts of the ladder, with nothing of the ladder's own sides."""

import importlib

import numpy as np
import pytest
import torch
from bugs import BUGS, planted
from conftest import SMALL

from flaxgpt.config import TrainConfig
from flaxgpt.errors import InputError
from flaxgpt.port.check import check
from flaxgpt.port.linen_recorder import LinenRecorder
from flaxgpt.port.pair import Pair
from flaxgpt.port.recorder import AdamW
from torch_ref.port.torch_recorder import TorchRecorder

NAMES = {"trf_blocks.{}.ff.layers.{}": "trf_blocks.{}.ff.layers_{}"}
CFG = SMALL.replace(qkv_bias=True, drop_rate=0.0)
RUN = TrainConfig(model=CFG, learning_rate=1e-3, warmup_steps=2, decay_steps=4, max_steps=4, weight_decay=0.1, clip_norm=0.5)
UPDATES = AdamW(learning_rate=RUN.learning_rate, clip_norm=RUN.clip_norm)
SHOWN = ("activations", "loss", "gradients", "clipping", "adamw")
FAST = ("erf GELU",)


def modules(side):
    return {name: importlib.import_module(f"{side}.{name}") for name in ("model", "loss", "optim")}


def make_pair(cfg=CFG, batch=2, length=12, seed=0, convert=False):
    """Both models as they are imported now, with their own losses, clipping and optimizers; flaxgpt with weights that it has converted."""
    ours, theirs = modules("flaxgpt"), modules("torch_ref")
    run = RUN.replace(model=cfg)
    torch.manual_seed(seed)
    model = theirs["model"].GPTModel(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases at their defaults hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))

    def optimizer(model):
        adamw = theirs["optim"].make_optimizer(model, run)

        def update(step):
            theirs["optim"].clip_gradients_(model, run)
            theirs["optim"].apply_gradients_(adamw, step, run)

        return update

    reference = TorchRecorder(
        model,
        call=lambda model, batch: model(batch["tokens"]),
        loss=lambda logits, batch: theirs["loss"].calc_loss_batch(lambda _: logits, batch["tokens"], batch["targets"]),
        optimizer=optimizer,
        clip=lambda model: theirs["optim"].clip_gradients_(model, run),
    )
    params = None
    if not convert:
        from_torch = importlib.import_module("flaxgpt.convert.params").from_torch
        params = from_torch({name: x.numpy() for name, x in model.state_dict().items()}, cfg)
    port = LinenRecorder(
        lambda dtype: ours["model"].GPT(cfg.replace(dtype=dtype)),
        {"params": params},
        call=lambda module, batch: module(batch["tokens"]),
        loss=lambda logits, batch: ours["loss"].next_token_loss(logits, batch["targets"]),
        optimizer=ours["optim"].make_optimizer(run),
        clip=ours["optim"].clip_by_global_norm(run.clip_norm),
    )
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (batch, length + 1))
    return Pair(reference, port, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, NAMES, convert=convert)


def test_gpt2_passes_all_rungs():
    verdict = check(make_pair(), adamw=UPDATES)
    assert [result.rung for result in verdict.results] == ["parameters", *SHOWN, "training"]
    for result in verdict.results:
        assert result.passed, (result.rung, result.failures[0])
    names = {row.name for row in verdict.results[1].rows}
    assert {"tok_emb", "trf_blocks.0.att.dropout", f"trf_blocks.{CFG.n_layers - 1}.ff.layers.2", "<output>"} <= names, "layers taken apart"
    assert verdict.diagnosis == ()


def slowly(bug):
    return pytest.param(bug, id=f"{bug.side}: {bug.name}", marks=() if bug.name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("bug", [slowly(bug) for bug in BUGS if bug.rung in SHOWN])
def test_each_bug_that_a_pass_or_an_update_can_show_is_found(bug):
    modules(bug.side)  # a bug is planted in what has been imported
    with planted(bug):
        if "tied" in bug.name:  # a model with other parameters is not compared at all
            with pytest.raises(InputError, match=r"out_head\.\w+ of the (port|reference) has no parameter of the"):
                check(make_pair(CFG.replace(n_layers=1)))
            return
        verdict = check(make_pair(CFG.replace(n_layers=1)), ("parameters", bug.rung), adamw=UPDATES)
    assert not verdict.passed, f"{bug.name} in {bug.module} goes unnoticed on rung {bug.rung}"
    if bug.first:
        assert verdict.first["forward"] == module_of(bug.first), "it is noticed, but somewhere else"


def module_of(site):
    """The first module whose output shows that a site of the ladder is wrong."""
    of_site = {"embedding": "pos_emb", "out": "", "weights": ".dropout", "hidden": ".layers.2"}
    module, _, last = site.rpartition(".")
    return module + of_site[last]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_correct_gpt2_gives_no_false_alarm(seed):
    draw = np.random.default_rng(seed)
    heads, layers, batch, length = (int(draw.integers(1, high)) for high in (5, 3, 4, 17))
    options = {"tie_embeddings": bool(seed % 2), "bias": bool(seed % 5), "qkv_bias": bool(seed % 5 and seed % 3)}
    cfg = CFG.replace(n_heads=heads, emb_dim=heads * int(draw.integers(2, 9)), n_layers=layers, **options)
    verdict = check(make_pair(cfg, batch, length, seed), adamw=UPDATES)
    assert verdict.passed, (cfg, batch, length, [row for result in verdict.results for row in result.failures][:3])
