"""Recording a plain function in JAX, which says itself what there is to see: `flaxgpt.port.tap.tap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from flaxgpt.port.jax_recorder import JaxRecorder, Loss, Tree
from flaxgpt.port.recorder import Batch, Take
from flaxgpt.port.tap import Tape


class FunctionRecorder(JaxRecorder):
    """Records a function of (params, batch) that calls `tap(name, x)`.

    FunctionRecorder(forward, params, stacked={"blocks": 12})

    The name of a parameter is its path in the tree, with dots.
    """

    side = "function"

    def __init__(
        self,
        function: Callable[[Tree, Any], Any],
        params: Tree,
        *,
        stacked: Mapping[str, int] | None = None,
        loss: Loss | None = None,
        take: Take | None = None,
        optimizer: optax.GradientTransformation | None = None,
        clip: optax.GradientTransformation | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            function: (params, batch) -> output.
            params: its parameters, or `jax.ShapeDtypeStruct`s in their places if it takes those of the reference.
            stacked: how many layers are stacked on the first axis of everything below a path: their names are "blocks.0", "blocks.1", ...
            loss: (output, batch) -> (); None: a fixed random sum of the output.
            take: which element of what the function returns is compared: {"<output>": 0}.
            optimizer: the run's own, clipping included; None: AdamW as `check` says.
            clip: the run's own clipping; None: by global norm.
        """
        super().__init__(loss, take, optimizer, clip)
        self.function, self.params, self.stacked = function, params, dict(stacked or {})

    def template(self, batch: Batch) -> tuple[Tree, dict[str, int]]:
        """As they were given."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params), self.stacked

    def own(self) -> Tree:
        """As they were given."""
        return self.params

    def call(self, params: Tree, batch: Any, dtype: str, tape: Tape | None) -> Any:
        """The function; it taps by itself."""
        return self.function(params, batch)
