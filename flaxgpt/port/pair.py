"""Two models that should compute the same, and what they are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.port.names import Names
from flaxgpt.port.recorder import Batch, Recorder, named


@dataclass(frozen=True)
class Pair:
    """What `flaxgpt.port.check.check` compares.

    Pair(reference=TorchRecorder(model), port=LinenRecorder(module), names={"model.embed_tokens": "embed"}, batch={"tokens": tokens_BT})
    """

    reference: Recorder
    """The model that is right: `torch_ref.port.torch_recorder.TorchRecorder`, or any other recorder."""
    port: Recorder
    """The one that should be like it: a `LinenRecorder`, `NNXRecorder` or `FunctionRecorder`, or any other."""
    batch: Batch
    """NumPy arrays: one, a tuple, or a dict. A recorder without a `call` calls its model with them, those of a dict by their names."""
    names: Names = field(default_factory=dict)
    """The reference's names and the port's, where they differ (`flaxgpt.port.names`)."""
    convert: bool = True
    """Whether the port takes the reference's parameters, by the table of names. False: it has its own, converted by the user's own code."""

    def __post_init__(self) -> None:
        """See that each is what it should be.

        Raises:
            InputError: a model without a recorder, or a batch that nothing can be computed of.
        """
        for side, recorder in (("reference", self.reference), ("port", self.port)):
            if not hasattr(recorder, "run_submodule"):
                raise InputError(f"the {side} is a {type(recorder).__name__}: expected a recorder of it, such as TorchRecorder(model)")
        if isinstance(self.batch, Mapping) and not all(isinstance(name, str) for name in self.batch):
            raise InputError(f"batch: expected names, not {', '.join(repr(name) for name in self.batch if not isinstance(name, str))}")
        for name, x in named(self.batch).items():
            _check_array(f"batch: {name}", x)


def _check_array(name: str, x: object) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise InputError(f"{name} is a {type(x).__name__}: expected an array, a tuple of arrays, or a dict of them by name")
    array = np.asarray(x)
    if not array.size:
        raise InputError(f"{name} is {list(array.shape)}: there is nothing in it")
    if array.dtype.kind in "fc" and np.isnan(array).any():
        raise InputError(f"{name} has nan in {np.isnan(array).sum()} of {array.size} places, of which nothing but nan can come")
