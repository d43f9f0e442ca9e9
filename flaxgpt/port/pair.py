"""Two models that should compute the same, and what they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from flaxgpt.port.names import Names
from flaxgpt.port.recorder import Batch, Recorder


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
