"""What is asked of a model that is to be compared: named NumPy arrays of what it computes.

`TorchRecorder` of `torch_ref.port.torch_recorder` records any torch module; `LinenRecorder`, `NNXRecorder` and `FunctionRecorder` of this
package record models in JAX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Protocol, TypeAlias, TypeVar

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.port.kept import Keep, in_memory

T = TypeVar("T")

Tensors: TypeAlias = dict[str, np.ndarray]
"""Arrays by name."""

Batch: TypeAlias = "np.ndarray | tuple[np.ndarray, ...] | Mapping[str, np.ndarray]"
"""What the models are called with: one array, several, or several by name."""

Take: TypeAlias = "Mapping[str, int | str | Callable[[object], object]]"
"""Which element of a module's result is its output, by name of the module ({} for a number): an index, a key, or a function of the result.
Of a module that is not named, it is the first array in what it returns; the whole model, "<output>", should return one, or be named."""

Cotangent: TypeAlias = Callable[[tuple[int, ...]], np.ndarray]
"""The shape of the model's output -> what to multiply it with."""

Clipped: TypeAlias = "tuple[np.ndarray, Mapping[str, np.ndarray]]"
"""A norm, and gradients."""

Trained: TypeAlias = "tuple[np.ndarray, Mapping[str, np.ndarray]]"
"""Losses, and parameters."""

OUTPUT = "<output>"
"""The name of what the whole model returns."""


@dataclass(frozen=True)
class AdamW:
    """How the updates are made, where a recorder has no optimizer of its own. Gradients are clipped by their global norm first."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Recording:
    """One forward and backward pass."""

    outputs: Mapping[str, np.ndarray]
    """What each module returns, by its name, in the order of computation; the model's own is OUTPUT. A module that is called again
    has @1, @2 and so on after its name."""
    inputs: Mapping[str, tuple[np.ndarray, ...]]
    """The arrays that each module is called with, in order."""
    output_gradients: Mapping[str, np.ndarray]
    """Of the loss with respect to those outputs, where it depends on them, the last one first."""
    parameter_gradients: Mapping[str, np.ndarray]
    """Of the loss with respect to the parameters; zero where it does not depend on one."""
    loss: np.ndarray
    """(), the loss."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Modules that returned no array, and what they returned instead."""


class Recorder(Protocol):
    """What every recorder can do. The model itself is never changed.

    A dtype is the precision to compute in: "float32", "bfloat16" or "float64". Where parameters are None, they are the model's own.
    """

    side: str
    """What to call it in a message: "torch", "linen"."""
    take: Take

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name; layers that are stacked in one array are taken apart."""

    def parameters(self, batch: Batch) -> Tensors:
        """The model's own parameters, in their own precision.

        Raises:
            InputError: it has none.
        """

    def buffers(self) -> Tensors:
        """What a torch module has beside its parameters, by name: the running statistics of a batch norm. Else nothing."""

    def record(
        self,
        batch: Batch,
        dtype: str,
        parameters: Mapping[str, np.ndarray] | None = None,
        cotangent: Cotangent | None = None,
        keep: Keep = in_memory,
    ) -> Recording:
        """One forward and backward pass, without dropout.

        Args:
            batch: what the model is called with.
            dtype: the precision.
            parameters: to compute with.
            cotangent: where the recorder was given no loss, the loss is the sum of the model's output times what this makes of its
                shape, over the square root of its size; None: `probe`.
            keep: takes each array as soon as it is there, and what it returns gives it back: `flaxgpt.port.kept.in_files` puts it on disk.

        Raises:
            InputError: the model refuses the batch.
        """

    def run_submodule(
        self, batch: Batch, name: str, inputs: tuple[np.ndarray, ...], dtype: str, parameters: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray | None:
        """What one submodule alone returns for these inputs; None where this can't be done (a plain function has no modules).

        Each array that the submodule is called with is replaced by the first of `inputs`, not used yet, of the same shape; what has no
        such counterpart stays as it is in a pass over the batch.
        """

    def clip(self, gradients: Mapping[str, np.ndarray], settings: AdamW, dtype: str, keep: Keep = in_memory) -> Clipped:
        """The global norm () that the gradients had, and the gradients clipped to the settings' norm."""

    def train(
        self,
        batch: Batch,
        settings: AdamW,
        updates: int,
        dtype: str,
        parameters: Mapping[str, np.ndarray] | None = None,
        gradients: Mapping[str, np.ndarray] | None = None,
        cotangent: Cotangent | None = None,
        keep: Keep = in_memory,
    ) -> Trained:
        """Some updates: clipped, then AdamW (or the recorder's own optimizer).

        Args:
            batch: that of all updates.
            settings: of the optimizer.
            updates: how many.
            dtype: the precision.
            parameters: to start with.
            gradients: to make all updates with; None: the model's own.
            cotangent: as in `record`.
            keep: as in `record`.

        Returns:
            The loss (updates,) before each of them, 0 if gradients are given; and the parameters after the last.
        """


