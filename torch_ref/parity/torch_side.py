"""What the reference computes, as NumPy arrays by its own names: the functions of `flaxgpt.parity.side.NoiseDrivenSide`.

`flaxgpt.parity.flax_side` is its twin. In bfloat16 the model is float32, under autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from flaxgpt.config import GPTConfig, SamplingConfig, TrainConfig
from flaxgpt.parity.side import Batch, Moments, Noise, Tensors
from flaxgpt.parity.sites import sites
from torch_ref.generation import generate as generation
from torch_ref.generation.sampling import choose, process_logits
from torch_ref.loss import calc_loss_batch
from torch_ref.model import GPTModel
from torch_ref.optim import apply_gradients_, clip_gradients_, make_optimizer
from torch_ref.step import train_step


def passes(cfg: GPTConfig, weights: Tensors, batch: Batch, dtype: str) -> dict[str, Tensors]:
    """One forward and backward pass without dropout."""
    model = build(cfg, weights, dtype).eval()
    with tapped(model) as taps, _autocast(dtype):
        loss = calc_loss_batch(model, *map(torch.from_numpy, batch))
    for x in taps.values():
        x.retain_grad()
    loss.backward()
    names = [site.name for site in sites(cfg.n_layers)]
    return {
        "activations": {name: _numpy(taps[name]) for name in names},
        "loss": {"loss": _numpy(loss)},
        "backward": {name: _gradient(taps[name]) for name in reversed(names)},
        "gradients": {name: _gradient(p) for name, p in model.named_parameters()},
    }


def clip(gradients: Tensors, cfg: TrainConfig, dtype: str) -> Tensors:
    """The gradients, clipped, and the norm that they had."""
    model = build(cfg.model, gradients, dtype)
    _set_gradients(model, gradients)
    norm = clip_gradients_(model, cfg)
    return {"norm": np.array(norm), **{name: _numpy(p.grad) for name, p in model.named_parameters()}}


def adamw(cfg: TrainConfig, weights: Tensors, gradients: Tensors, moments: Moments, step: int, dtype: str) -> Tensors:
    """One update of AdamW from given gradients."""
    model = build(cfg.model, weights, dtype)
    optimizer = make_optimizer(model, cfg)
    _set_gradients(model, gradients)
    for name, parameter in model.named_parameters():
        parts = {part: torch.tensor(values[name], dtype=parameter.dtype) for part, values in moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **parts}
    apply_gradients_(optimizer, step, cfg)
    return _after(model, optimizer)


def train(
    cfg: TrainConfig, weights: Tensors, batches: Sequence[Batch], dtype: str, masks: Sequence[Tensors] | None = None
) -> tuple[Tensors, list[Tensors]]:
    """Train on these batches with these masks, or with those that torch draws."""
    model = build(cfg.model, weights, dtype)
    optimizer = make_optimizer(model, cfg)
    metrics, kept = [], []
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        for step, batch in enumerate(batches):
            replaying = recorded_masks(model) if masks is None else replayed_masks(model, masks[step])
            with replaying as step_masks, _autocast(dtype):  # anew each time: autocast remembers the weights that it has cast
                metrics.append(train_step(model, optimizer, tuple(map(torch.from_numpy, batch)), step, cfg))
            kept.append(step_masks)
    traces = dict(zip(("loss", "grad_norm"), np.array(metrics).T, strict=True))
    return traces | _after(model, optimizer), kept


def generate(
    cfg: GPTConfig,
    weights: Tensors,
    prompt_BT: np.ndarray,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    noise: Noise | None = None,
) -> np.ndarray:
    """Continue prompts, drawing with this noise."""
    model = build(cfg, weights, "float32").eval()
    options = {"temperature": temperature, "top_k": top_k, "noise": noise}
    return generation.generate(model, torch.from_numpy(prompt_BT), new_tokens, cfg.context_length, **options).numpy()


def draw(logits_BV: np.ndarray, temperature: float, top_k: int | None, noise: Noise) -> np.ndarray:
    """One token for each row of logits, drawn with this noise."""
    nothing = torch.zeros(len(logits_BV), 0, dtype=torch.int64)
    sampling = SamplingConfig(temperature=temperature, top_k=top_k)
    processed_BV = process_logits(torch.from_numpy(logits_BV), nothing, nothing, sampling)
    return choose(processed_BV, sampling, noise, t=0).numpy()


def build(cfg: GPTConfig, weights: Mapping[str, np.ndarray], dtype: str) -> GPTModel:
    """A model with these weights, float64 or (also for bfloat16) float32; the global generator stays as it was."""
    with torch.random.fork_rng():
        model = GPTModel(cfg).to(torch.float64 if dtype == "float64" else torch.float32)
    tied = {"out_head.weight": weights["tok_emb.weight"]} if cfg.tie_embeddings else {}
    model.load_state_dict({name: torch.tensor(value) for name, value in {**weights, **tied}.items()})
    return model


@contextlib.contextmanager
def tapped(model: GPTModel) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the activations at all sites in the forward pass made within, by hooks; `flaxgpt.layers.tapped` is its twin."""
    taps: dict[str, torch.Tensor] = {}

    def put_on(name: str, module: nn.Module, end: str) -> RemovableHandle:
        if end == "input":
            return module.register_forward_pre_hook(lambda _, args: taps.__setitem__(name, args[0]))
        return module.register_forward_hook(lambda _, args, result: taps.__setitem__(name, result))

    with _removed_after([put_on(name, model.get_submodule(path), end) for name, path, end in sites(model.cfg.n_layers)]):
        yield taps


