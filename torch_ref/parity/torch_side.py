"""What GPT-2 in torch computes, as NumPy arrays by the reference's names: the methods of `flaxgpt.parity.side.NoiseDrivenSide`.

`flaxgpt.parity.flax_side` is its twin. In bfloat16 the model is float32, under autocast.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flaxgpt.config import GPTConfig, SamplingConfig, TrainConfig
from flaxgpt.edits import Edits
from flaxgpt.parity.side import Batch, Moments, Noise, Tensors
from flaxgpt.sites import dropouts, sites
from torch_ref.generation import generate as generation
from torch_ref.generation.sampling import choose, process_logits
from torch_ref.interventions import Points, edited, tapped
from torch_ref.loss import calc_loss_batch
from torch_ref.model import GPTModel
from torch_ref.optim import apply_gradients_, clip_gradients_, make_optimizer
from torch_ref.port.wide import default_float64
from torch_ref.step import train_step


class TorchSide:
    """The reference as a side of the ladder.

    Another implementation in torch is a subclass: what its model is called by and made of is in the methods after `draw`.
    """

    def passes(self, cfg: GPTConfig, weights: Tensors, batch: Batch, dtype: str) -> dict[str, Tensors]:
        """One forward and backward pass without dropout."""
        return self._passes(self.build(cfg, weights, dtype).eval(), cfg, batch, dtype)

    def editable(self, cfg: GPTConfig) -> list[str]:
        """All sites."""
        return [*self.points(cfg)]

    def edited(self, cfg: GPTConfig, weights: Tensors, batch: Batch, edits: Edits, dtype: str) -> Tensors:
        """One forward and backward pass with edits, and one with the same model when its hooks are gone."""
        model = self.build(cfg, weights, dtype).eval()
        with edited(model, edits, cfg=cfg, points=self.points(cfg)):
            within = self._passes(model, cfg, batch, dtype)
        model.zero_grad()
        after = self._passes(model, cfg, batch, dtype)
        parts = {
            "edited": within["activations"],
            **{name: within[name] for name in ("backward", "gradients")},
            "after": after["activations"],
        }
        return {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}

    def _passes(self, model: nn.Module, cfg: GPTConfig, batch: Batch, dtype: str) -> dict[str, Tensors]:
        points = self.points(cfg)
        with tapped(model, {point for point, _ in points.values()}) as taps, _autocast(dtype):
            loss = calc_loss_batch(model, *map(torch.from_numpy, batch))
        for x in taps.values():
            x.retain_grad()
        loss.backward()
        return {
            "activations": {name: _part(_numpy(taps[point]), third) for name, (point, third) in points.items()},
            "loss": {"loss": _numpy(loss)},
            "backward": {name: _part(_gradient(taps[point]), third) for name, (point, third) in reversed(points.items())},
            "gradients": self.named({name: _gradient(p) for name, p in trained(model).items()}, cfg),
        }

    def clip(self, gradients: Tensors, cfg: TrainConfig, dtype: str) -> Tensors:
        """The gradients, clipped, and the norm that they had."""
        model = self.build(cfg.model, gradients, dtype)
        self._set_gradients(model, gradients, cfg.model)
        norm = clip_gradients_(model, cfg)
        return {"norm": np.array(norm), **self.named({name: _numpy(p.grad) for name, p in trained(model).items()}, cfg.model)}

    def adamw(self, cfg: TrainConfig, weights: Tensors, gradients: Tensors, moments: Moments, step: int, dtype: str) -> Tensors:
        """One update of AdamW from given gradients."""
        model = self.build(cfg.model, weights, dtype)
        optimizer = make_optimizer(model, cfg)
        self._set_gradients(model, gradients, cfg.model)
        own = {part: self.own(named, cfg.model) for part, named in moments.items()}
        for name, parameter in trained(model).items():
            parts = {part: torch.tensor(values[name], dtype=parameter.dtype) for part, values in own.items()}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **parts}
        apply_gradients_(optimizer, step, cfg)
        return self._after(model, optimizer, cfg.model)

    def train(
        self, cfg: TrainConfig, weights: Tensors, batches: Sequence[Batch], dtype: str, masks: Sequence[Tensors] | None = None
    ) -> tuple[Tensors, list[Tensors]]:
        """Train on these batches with these masks, or with those that torch draws."""
        model = self.build(cfg.model, weights, dtype)
        optimizer = make_optimizer(model, cfg)
        names = dropouts(cfg.model.n_layers)
        metrics, kept = [], []
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            for step, batch in enumerate(batches):
                replaying = recorded_masks(names) if masks is None else replayed_masks(names, masks[step])
                with replaying as step_masks, _autocast(dtype):  # anew each time: autocast remembers the weights that it has cast
                    metrics.append(train_step(model, optimizer, tuple(map(torch.from_numpy, batch)), step, cfg))
                kept.append(step_masks)
        traces = dict(zip(("loss", "grad_norm"), np.array(metrics).T, strict=True))
        return traces | self._after(model, optimizer, cfg.model), kept

    def generate(
        self,
        cfg: GPTConfig,
        weights: Tensors,
        prompt_BT: np.ndarray,
        new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        noise: Noise | None = None,
    ) -> np.ndarray:
        """Continue prompts, drawing with this noise."""
        model = self.build(cfg, weights, "float32").eval()
        options = {"temperature": temperature, "top_k": top_k, "noise": noise}
        return generation.generate(model, torch.from_numpy(prompt_BT), new_tokens, cfg.context_length, **options).numpy()

    def draw(self, logits_BV: np.ndarray, temperature: float, top_k: int | None, noise: Noise) -> np.ndarray:
        """One token for each row of logits, drawn with this noise."""
        nothing = torch.zeros(len(logits_BV), 0, dtype=torch.int64)
        sampling = SamplingConfig(temperature=temperature, top_k=top_k)
        processed_BV = process_logits(torch.from_numpy(logits_BV), nothing, nothing, sampling)
        return choose(processed_BV, sampling, noise, t=0).numpy()

    def build(self, cfg: GPTConfig, weights: Tensors, dtype: str) -> nn.Module:
        """A model with these weights, tokens_BT -> logits_BTV, float64 or (also for bfloat16) float32.

        The global generator stays as it was.
        """
        with torch.random.fork_rng(), default_float64() if dtype == "float64" else contextlib.nullcontext():
            model = GPTModel(cfg)
        tied = {"out_head.weight": weights["tok_emb.weight"]} if cfg.tie_embeddings else {}
        model.load_state_dict({name: torch.tensor(value) for name, value in {**weights, **tied}.items()})
        return model

    def points(self, cfg: GPTConfig) -> Points:
        """Name of a site -> its point in the model, and which third of that it is (None: all)."""
        return {site.name: (site.point, None) for site in sites(cfg.n_layers)}

    def own(self, named: Tensors, cfg: GPTConfig) -> Tensors:
        """Arrays by the names of the reference's parameters, by the names and in the shapes of the model's own."""
        return named

    def named(self, own: Tensors, cfg: GPTConfig) -> Tensors:
        """The inverse of `own`."""
        return own

    def _set_gradients(self, model: nn.Module, gradients: Tensors, cfg: GPTConfig) -> None:
        own = self.own(gradients, cfg)
        for name, parameter in trained(model).items():
            parameter.grad = torch.tensor(own[name], dtype=parameter.dtype)

    def _after(self, model: nn.Module, optimizer: torch.optim.AdamW, cfg: GPTConfig) -> Tensors:
        parts = {"parameter": {name: _numpy(p) for name, p in trained(model).items()}}
        for part in ("exp_avg", "exp_avg_sq"):
            parts[part] = {name: _numpy(optimizer.state[p][part]) for name, p in trained(model).items()}
        return {f"{part}/{name}": value for part, own in parts.items() for name, value in self.named(own, cfg).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by the model's own names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def recorded_masks(names: Sequence[str]) -> Iterator[Tensors]:
    """Collects what dropout keeps in the forward pass made within, by the names of its calls, in order.

    torch draws a mask by the number of elements alone, so the same state of the generator gives the mask of ones as well.
    """
    masks: Tensors = {}

    def drop(name: str, x: torch.Tensor, rate: float) -> torch.Tensor:
        state = torch.get_rng_state()
        masks[name] = (F.dropout(torch.ones_like(x), rate) > 0).numpy()
        torch.set_rng_state(state)
        return F.dropout(x, rate)

    with _Dropouts(names, drop):
        yield masks


@contextlib.contextmanager
def replayed_masks(names: Sequence[str], masks: Tensors) -> Iterator[Tensors]:
    """Dropout keeps what these masks say in the forward pass made within, which calls it in the order of the names."""

    def drop(name: str, x: torch.Tensor, rate: float) -> torch.Tensor:
        keep = torch.from_numpy(np.array(masks[name]))
        if keep.shape != x.shape:
            raise ValueError(f"the dropout mask of {name} is {tuple(keep.shape)}, expected {tuple(x.shape)}")
        return x * keep / (1 - rate)

    with _Dropouts(names, drop):
        yield masks


class _Dropouts(TorchFunctionMode):
    """Replaces torch's dropout, whoever calls it: a module, or a function of Hugging Face's."""

    def __init__(self, names: Sequence[str], drop: Callable[[str, torch.Tensor, float], torch.Tensor]) -> None:
        super().__init__()
        self.names, self.drop = itertools.cycle(names), drop  # around again for the next microbatch

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.dropout or not (kwargs["training"] and kwargs["p"]):
            return function(*args, **kwargs)
        return self.drop(next(self.names), args[0], kwargs["p"])


def _part(array: np.ndarray, third: int | None) -> np.ndarray:
    return array if third is None else np.split(array, 3, axis=-1)[third]


def _autocast(dtype: str) -> contextlib.AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def _gradient(x: torch.Tensor) -> np.ndarray:
    return _numpy(torch.zeros_like(x) if x.grad is None else x.grad)  # None: the loss does not depend on it


def _numpy(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
