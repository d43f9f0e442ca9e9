"""What Hugging Face's GPT-2 computes in torch, by the reference's names: a third side, in place of the reference.

The model, its attention and its generation are those of `transformers`; passes, clipping and updates are made around it as for
the reference (`torch_ref.parity.torch_side`). Nothing else imports `transformers`.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from flaxgpt.config import GPTConfig
from flaxgpt.convert.huggingface import config_to_huggingface, from_huggingface, to_huggingface
from flaxgpt.convert.layout import tensor_shapes
from flaxgpt.convert.names import HUGGINGFACE, parameters
from flaxgpt.convert.params import from_torch, named_parameters
from flaxgpt.parity.side import Noise, Tensors
from flaxgpt.sites import sites
from torch_ref.interventions import Points
from torch_ref.parity.torch_side import TorchSide


class HuggingFaceSide(TorchSide):
    """`GPT2LMHeadModel` as a side of the ladder.

    Query, key and value are one tensor in it: taken apart by the tables of sites and of names. What a config of ours lacks
    (biases, where the config has none) is zero in it, and frozen. The loss is that of the reference, from its logits: its own
    rounds them to float32.
    """

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
        """Continue prompts with its `generate`, its cache and its processors of logits, to which the noise is added.

        It can't go beyond the context, so from there on it is called for one token at a time, with the last ones.
        """
        model, idx = _load(cfg, weights, torch.float32).eval(), torch.from_numpy(prompt_BT)
        processors = _processors(temperature, top_k, noise)
        options = {"do_sample": False, "use_cache": True, "logits_processor": processors, "pad_token_id": 0}
        end = idx.shape[1] + new_tokens
        while idx.shape[1] < end:
            window_BT = idx[:, -cfg.context_length :]
            count = min(end - idx.shape[1], cfg.context_length - window_BT.shape[1] + 1)
            attend = torch.ones_like(window_BT)
            longer_BT = model.generate(window_BT, attention_mask=attend, max_new_tokens=count, **options)
            idx = torch.cat([idx, longer_BT[:, -count:]], dim=1)
        return idx.numpy()

    def draw(self, logits_BV: np.ndarray, temperature: float, top_k: int | None, noise: Noise) -> np.ndarray:
        """One token for each row of logits, drawn with this noise."""
        nothing = torch.zeros(len(logits_BV), 0, dtype=torch.int64)
        return _processors(temperature, top_k, noise)(nothing, torch.from_numpy(logits_BV)).argmax(dim=-1).numpy()

    def build(self, cfg: GPTConfig, weights: Tensors, dtype: str) -> nn.Module:
        """As the reference: tokens_BT -> logits_BTV."""
        model = _load(cfg, weights, torch.float64 if dtype == "float64" else torch.float32)
        model.register_forward_hook(lambda module, args, result: result.logits)
        return model

    def editable(self, cfg: GPTConfig) -> list[str]:
        """All sites but two of each block: hooks reach neither its attention weights, nor both readers of the stream between its halves."""
        return [name for name in self.points(cfg) if not name.endswith((".att.weights", ".shortcut1"))]

    def points(self, cfg: GPTConfig) -> Points:
        """All sites: none is hidden in it."""
        return {site.name: (site.huggingface, site.third) for site in sites(cfg.n_layers)}

    def own(self, named: Tensors, cfg: GPTConfig) -> Tensors:
        """By the table of names, with zeros for what is frozen."""
        return _state_dict(named, cfg)

    def named(self, own: Tensors, cfg: GPTConfig) -> Tensors:
        """By the table of names, without what is frozen."""
        dtype = own["transformer.wte.weight"].dtype
        frozen = {name: np.zeros(shape, dtype) for name, shape in tensor_shapes(cfg, HUGGINGFACE).items() if name not in own}
        return named_parameters(from_huggingface(own | frozen, cfg, dtype), cfg, dtype)


def _load(cfg: GPTConfig, weights: Tensors, dtype: torch.dtype) -> GPT2LMHeadModel:
    """The model with these weights; what is no parameter of ours is frozen."""
    ends = {"bos_token_id": None, "eos_token_id": None}  # no text ends early
    config = GPT2Config(**config_to_huggingface(cfg) | ends, use_cache=False, attn_implementation="eager")
    with torch.random.fork_rng():
        model = GPT2LMHeadModel(config).to(dtype)
    state_dict = _state_dict(weights, cfg)
    tied = {"lm_head.weight": state_dict["transformer.wte.weight"]} if cfg.tie_embeddings else {}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in {**state_dict, **tied}.items()})
    ours = {name for row in parameters(cfg) for name in HUGGINGFACE.names(row, cfg)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ours)
    return model


def _state_dict(named: Tensors, cfg: GPTConfig) -> Tensors:
    """By Hugging Face's names, in its shapes; zero where there is no parameter of ours."""
    dtype = named["tok_emb.weight"].dtype
    return to_huggingface(from_torch(named, cfg, dtype), cfg, dtype)


def _processors(temperature: float, top_k: int | None, noise: Noise | None) -> LogitsProcessorList:
    """None at temperature 0; above it, the last adds the noise."""
    if not temperature:
        return LogitsProcessorList()
    top = [TopKLogitsWarper(top_k)] if top_k else []
    return LogitsProcessorList([TemperatureLogitsWarper(float(temperature)), *top, _AddNoise(noise)])


class _AddNoise(LogitsProcessor):
    """Adds to the logits of each new token its noise, so that the likeliest is a draw."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.numbers = noise, itertools.count()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.tensor(self.noise(next(self.numbers)))
