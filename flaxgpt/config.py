"""What a model is, how a run trains it, and how a token is chosen: three frozen dataclasses. No framework here.

Shape suffixes throughout the project, one letter a dimension:
B batch, T query position, S key position, D emb_dim, N heads, H head size (D / N), E all heads side by side (N H = D),
F feed-forward width (4 D), V vocabulary, C context length, L layer, K alternatives of a token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias, Union, get_args, get_origin, get_type_hints

from flaxgpt.errors import InputError
from flaxgpt.presets import PRESETS


class _Config:
    """JSON round trip, replacement and checking of types, shared by the three."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for `json.dumps`; `from_dict` is the inverse."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Fields left out take their defaults; an unknown one is an InputError."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - names):
            raise InputError(f"unknown {cls.__name__} fields {unknown}; the known ones are {sorted(names)}")
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _require(self, names: str, holds: Callable[[Any], bool], expected: str) -> None:
        """InputError for the first of these fields that is set and does not hold (nan holds nowhere)."""
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise InputError(f"{name}={value!r}: expected {expected}")

    def _check_types(self) -> None:
        for name, kind in _type_hints(type(self)).items():
            if not _is_a(value := getattr(self, name), kind):
                raise InputError(f"{name}={value!r}: expected {_describe(kind)}")


