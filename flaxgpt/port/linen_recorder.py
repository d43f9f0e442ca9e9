"""Recording a Flax Linen module, by intercepting the calls of everything in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax

from flaxgpt.errors import InputError
from flaxgpt.port.jax_recorder import JaxRecorder, Loss, Tree, called, on_device
from flaxgpt.port.recorder import Batch, Take, refused
from flaxgpt.port.tap import Tape


class LinenRecorder(JaxRecorder):
    """Records a Linen module.

        LinenRecorder(GPT(cfg), call=lambda module, batch: module(batch["tokens"]), loss=loss)

    A submodule's name is its path with dots; below a module that is scanned (`nn.scan`), the number of the layer follows: "blocks.0.attn".
    """

    side = "linen"

    def __init__(
        self,
        module: nn.Module | Callable[[str], nn.Module],
        variables: Mapping[str, Any] | None = None,
        *,
        call: Callable[[nn.Module, Any], Any] | None = None,
        loss: Loss | None = None,
        take: Take | None = None,
        optimizer: optax.GradientTransformation | None = None,
        clip: optax.GradientTransformation | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            module: the module, or, if it has a dtype of its own, a function of "float32", "bfloat16" or "float64" that makes it.
            variables: its "params" and other collections; None: it takes the parameters of the reference.
            call: (module, batch) -> output, one array; None: the module called with the batch.
            loss: (output, batch) -> (); None: a fixed random sum of the output.
            take: which element of a module's result is its output: {"blocks.{}.attn": 0}; of the model itself: {"<output>": 0}.
            optimizer: the run's own, clipping included; None: AdamW as `check` says.
            clip: the run's own clipping; None: by global norm.
        """
        super().__init__(loss, take, optimizer, clip)
        self.make = (lambda dtype: module) if isinstance(module, nn.Module) else module
        self.variables, self.how = variables, call or called
        self._template: tuple[Tree, dict[str, int]] | None = None

    def template(self, batch: Batch) -> tuple[Tree, dict[str, int]]:
        """From an abstract call of `init`; what is scanned is known by parameters that have an axis less inside than outside."""
        if self._template is None:
            inside: dict[tuple[str, ...], Tree] = {}

            def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
                result = call(*args, **kwargs)
                inside[context.module.path] = jax.tree.map(lambda x: x.shape, dict(context.module.variables.get("params", {})))
                return result

            def init() -> Tree:
                keys = {name: jax.random.key(0) for name in ("params", "dropout")}
                return nn.init(self.how, self.make("float32"))(keys, on_device(batch, "float32"))

            try:
                with nn.intercept_methods(intercept):
                    variables = jax.eval_shape(init)
            except Exception as error:
                raise refused(self.side, batch, error) from error
            others = sorted(set(variables) - {"params", "intermediates"})
            if others and self.variables is None:
                raise InputError(f"the linen module has the collections {', '.join(others)} beside params: give its variables")
            params = variables.get("params", {})
            self._template = params, _stacked(params, inside)
        return self._template

    def own(self) -> Tree:
        """Those of the variables."""
        if self.variables is None or "params" not in self.variables:
            raise InputError('the linen module has no parameters of its own: give LinenRecorder(module, {"params": ...})')
        return self.variables["params"]

    def call(self, params: Tree, batch: Any, dtype: str, tape: Tape | None) -> Any:
        """Run the module with its calls intercepted."""
        others = {name: x for name, x in (self.variables or {}).items() if name != "params"}
        run = functools.partial(nn.apply(self.how, self.make(dtype)), {"params": params, **on_device(others, dtype)}, batch)
        if tape is None:
            return run()
        layers = dict.fromkeys(self._template[1], -1)

        def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = ".".join(context.module.path)
            if context.method_name != "__call__" or not path or not tape.sees((args, kwargs)):
                return call(*args, **kwargs)
            if path in layers:
                layers[path] += 1
            prefix = next((prefix for prefix in layers if f"{path}.".startswith(f"{prefix}.")), None)
            name = path if prefix is None else f"{prefix}.{layers[prefix]}{path[len(prefix) :]}"
            return tape.called(tape.numbered(name), call, args, kwargs)

        with nn.intercept_methods(intercept):
            return run()


def _stacked(params: Tree, inside: Mapping[tuple[str, ...], Tree]) -> dict[str, int]:
    """Path of each module that is scanned over -> how often: its parameters have a first axis that they lack within its calls."""
    found: dict[str, int] = {}
    for path in sorted(inside, key=len):
        tree = params
        for key in path:
            tree = tree.get(key, {})
        outer, inner = jax.tree.leaves(tree), jax.tree.leaves(inside[path], is_leaf=lambda x: isinstance(x, tuple))
        name = ".".join(path)
        if outer and inner and len(outer[0].shape) > len(inner[0]) and not any(name.startswith(f"{prefix}.") for prefix in found):
            found[name] = outer[0].shape[0]
    return found
