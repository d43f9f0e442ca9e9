"""The training loop of a textbook: a model and an optimizer that change in place, and one global random generator."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader

from flaxgpt.config import TrainConfig
from flaxgpt.corpus import Corpus
from flaxgpt.run import CHECKPOINTS, TORCH_WEIGHTS, Run
from torch_ref.data import Batch, create_dataloaders
from torch_ref.generate import generate_text_simple
from torch_ref.model import GPTModel, init_gpt2_


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
            loss, grad_norm = update(model, optimizer, batch, step, cfg)
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


def update(model: GPTModel, optimizer: torch.optim.AdamW, batch: Batch, step: int, cfg: TrainConfig) -> tuple[float, float]:
    """Update the model in place; returns the batch's loss, nats per token, and its gradient's norm before clipping."""
    model.train()
    optimizer.zero_grad()
    loss = 0.0
    for weight, inputs_BT, targets_BT in microbatches(batch, cfg.microbatch_size):
        part = weight * calc_loss_batch(model, inputs_BT, targets_BT)
        part.backward()
        loss += part.item()
    grad_norm = clip_gradients_(model, cfg)
    apply_gradients_(optimizer, step, cfg)
    return loss, grad_norm


def clip_gradients_(model: GPTModel, cfg: TrainConfig) -> float:
    """Scale the gradients to the config's largest global norm, if they exceed it; returns the norm they had."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf).item()


def apply_gradients_(optimizer: torch.optim.AdamW, step: int, cfg: TrainConfig) -> None:
    """Let the optimizer make update `step`, counted from 0, at the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    optimizer.step()


def calc_loss_batch(model: GPTModel, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the targets, in nats per token."""
    logits_BTV = model(inputs_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def microbatches(batch: Batch, size: int) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """The batch in parts of at most `size` rows, each with its share of the batch: the weight of its mean in the batch's."""
    inputs_BT, targets_BT = batch
    parts = zip(inputs_BT.split(size), targets_BT.split(size), strict=True)
    return [(len(inputs) / len(inputs_BT), inputs, targets) for inputs, targets in parts]


@torch.no_grad()
def calc_loss_loader(
    model: GPTModel, loader: DataLoader[Batch], num_batches: int | None = None, microbatch_size: int | None = None
) -> float:
    """Mean loss over the first `num_batches` batches (all, if there are fewer); nan for a loader without any."""
    losses = []
    for batch in itertools.islice(loader, num_batches):
        parts = microbatches(batch, microbatch_size or len(batch[0]))
        losses.append(sum(weight * calc_loss_batch(model, inputs, targets).item() for weight, inputs, targets in parts))
    return sum(losses) / len(losses) if losses else math.nan


def evaluate_model(
    model: GPTModel, train_loader: DataLoader[Batch], val_loader: DataLoader[Batch], cfg: TrainConfig
) -> tuple[float, float]:
    """Training and validation loss over `cfg.eval_batches` batches each, dropout off; leaves the model in `eval()` mode."""
    model.eval()
    train_loss, val_loss = (calc_loss_loader(model, loader, cfg.eval_batches, cfg.microbatch_size) for loader in (train_loader, val_loader))
    return train_loss, val_loss


def make_optimizer(model: GPTModel, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW, with weight decay on all tensors or on matrices and embeddings only, as the config says."""
    groups = [{"params": [], "weight_decay": cfg.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in model.parameters():
        decays = cfg.decay == "all" or parameter.ndim >= 2
        groups[0 if decays else 1]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Rate of update `step`, counted from 0: linear warm-up, cosine to the minimum, constant after that."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_steps + 1)
    done = min((step - cfg.warmup_steps) / (cfg.total_decay_steps - cfg.warmup_steps), 1.0)
    low = cfg.final_learning_rate
    return low + (cfg.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


def save_model(model: GPTModel, path: Path) -> None:
    """The weights as safetensors, written atomically; the causal masks, which the config determines, are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith(".mask")}
    scratch = path.with_name(f".{path.name}.writing")
    save_file(tensors, scratch)
    os.replace(scratch, path)