@dataclass(frozen=True)
class GPTConfig(_Config):
    """The model: GPT-2's architecture, its size, and how it is initialised and computed."""

    vocab_size: int = 50257
    """Number of tokens. Training sets it to the tokenizer's size."""
    context_length: int = 1024
    """Longest sequence the model sees, in tokens."""
    emb_dim: int = 768
    """Width of the residual stream; divisible by n_heads."""
    n_heads: int = 12
    """Attention heads in each block."""
    n_layers: int = 12
    """Transformer blocks."""
    drop_rate: float = 0.1
    """Dropout on the embeddings, the attention weights and both shortcuts of a block; in [0, 1)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (the released GPT-2 weights have them)."""
    bias: bool = True
    """Biases on the other linear layers, and shifts in the norms. False: no biases anywhere, as nanoGPT's --bias=False; then
    qkv_bias must be False as well."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """gelu_tanh: GELU's tanh approximation, as GPT-2 was trained. gelu: the exact one (nanoGPT's)."""
    tie_embeddings: bool = False
    """Use the token embedding as the output head (the released GPT-2 weights do)."""
    init: Literal["gpt2", "torch"] = "gpt2"
    """gpt2: normal(0.02), residual projections scaled by 1/sqrt(2 n_layers). torch: the defaults of torch's layers."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of activations and matrix products; parameters, norms, softmax and logits are float32 at least.
    float64 is for checking numerics: it wants JAX_ENABLE_X64=1 and float64 parameters."""
    attention: Literal["auto", "plain", "fused"] = "auto"
    """fused: a kernel that holds no attention weights (cuDNN's on a GPU, splash attention on a TPU). auto: where it can be used."""
    loss_chunk: int | None = None
    """Positions of each row whose logits are held at a time in the loss; 0: all. None: all on a CPU, about 2048 tokens elsewhere."""
    vocab_multiple: int = 1
    """Pad the vocabulary's axis of the parameters with zeros to a multiple of this; what is computed stays the same."""
    remat: Literal["none", "dots", "block"] = "none"
    """What of a block the backward pass computes again. block: everything, for the least memory and about a third more work.
    dots: everything but the products with weights."""

    def __post_init__(self) -> None:
        self._check_types()
        self._require("vocab_size context_length emb_dim n_heads n_layers", lambda v: v >= 1, "at least 1")
        self._require("vocab_multiple", lambda v: v >= 1, "at least 1")
        self._require("loss_chunk", lambda v: v >= 0, "at least 0")
        self._require("drop_rate", lambda v: 0 <= v < 1, "a value in [0, 1)")
        if self.emb_dim % self.n_heads:
            raise InputError(f"emb_dim={self.emb_dim} is not divisible by n_heads={self.n_heads}")
        if self.qkv_bias and not self.bias:
            raise InputError("bias=False means no biases anywhere: set qkv_bias=False as well (--no-qkv-bias)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As of every config; `remat` may be the boolean that it was in older files."""
        older = {False: "none", True: "block"}
        remat = values.get("remat")
        return super().from_dict({**values, "remat": older[remat]} if isinstance(remat, bool) else values)

    @property
    def padded_vocab(self) -> int:
        """Rows of the token embedding: `vocab_size`, rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @classmethod
    def preset(cls, name: str) -> GPTConfig:
        """The model of a named preset (see `flaxgpt.presets`).

        Raises:
            InputError: there is no such preset.
        """
        return TrainConfig.preset(name).model


@dataclass(frozen=True)
class TrainConfig(_Config):
    """A training run: the data, the batches, the optimizer, and how often to look."""

    data: str = "pydoc"
    """A corpus name (pydoc, the-verdict, tinyshakespeare), a text file, a folder of .txt files, or a folder
    with train.bin and val.bin (uint16 tokens, nanoGPT's layout), or shards of them, as prepare_data.py makes them."""
    tokenizer: Literal["gpt2", "char"] = "gpt2"
    """gpt2: byte-pair encoding, 50257 tokens. char: one token for each character of the text."""
    train_ratio: float = 0.9
    """The first part of the text, in characters, that is trained on; the rest is for validation."""
    stride: int | None = None
    """Tokens between the starts of neighbouring training windows; None: context_length, so that they do not overlap."""
    shuffle: bool = True
    """Draw the training windows in a new random order each epoch."""
    drop_last: bool = True
    """Drop the windows left over when an epoch does not fill a batch; otherwise the next epoch's complete it."""
    batch_size: int = 8
    """Windows in one update, over all devices and microbatches (the global batch)."""
    grad_accum_steps: int | Literal["auto"] = 1
    """Microbatches that one update (and evaluation batch) is computed in, with the exact mean gradient; divides batch_size.
    auto: the fewest that fit in the devices' memory, found by compiling when the run begins."""
    max_steps: int = 1000
    """Updates in the whole run."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float | None = 1e-4
    """Where the cosine ends; None: the rate stays at learning_rate."""
    warmup_steps: int = 100
    """Updates of linear warm-up: update s (from 0) uses learning_rate * (s + 1) / (warmup_steps + 1)."""
    decay_steps: int | None = None
    """Update at which the cosine ends (resuming does not move it); None: max_steps, or just after a longer warm-up."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.1
    """AdamW: decoupled decay, multiplied by the learning rate."""
    decay: Literal["all", "matrices"] = "matrices"
    """What decays: all tensors (torch's default), or only matrices and embeddings."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    seed: int = 123
    """Seed of the parameters, the order of the batches and dropout."""
    log_every: int = 10
    """Updates between log lines."""
    eval_every: int = 100
    """Updates between evaluations; the first and the last update are always evaluated."""
    eval_batches: int = 20
    """Batches of each split in an evaluation (all of them if there are fewer)."""
    checkpoint_every: int = 1000
    """Updates between checkpoints; the last update is always saved."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints at most, so that a run that is killed loses no more; None: they don't matter."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep; the one with the lowest validation loss is kept besides."""
    skip_nonfinite: int = 0
    """Updates in a row that may be skipped because their loss or gradient is not finite; one more stops the run. They are counted in
    the metrics."""
    prompt: str | None = None
    """What the sample after each evaluation starts from; None: two words of the validation text."""
    sample_tokens: int = 50
    """Tokens in that sample, decoded greedily; 0: none."""
    tensorboard: bool = False
    """Write the metrics and samples for TensorBoard as well, into the run folder; needs the extra tensorboard."""
    wandb: str | None = None
    """Send the metrics and samples to this project of Weights & Biases as well; needs the extra wandb. With WANDB_MODE=offline
    they stay here."""
    peak_tflops: float | None = None
    """Peak of one device, in 10^12 operations a second, that MFU is a share of; None: the published one, where it is known."""
    fsdp: int = 1
    """Devices that share one copy of the parameters and the rows of a batch (fully sharded data parallelism)."""
    tensor: int = 1
    """Devices that share the heads, the feed-forward units and the vocabulary. What fsdp x tensor leaves is data parallel."""
    gather: Literal["auto", "layer", "update"] = "auto"
    """When weights that fsdp has split are gathered. layer: each layer's when it is its turn (least memory). update: all of them,
    once an update (least traffic); moments and float32 weights stay split. auto: the least traffic that fits in the devices' memory, found
    by compiling when the run begins."""
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self) -> None:
        if isinstance(self.model, Mapping):
            object.__setattr__(self, "model", GPTConfig.from_dict(self.model))
        self._check_types()
        counts = "stride batch_size max_steps decay_steps log_every eval_every eval_batches checkpoint_every"
        self._require(f"{counts} keep_checkpoints fsdp tensor", lambda v: v >= 1, "at least 1")
        self._require("grad_accum_steps", lambda v: v == "auto" or v >= 1, "at least 1, or auto")
        self._require("warmup_steps sample_tokens skip_nonfinite", lambda v: v >= 0, "at least 0")
        self._require("learning_rate min_learning_rate weight_decay", lambda v: 0 <= v < math.inf, "a number of at least 0")
        self._require("eps clip_norm checkpoint_minutes peak_tflops", lambda v: 0 < v < math.inf, "a positive number")
        self._require("beta1 beta2", lambda v: 0 <= v < 1, "a value in [0, 1)")
        self._require("train_ratio", lambda v: 0 < v < 1, "a value between 0 and 1, so that some text trains and some validates")
        self._require("seed", lambda v: 0 <= v < 2**32, "a value in [0, 2**32)")
        self._require("prompt", bool, "some text (the prompt is empty), or none given")
        self._require("wandb", bool, "the name of a project")
        if self.grad_accum_steps != "auto" and self.batch_size % self.grad_accum_steps:
            raise InputError(f"batch_size={self.batch_size} is not divisible by grad_accum_steps={self.grad_accum_steps}")
        if self.total_decay_steps <= self.warmup_steps:
            raise InputError(f"decay_steps={self.decay_steps}: expected more than warmup_steps={self.warmup_steps}")
        if self.final_learning_rate > self.learning_rate:
            raise InputError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}: "
                "lower it, or pass --min-learning-rate None for a constant rate"
            )
        if self.model.emb_dim % self.fsdp:
            raise InputError(f"emb_dim={self.model.emb_dim} is not divisible by fsdp={self.fsdp}")
        if self.model.n_heads % self.tensor:
            raise InputError(f"n_heads={self.model.n_heads} is not divisible by tensor={self.tensor}")

    def check_vocabulary(self) -> None:
        """InputError if the tensor axis does not divide the vocabulary, once that is known."""
        if self.model.padded_vocab % self.tensor:
            size = f"vocab_size={self.model.vocab_size}"
            raise InputError(f"{size} is not divisible by tensor={self.tensor}: start the run with --vocab-multiple {self.tensor}")

    @property
    def window_stride(self) -> int:
        """`stride`, or the context length where none is set."""
        return self.stride or self.model.context_length

    @property
    def total_decay_steps(self) -> int:
        """Update at which the cosine ends, more than `warmup_steps`."""
        return self.decay_steps or max(self.max_steps, self.warmup_steps + 1)

    @property
    def final_learning_rate(self) -> float:
        """`min_learning_rate`, or the constant rate where none is set."""
        return self.learning_rate if self.min_learning_rate is None else self.min_learning_rate

    @property
    def microbatch_size(self) -> int:
        """Windows that are computed at once.

        Raises:
            InputError: the number of microbatches is still to be found (auto).
        """
        if self.grad_accum_steps == "auto":
            raise InputError("grad_accum_steps=auto is found by train_jax.py when it begins: give a number here")
        return self.batch_size // self.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update learns from."""
        return self.batch_size * self.model.context_length

    @classmethod
    def preset(cls, name: str) -> TrainConfig:
        """The run of a named preset (see `flaxgpt.presets`).

        Raises:
            InputError: there is no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        model, run = PRESETS[name]
        return cls(model=GPTConfig(**model), **run)


@dataclass(frozen=True)
class SamplingConfig(_Config):
    """Settings in the order in which they act: the first five always, the others when drawing (temperature above 0)."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    repetition_penalty: float | None = None
    """Divides positive logits of the tokens in the prompt and in the new text, multiplies negative ones (Keskar et al. 2019)."""
    presence_penalty: float | None = None
    """Subtracted from the logits of the tokens in the new text."""
    frequency_penalty: float | None = None
    """Subtracted from them once for each time they occur there."""
    banned: tuple[int, ...] = ()
    """Token ids that are never chosen."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (the first of equal ones)."""
    top_k: int | None = None
    """Draw among the k largest logits, and those equal to the k-th; more than V means all."""
    top_p: float | None = None
    """Draw among the fewest likeliest tokens that have this probability together, in (0, 1] (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Draw among the tokens at least this many times as likely as the likeliest, in [0, 1]."""

    def __post_init__(self) -> None:
        self._check_types()
        # Logits divided by less, or changed by more, would no longer be finite in float32.
        self._require("temperature", lambda v: v == 0 or 1e-6 <= v <= 1e30, "0 (greedy) or a positive number, at least 1e-6")
        self._require("top_k", lambda v: v >= 1, "at least 1, or none at all")
        self._require("top_p", lambda v: 0 < v <= 1, "a value in (0, 1]")
        self._require("min_p", lambda v: 0 <= v <= 1, "a value in [0, 1]")
        self._require("repetition_penalty", lambda v: 1e-6 <= v <= 1e30, "a positive number, at least 1e-6 (1 changes nothing)")
        self._require("presence_penalty frequency_penalty", lambda v: abs(v) <= 1e30, "a finite number")
        self._require("logit_bias", lambda bias: all(abs(v) <= 1e30 for v in bias.values()), "finite numbers; to exclude a token, ban it")

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError if a token id is outside the vocabulary, or none is left to choose."""
        for name in ("logit_bias", "banned"):
            if outside := [i for i in getattr(self, name) if not 0 <= i < vocab_size]:
                raise InputError(f"{name} names token ids {outside[:5]}, outside the vocabulary of {vocab_size}")
        if len(set(self.banned)) == vocab_size:
            raise InputError("banned names every token of the vocabulary: there is none left to choose")

    @property
    def penalises(self) -> bool:
        """Whether what has been written so far matters."""
        return any(penalty is not None for penalty in (self.repetition_penalty, self.presence_penalty, self.frequency_penalty))


Setting: TypeAlias = float | tuple[int, ...] | Mapping[int, float] | None
"""The value of a field of SamplingConfig."""


_type_hints = functools.cache(get_type_hints)  # most of what making a config took was to evaluate them anew


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (types.UnionType, Union):  # with a Literal in it, int | ... is the second
        return any(_is_a(value, k) for k in get_args(kind))
    if kind in (int, float):  # a bool is not a number here; an int does for a float
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) in (types.UnionType, Union):
        return " or ".join("None" if part is types.NoneType else _describe(part) for part in get_args(kind))
    return getattr(kind, "__name__", str(kind))


GREEDY = SamplingConfig(temperature=0.0)
"""The likeliest token each time, unchanged otherwise."""
