"""The training loop of a textbook: a model and an optimizer that change in place, and one global random generator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.run.folder import CHECKPOINTS, TORCH_WEIGHTS
from flaxgpt.run.log import RunLog, check_loss, not_finite
from torch_ref.checkpoint import save_model, to_tensors
from torch_ref.data.loader import create_dataloaders, endless
from torch_ref.generation.generate import generate_text_simple
from torch_ref.model import GPTModel, init_model
from torch_ref.optim import make_optimizer, make_schedule
from torch_ref.step import evaluate_model, train_step


def train(cfg: TrainConfig, corpus: Corpus, log: RunLog, *, weights: Mapping[str, np.ndarray] | None = None) -> GPTModel:
    """Train for `max_steps` updates, the same run as `flaxgpt.train.train`, in the reference.

    Everything draws from one generator in the order in which it happens: the weights, each epoch's shuffle, the dropout
    masks. Evaluating shuffles the training data too, so `eval_every` is part of what the run computes. With the preset
    verdict-124m this order is that of the published run, whose losses it reproduces.

    Args:
        cfg: the run, as `flaxgpt.run.setup.prepare` returns it.
        corpus: its data.
        log: what the results are reported to; its folder takes the weights.
        weights: a state_dict to start from, if not from random weights.

    Raises:
        InputError: the splits are too short for the config, or the loss is not finite.
    """
    train_loader, val_loader = create_dataloaders(corpus.train, corpus.val, cfg)
    batches = endless(train_loader)
    torch.manual_seed(cfg.seed)
    model = init_model(cfg.model)
    if weights is not None:
        model.load_state_dict(to_tensors(dict(weights)))
    optimizer, schedule = make_optimizer(model, cfg), make_schedule(cfg)

    peak_flops = cfg.peak_tflops and cfg.peak_tflops * 1e12
    log.begin(cfg, corpus, 0, n_params=sum(p.numel() for p in model.parameters()), devices="1 x cpu (torch)", peak_flops=peak_flops)
    for step in range(cfg.max_steps):
        with log.timed("data"):
            batch = next(batches)
        with log.timed("compute"):
            loss, grad_norm = train_step(model, optimizer, batch, step, cfg)
        check_loss(step, loss, grad_norm)
        log.update(step, loss, grad_norm, schedule(step))
        last = step == cfg.max_steps - 1 or log.stop.requested
        saves = last or (step + 1) % cfg.checkpoint_every == 0
        evaluates = last or step % cfg.eval_every == 0
        if (saves or evaluates) and not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise not_finite(step)
        if saves:
            with log.timed("checkpoint"):
                save_model(model, log.out_dir / CHECKPOINTS / TORCH_WEIGHTS)
        if evaluates:
            with log.timed("evaluation"):
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, cfg)
                text = make_sample(model, cfg, corpus.tokenizer)
            log.evaluation(step, train_loss, val_loss, text)
        if last:
            break
    return model


def make_sample(model: GPTModel, cfg: TrainConfig, tokenizer: Tokenizer) -> str:
    """The run's prompt and how the model, in `eval()` mode, continues it, greedily; "" if `sample_tokens` is 0."""
    if not cfg.sample_tokens:
        return ""
    prompt_BT = torch.tensor([tokenizer.encode(cfg.prompt)])
    ids_BT = generate_text_simple(model, prompt_BT, cfg.sample_tokens, cfg.model.context_length)
    return tokenizer.decode(ids_BT[0].tolist())
