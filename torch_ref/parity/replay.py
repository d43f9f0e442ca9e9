"""A training run of the reference, recorded an update at a time so that another implementation can repeat it.

`flaxgpt.parity.flax_side.replay` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from flaxgpt.config import TrainConfig
from flaxgpt.data.corpora import Corpus
from flaxgpt.parity import side
from flaxgpt.parity.replay import Evaluation, Update
from flaxgpt.sites import dropouts
from torch_ref.data.loader import Batch, create_dataloaders, endless
from torch_ref.generation.generate import generate_text_simple
from torch_ref.model import init_model
from torch_ref.optim import make_optimizer
from torch_ref.parity.torch_side import recorded_masks
from torch_ref.step import evaluate_model, train_step


def recorded_run(cfg: TrainConfig, corpus: Corpus, dtype: str = "float32") -> tuple[side.Tensors, Iterator[Update]]:
    """The run of `torch_ref.train.train`, drawing the same random numbers in the same order.

    Args:
        cfg: the run.
        corpus: its data.
        dtype: "float32", or "float64" from the same weights.

    Returns:
        The initial weights, float32, and the updates as they are made: nothing is kept of them here. Evaluations come every
        `eval_every` updates and after the last, samples at the end of each epoch and after the last.
    """
    train_loader, val_loader = create_dataloaders(corpus.train, corpus.val, cfg)
    torch.manual_seed(cfg.seed)
    model = init_model(cfg.model)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    model.to(torch.float64 if dtype == "float64" else torch.float32)
    prompt_BT = torch.tensor([corpus.tokenizer.encode(cfg.prompt)])

    names = dropouts(cfg.model.n_layers)

    def updates() -> Iterator[Update]:
        optimizer = make_optimizer(model, cfg)
        for step, batch in zip(range(cfg.max_steps), endless(train_loader), strict=False):
            with recorded_masks(names) as masks:
                loss, grad_norm = train_step(model, optimizer, batch, step, cfg)
            last = step == cfg.max_steps - 1
            evaluation = sample = None
            if last or step % cfg.eval_every == 0:
                batches = [list(itertools.islice(loader, cfg.eval_batches)) for loader in (train_loader, val_loader)]
                evaluation = Evaluation(*(list(map(_numpy, part)) for part in batches), *evaluate_model(model, *batches, cfg))
            if last or (step + 1) % len(train_loader) == 0:
                model.eval()
                sample = generate_text_simple(model, prompt_BT, cfg.sample_tokens, cfg.model.context_length)[0].tolist()
            yield Update(step, _numpy(batch), masks, loss, grad_norm, evaluation, sample)

    return weights, updates()


def _numpy(batch: Batch) -> side.Batch:
    inputs_BT, targets_BT = batch
    return inputs_BT.numpy(), targets_BT.numpy()
