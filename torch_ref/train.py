"""The training loop of a textbook: a model and an optimizer that change in place, and one global random generator."""

from __future__ import annotations

import itertools

import torch

from flaxgpt.data.corpora import Corpus
from flaxgpt.run.folder import CHECKPOINTS, TORCH_WEIGHTS, Run
from torch_ref.checkpoint import save_model
from torch_ref.data.loader import create_dataloaders
from torch_ref.generation.generate import generate_text_simple
from torch_ref.model import GPTModel, init_gpt2_
from torch_ref.optim import learning_rate, make_optimizer
from torch_ref.step import evaluate_model, train_step


def train(run: Run, corpus: Corpus) -> GPTModel:
    """Train for `max_steps` updates, the same run as `flaxgpt.train.train`, in the reference.

    Everything draws from one generator in the order in which it happens: the weights, each epoch's shuffle, the dropout
    masks. Evaluating shuffles the training data too, so `eval_every` is part of what the run computes. With the preset
    verdict-124m this order is that of the published run, whose losses it reproduces.

    Raises:
        InputError: the splits are too short for the config.
    """
    cfg = run.cfg
    train_loader, val_loader = create_dataloaders(corpus.train, corpus.val, cfg)
    torch.manual_seed(cfg.seed)
    model = GPTModel(cfg.model)
    if cfg.model.init == "gpt2":
        init_gpt2_(model)
    optimizer = make_optimizer(model, cfg)
    prompt_BT = torch.tensor([corpus.tokenizer.encode(cfg.prompt)])

    run.begin(0, n_params=sum(p.numel() for p in model.parameters()), devices="1 x cpu (torch)")
    step = 0
    for _epoch in itertools.count():
        for batch in train_loader:
            loss, grad_norm = train_step(model, optimizer, batch, step, cfg)
            run.step(step, loss, grad_norm, learning_rate(step, cfg))
            last = step == cfg.max_steps - 1 or run.stopped_by is not None
            if last or step % cfg.eval_every == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, cfg)
                ids = generate_text_simple(model, prompt_BT, cfg.sample_tokens, cfg.model.context_length)
                run.evaluation(step, train_loss, val_loss, corpus.tokenizer.decode(ids[0].tolist()) if cfg.sample_tokens else "")
            if last or (step + 1) % cfg.checkpoint_every == 0:
                save_model(model, run.folder / CHECKPOINTS / TORCH_WEIGHTS)
            if last:
                return model
            step += 1
    raise AssertionError("unreachable: the loop ends by returning")