def probe(shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers, float32, the same for the same shape."""
    return np.random.default_rng([0, *shape]).normal(size=shape).astype(np.float32)


def taker(name: str, take: Take) -> int | str | Callable[[object], object] | None:
    """Which element of this module's result is its output; None: not said."""
    return next((how for pattern, how in take.items() if matches(pattern, name)), None)


def matches(pattern: str, name: str) -> bool:
    """Whether it is this name, with a number for {}."""
    return re.fullmatch(re.escape(pattern).replace(re.escape("{}"), r"\d+"), name) is not None


def taken(name: str, result: object, how: int | str | Callable[[object], object]) -> object:
    """That element.

    Raises:
        InputError: there is none.
    """
    try:
        if callable(how):
            return how(result)
        return getattr(result, how) if isinstance(how, str) and not isinstance(result, Mapping) else result[how]
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"take: {name} returns {kind_of(result)}, which has no element {how!r}") from None


def kind_of(result: object) -> str:
    """What it is, in a message: "a tuple of (Tensor, DynamicCache)"."""
    if isinstance(result, tuple | list) and type(result) in (tuple, list):
        return f"a {type(result).__name__} of ({', '.join(type(x).__name__ for x in result)})"
    if isinstance(result, Mapping):
        return f"a {type(result).__name__} with {', '.join(map(str, result))}"
    return f"a {type(result).__name__}"


def check_output(side: str, result: object, arrays: int, floating: bool) -> None:
    """See that what a model returned, and from which one array was taken, can be compared.

    Args:
        side: which model.
        result: what it returned.
        arrays: how many arrays there were to choose from.
        floating: whether the array has a gradient.

    Raises:
        InputError: none, several or integers.
    """
    if arrays == 0:
        raise InputError(f"the {side} model returns {kind_of(result)}, which has no array: give the recorder a call that returns one")
    # The records of transformers have one that matters, and it is the first: `model(...)[0]`.
    if arrays > 1 and not (isinstance(result, Mapping) and is_dataclass(result)):
        raise InputError(
            f"the {side} model returns {kind_of(result)}, in which there are {arrays} arrays: say which one is compared, as in "
            f'take={{"{OUTPUT}": 0}} (an index, a key or a function of what it returns), or give the recorder a call that returns it'
        )
    if not floating:
        raise InputError(f"the {side} model returns integers, which have no gradient: give the recorder a call that returns what is before")


def loss_of(side: str, loss: Callable[..., T], output: object, batch: object) -> T:
    """What a user's loss function makes of the output and the batch.

    Raises:
        InputError: it fails, or makes no number of them.
    """
    try:
        value = loss(output, batch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(f"the loss given to the {side} recorder fails: {type(error).__name__}: {lines[0]}") from error
    if getattr(value, "shape", None) != ():
        shape = f"an array of shape {list(value.shape)}" if hasattr(value, "shape") else kind_of(value)
        raise InputError(f"the loss given to the {side} recorder returns {shape}: expected one number, of shape ()")
    return value


def refused(side: str, batch: Batch, error: Exception) -> InputError:
    """The error that a model raised when it was called, as one that names the side and what it was called with."""
    lines = str(error).strip().splitlines() or [""]
    return InputError(f"the {side} model refuses the batch ({described(batch)}): {type(error).__name__}: {lines[0]}")


def described(batch: Batch) -> str:
    """Names, dtypes and shapes."""
    return ", ".join(f"{name}: {np.asarray(x).dtype}{list(np.shape(x))}" for name, x in named(batch).items())


def named(batch: Batch) -> Mapping[str | int, np.ndarray]:
    """The arrays by name, or by number."""
    return batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple) else (batch,)))