@contextlib.contextmanager
def recorded_masks(model: GPTModel) -> Iterator[Tensors]:
    """Collects what dropout keeps in the forward pass made within, by the names of the dropout modules.

    torch draws a mask by the number of elements alone, so the same state of the generator gives the mask of ones as well.
    """
    masks: Tensors = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Dropout, args: tuple[torch.Tensor]) -> None:
            if module.training and module.p:
                state = torch.get_rng_state()
                _, keep = torch.native_dropout(torch.ones_like(args[0]), module.p, train=True)
                torch.set_rng_state(state)
                masks[name] = keep.numpy()

        return hook

    with _removed_after([module.register_forward_pre_hook(record(name)) for name, module in _dropouts(model)]):
        yield masks


@contextlib.contextmanager
def replayed_masks(model: GPTModel, masks: Tensors) -> Iterator[Tensors]:
    """Dropout keeps what these masks say in the forward pass made within."""

    def replay(name: str) -> Callable[..., torch.Tensor]:
        keep = torch.from_numpy(np.array(masks[name]))

        def hook(module: nn.Dropout, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
            if keep.shape != args[0].shape:
                raise ValueError(f"the dropout mask of {name} is {tuple(keep.shape)}, expected {tuple(args[0].shape)}")
            return args[0] * keep / (1 - module.p)

        return hook

    with _removed_after([module.register_forward_hook(replay(name)) for name, module in _dropouts(model) if module.p]):
        yield masks


def _dropouts(model: GPTModel) -> list[tuple[str, nn.Dropout]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Dropout)]


@contextlib.contextmanager
def _removed_after(hooks: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _autocast(dtype: str) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def _set_gradients(model: GPTModel, gradients: Tensors) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = torch.tensor(gradients[name], dtype=parameter.dtype)


def _gradient(x: torch.Tensor) -> np.ndarray:
    return _numpy(torch.zeros_like(x) if x.grad is None else x.grad)  # None: the loss does not depend on it


def _numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _after(model: GPTModel, optimizer: torch.optim.AdamW) -> Tensors:
    named = dict(model.named_parameters())
    after = {f"parameter/{name}": _numpy(p) for name, p in named.items()}
    for part in ("exp_avg", "exp_avg_sq"):
        after |= {f"{part}/{name}": _numpy(optimizer.state[p][part]) for name, p in named.items()}
    return after
