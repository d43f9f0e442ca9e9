"""Recording a Flax NNX module, by wrapping the `__call__` of the classes in it while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
from flax import nnx

from flaxgpt.port.jax_recorder import JaxRecorder, Loss, Tree, called, on_device, replaced, unrolled
from flaxgpt.port.recorder import Batch, Take, refused
from flaxgpt.port.tap import Tape


class NNXRecorder(JaxRecorder):
    """Records an NNX module, in `eval()` mode.

    NNXRecorder(model, call=lambda model, batch: model(batch["tokens"]), loss=loss)

    A submodule's name is its path with dots, "blocks.0.attn". What is computed is done with a copy, so the model stays as it is.
    """

    side = "nnx"

    def __init__(
        self,
        model: nnx.Module | Callable[[str], nnx.Module],
        *,
        call: Callable[[Any, Any], Any] | None = None,
        loss: Loss | None = None,
        take: Take | None = None,
        optimizer: optax.GradientTransformation | None = None,
        clip: optax.GradientTransformation | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: the model, or, if it has a dtype of its own, a function of "float32", "bfloat16" or "float64" that makes it.
            call: (model, batch) -> output, one array; None: the model called with the batch.
            loss: (output, batch) -> (); None: a fixed random sum of the output.
            take: which element of a module's result is its output: {"blocks.{}.attn": 0}; of the model itself: {"<output>": 0}.
            optimizer: the run's own, clipping included; None: AdamW as `check` says.
            clip: the run's own clipping; None: by global norm.
        """
        super().__init__(loss, take, optimizer, clip)
        self.make = (lambda dtype: model) if isinstance(model, nnx.Module) else model
        self.model, self.how = self.make("float32"), call or called
        self._stacked: dict[str, int] | None = None

    def template(self, batch: Batch) -> tuple[Tree, dict[str, int]]:
        """The model's own; what is scanned is known by modules that are called with an axis less than the model has."""
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.own())
        if self._stacked is None:
            stacked: dict[str, int] = {}

            def run(params: Tree, batch: Any) -> Any:
                with unrolled(), self._calls_seen(model := self._with(params, "float32"), lambda *call: _call(*call), stacked):
                    return jax.tree.leaves(self.how(model, batch))

            try:
                jax.eval_shape(run, params, on_device(batch, "float32"))
            except Exception as error:
                raise refused(self.side, batch, error) from error
            self._stacked = stacked
        return params, self._stacked

    def own(self) -> Tree:
        """The model's Params."""
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))

    def call(self, params: Tree, batch: Any, dtype: str, tape: Tape | None) -> Any:
        """Run a copy of the model with these parameters."""
        model = self._with(params, dtype)
        if tape is None:
            return self.how(model, batch)

        def seen(name: str, function: Callable[..., Any], module: nnx.Module, args: Any, kwargs: Any) -> Any:
            if not name or not tape.sees((args, kwargs)):
                return function(module, *args, **kwargs)
            return tape.called(tape.numbered(name), lambda *a, **k: function(module, *a, **k), args, kwargs)

        with self._calls_seen(model, seen, {}):
            return self.how(model, batch)

    def _with(self, params: Tree, dtype: str) -> nnx.Module:
        graph, own, others = nnx.split(self.make(dtype), nnx.Param, ...)
        others = jax.tree.map(lambda x: on_device(x, dtype) if hasattr(x, "dtype") and not _is_key(x) else x, others)
        nnx.replace_by_pure_dict(own, params)
        model = nnx.merge(graph, own, others)
        model.eval()
        return model

    @contextlib.contextmanager
    def _calls_seen(self, model: nnx.Module, seen: Callable[..., Any], stacked: dict[str, int]) -> Iterator[None]:
        """Within it, every call of a module in the model is handed to `seen`: (name, function, module, args, kwargs).

        A module that is none of the model's own is one layer of those that are scanned over: its name gets the number of the layer, and
        `stacked` its path and how many there are.
        """
        modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
        names = {id(module): name for name, module in modules.items()}
        layers: list[nnx.Module] = []  # kept, so that no other gets their id

        def name_of(module: nnx.Module) -> str:
            if id(module) not in names:
                prefix = next((n for n, other in modules.items() if type(other) is type(module) and _layer_of(module, other)), None)
                if prefix is None:
                    return ""
                number = sum(names[id(layer)].startswith(f"{prefix}.") for layer in layers)
                layers.append(module)
                stacked[prefix] = jax.tree.leaves(nnx.state(modules[prefix], nnx.Param))[0].shape[0]
                for path, inner in nnx.iter_modules(module):
                    names[id(inner)] = ".".join([prefix, str(number), *map(str, path)])
            return names[id(module)]

        with contextlib.ExitStack() as stack:
            for kind in {type(module) for module in modules.values() if callable(module)}:
                function = kind.__call__
                stack.enter_context(replaced(kind, "__call__", _wrapped(function, name_of, seen)))
            yield


def _wrapped(function: Callable[..., Any], name_of: Callable[[nnx.Module], str], seen: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return seen(name_of(module), function, module, args, kwargs)

    return call


def _call(name: str, function: Callable[..., Any], module: nnx.Module, args: Any, kwargs: Any) -> Any:
    return function(module, *args, **kwargs)


def _layer_of(module: nnx.Module, stack: nnx.Module) -> bool:
    """Whether the module's parameters are the stack's with their first axis gone."""
    one, all_ = (jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(m, nnx.Param))) for m in (module, stack))
    shapes, stacked = (jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple)) for tree in (one, all_))
    return bool(shapes) and len(shapes) == len(stacked) and all(a == b[1:] for a, b in zip(shapes, stacked, strict=True))


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.extended)
