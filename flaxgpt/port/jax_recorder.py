"""What the recorders of models in JAX have in common: parameters by name, one pass, updates.

A pass is traced, with layers that are scanned taken apart, and run in pieces (`flaxgpt.port.evaluate`). So is an update, a parameter at
a time, with all that is not in use in files.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxgpt.errors import InputError
from flaxgpt.optim import clip_by_global_norm
from flaxgpt.port.evaluate import Program, Tree
from flaxgpt.port.kept import LARGE, Keep, Kept, Lazy, in_memory, opened
from flaxgpt.port.recorder import (
    OUTPUT,
    AdamW,
    Batch,
    Clipped,
    Cotangent,
    Recording,
    T,
    Take,
    Tensors,
    Trained,
    check_output,
    loss_of,
    probe,
    refused,
    taken,
    taker,
)
from flaxgpt.port.tap import Tape, recording, to_numpy

Loss = Callable[[jax.Array, Any], jax.Array]
"""(the model's output, the batch) -> (), to be differentiated."""


class JaxRecorder(abc.ABC):
    """A `flaxgpt.port.recorder.Recorder` of something in JAX; a subclass says what its parameters are and how it is called."""

    side = "jax"

    def __init__(
        self,
        loss: Loss | None = None,
        take: Take | None = None,
        optimizer: optax.GradientTransformation | None = None,
        clip: optax.GradientTransformation | None = None,
    ) -> None:
        """See the subclasses.

        Args:
            loss: of the output and the batch; None: a fixed random sum of the output.
            take: which element of a module's result is its output, where that is not the first array in it.
            optimizer: of the training run, clipping included; None: that of the settings.
            clip: the part of it that clips; None: that of the settings.
        """
        self.loss, self.take, self.optimizer, self.clipping = loss, take or {}, optimizer, clip

    @abc.abstractmethod
    def template(self, batch: Batch) -> tuple[Tree, dict[str, int]]:
        """The parameters' shapes, as a tree, and how many layers are stacked below which path ("blocks")."""

    @abc.abstractmethod
    def own(self) -> Tree:
        """The model's own parameters."""

    @abc.abstractmethod
    def call(self, params: Tree, batch: Any, dtype: str, tape: Tape | None) -> Any:
        """Run the model; what it is made of is handed to the tape, if there is one."""

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name."""
        tree, stacked = self.template(batch)
        return {name: tuple(x.shape) for name, x in named(jax.tree.map(lambda x: np.empty(x.shape, np.bool_), tree), stacked).items()}

    def parameters(self, batch: Batch) -> Tensors:
        """The model's own parameters."""
        return named(jax.tree.map(to_numpy, self.own()), self.template(batch)[1])

    def buffers(self) -> Tensors:
        """None."""
        return {}

    def record(
        self,
        batch: Batch,
        dtype: str,
        parameters: Mapping[str, np.ndarray] | None = None,
        cotangent: Cotangent | None = None,
        keep: Keep = in_memory,
    ) -> Recording:
        """One forward and backward pass."""
        return self._pass(batch, dtype, cotangent)(self._sources(batch, dtype, parameters, keep), keep)

    def _pass(self, batch: Batch, dtype: str, cotangent: Cotangent | None) -> Callable[[Mapping[str, Kept], Keep], Recording]:
        """A function of the parameters that records."""
        tapes = []

        def run(params: dict[str, jax.Array]) -> tuple[Any, ...]:
            tape = Tape(next(iter(params.values())), self.take)
            tapes.append(tape)

            def forward(params: dict[str, jax.Array]) -> jax.Array:
                with recording(tape):
                    output = self._output(params, given, batch, dtype, tape)
                return self._loss(tape.watched(OUTPUT, output), given, cotangent)

            loss, gradients = jax.value_and_grad(forward)(params)
            return loss, gradients, tape.outputs, tape.inputs, tape.gradients

        with precision(dtype):
            given = on_device(batch, dtype)
            program = self._program(run, batch, dtype)
        (tape,) = tapes
        if dtype == "float64" and (narrow := [name for name, x in tape.outputs.items() if x.dtype == jnp.float32]):
            raise InputError(
                f"the {self.side} model computes {narrow[0]} in float32 where float64 is asked for: "
                "give the recorder a function of the dtype that makes the model, or leave dtype out of its modules"
            )

        def record(parameters: Mapping[str, Kept], keep: Keep) -> Recording:
            with precision(dtype):
                loss, gradients, outputs, inputs, backward = program(parameters, keep=keep)
            # JAX gives dicts back in the order of their keys.
            return Recording(
                opened({name: outputs[name] for name in tape.outputs}),
                Lazy(inputs, lambda name: tuple(kept() for kept in inputs[name])),
                opened({name: backward[name] for name in reversed(tape.outputs) if name in backward}),
                opened(gradients),
                loss(),
                tape.unusable,
            )

        return record

    def run_submodule(
        self, batch: Batch, name: str, inputs: tuple[np.ndarray, ...], dtype: str, parameters: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray | None:
        """What one submodule alone returns for these inputs."""

        def run(params: dict[str, jax.Array]) -> jax.Array | None:
            tape = Tape(next(iter(params.values())), self.take, (name, inputs))
            with recording(tape):
                self._output(params, on_device(batch, dtype), batch, dtype, tape)
            return tape.outputs.get(name) if name in tape.inputs else None

        with precision(dtype):
            found = self._program(run, batch, dtype)(self._sources(batch, dtype, parameters, in_memory), keep=in_memory)
        return None if found is None else found()

    def clip(self, gradients: Mapping[str, np.ndarray], settings: AdamW, dtype: str, keep: Keep = in_memory) -> Clipped:
        """The norm that the gradients had, and the gradients, clipped."""
        clip = self.clipping or clip_by_global_norm(settings.clip_norm)

        def run(tree: Tree) -> tuple[jax.Array, Tree]:
            with unrolled():
                return optax.tree.norm(tree), clip.update(tree, clip.init(tree))[0]

        with precision(dtype):
            kept = _kept(gradients, dtype, keep)
            shapes = {name: jax.ShapeDtypeStruct(g().shape, _at_least_float32(dtype)) for name, g in kept.items()}
            norm, clipped = Program(run, shapes, apart=True)(kept, keep=keep)
        return norm(), opened(clipped)

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
        """Some updates."""
        tree, stacked = self.template(batch)
        tx = self.optimizer or make_optimizer(settings)
        losses = []

        def start(params: Tree) -> optax.OptState:
            with unrolled():
                return tx.init(params)

        def update(params: Tree, state: optax.OptState, gradients: Tree) -> tuple[Tree, optax.OptState]:
            with unrolled():
                changes, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, changes), state

        def whole(kept: Mapping[str, Kept]) -> Tree:
            return restored(kept, tree, stacked, lambda layers: lambda: np.stack([layer() for layer in layers]))

        def parts(tree: Tree) -> dict[str, Kept]:
            return named(tree, stacked, lambda kept, i: lambda: kept()[i])

        record = self._pass(batch, dtype, cotangent) if gradients is None else None
        with precision(dtype):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, _at_least_float32(dtype)), tree)
            params = whole(self._sources(batch, dtype, parameters, keep))
            state = Program(start, shapes, apart=True)(params, keep=keep)
            step = Program(update, shapes, jax.eval_shape(start, shapes), shapes, apart=True)
            fixed = None if gradients is None else _kept(gradients, dtype, keep)
            for _ in range(updates):
                if record:
                    run = record(parts(params), keep)
                    fixed = _asked(run.parameter_gradients)
                    losses.append(run.loss)
                params, state = step(params, state, whole(fixed), keep=keep)
            return np.array(losses or [0.0] * updates), opened(parts(params))

    def _program(self, function: Callable[[dict[str, jax.Array]], Tree], batch: Batch, dtype: str) -> Program:
        """To run a function of the parameters, by name."""
        return Program(function, {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in self.shapes(batch).items()})

    def _sources(self, batch: Batch, dtype: str, parameters: Mapping[str, np.ndarray] | None, keep: Keep) -> dict[str, Kept]:
        """What to run it with."""
        return _kept(self.parameters(batch) if parameters is None else parameters, dtype, keep)

    def _output(self, params: dict[str, jax.Array], given: Any, batch: Batch, dtype: str, tape: Tape) -> jax.Array:
        """Of the named parameters, everything that can be seen laid open."""
        layers: dict[int, list[jax.Array]] = {}

        def stack(parts: list[jax.Array]) -> jax.Array:
            whole = jnp.stack(parts)
            layers[id(whole)] = parts
            return whole

        whole = restored(params, *self.template(batch), stack)
        with unrolled(layers):
            return self._first(whole, given, batch, dtype, tape)

    def _first(self, params: Tree, given: Any, batch: Batch, dtype: str, tape: Tape | None) -> jax.Array:
        """The array of what the model returns."""
        try:
            result = self.call(params, given, dtype, tape)
        except InputError:
            raise
        except Exception as error:
            raise refused(self.side, batch, error) from error
        how = taker(OUTPUT, self.take)
        chosen = result if how is None else taken("the model", result, how)
        arrays = [x for x in jax.tree.leaves(chosen) if isinstance(x, jax.Array)]
        check_output(self.side, result, len(arrays), bool(arrays) and jnp.issubdtype(arrays[0].dtype, jnp.inexact))
        return arrays[0]

    def _loss(self, output: jax.Array, given: Any, cotangent: Cotangent | None) -> jax.Array:
        if self.loss is not None:
            return loss_of(self.side, self.loss, output, given)
        weights = (cotangent or probe)(output.shape)
        if jnp.iscomplexobj(output):
            output = output.real + output.imag
        return (output * jnp.asarray(weights, output.dtype)).sum() / output.size**0.5


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """What all of it runs in: float64 where asked for, and products of float32 that are not rounded to less."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == "float64"))
        stack.enter_context(jax.default_matmul_precision("float32"))
        if dtype == "float64":
            # Whoever asks for float32 by this name gets float64: jnp.arange(..., dtype=jnp.float32), jnp.float32(3).
            stack.enter_context(replaced(jnp, "float32", jnp.float64))
            for primitive, keyword in ((jax.lax.convert_element_type_p, "new_dtype"), (jax.lax.dot_general_p, "preferred_element_type")):
                stack.enter_context(replaced(primitive, "bind", _wide(primitive.bind, keyword)))
        yield


@contextlib.contextmanager
def unrolled(layers: Mapping[int, Sequence[jax.Array]] = MappingProxyType({})) -> Iterator[None]:
    """A function is traced as one: scans are loops, what is jitted is inlined, and nothing is rematerialised.

    Args:
        layers: id of an array in which layers are stacked -> the layers. A scan over it takes those, and no slices of it.
    """
    with jax.disable_jit(), contextlib.ExitStack() as stack:
        for owner, name, value in (
            (jax.lax, "scan", functools.partial(_loop, layers)),
            (jax, "remat", _as_it_is),
            (jax, "checkpoint", _as_it_is),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


def named(tree: Tree, stacked: Mapping[str, int], layer: Callable[[T, int], T] = operator.getitem) -> dict[str, T]:
    """A tree's leaves by dotted path; those below a stacked path by the number of the layer that follows it."""
    arrays = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = dotted(path)
        prefix = _prefix(name, stacked)
        if prefix is None:
            arrays[name] = x
        else:
            arrays |= {f"{prefix}.{i}{name[len(prefix) :]}": layer(x, i) for i in range(stacked[prefix])}
    return arrays


def restored(arrays: Mapping[str, T], tree: Tree, stacked: Mapping[str, int], stack: Callable[[list[T]], T]) -> Tree:
    """The inverse of `named`, of a tree of that structure."""

    def leaf(path: Any, _: Any) -> T:
        name = dotted(path)
        prefix = _prefix(name, stacked)
        if prefix is None:
            return arrays[name]
        return stack([arrays[f"{prefix}.{i}{name[len(prefix) :]}"] for i in range(stacked[prefix])])

    return jax.tree_util.tree_map_with_path(leaf, tree)


def dotted(path: tuple[Any, ...]) -> str:
    """A path in a pytree as a name: "blocks.0.attn.kernel"."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def on_device(batch: Any, dtype: str) -> Any:
    """The batch as JAX's arrays, floating point in this precision."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else None), batch)


def called(function: Callable[..., Any], batch: Any) -> Any:
    """The function of the batch: by name, or in order."""
    if isinstance(batch, Mapping):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)


def make_optimizer(settings: AdamW) -> optax.GradientTransformation:
    """Clipping and AdamW as torch has them."""
    adamw = optax.adamw(settings.learning_rate, settings.beta1, settings.beta2, settings.eps, weight_decay=settings.weight_decay)
    return optax.chain(clip_by_global_norm(settings.clip_norm), adamw)


def _prefix(name: str, stacked: Mapping[str, int]) -> str | None:
    return next((prefix for prefix in stacked if name.startswith(f"{prefix}.")), None)


def _at_least_float32(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _asked(arrays: Mapping[str, np.ndarray]) -> dict[str, Kept]:
    return {name: functools.partial(arrays.__getitem__, name) for name in arrays}


def _kept(arrays: Mapping[str, np.ndarray], dtype: str, keep: Keep) -> dict[str, Kept]:
    """How to get at each; what is large is put away in the precision that it is wanted in, to be mapped and not converted again."""
    large = (name for name in arrays if arrays[name].nbytes >= LARGE)
    return _asked(arrays) | {name: keep(np.ascontiguousarray(arrays[name], _at_least_float32(dtype))) for name in large}


def _loop(
    layers: Mapping[int, Sequence[jax.Array]],
    step: Callable[[Tree, Tree], tuple[Tree, Tree]],
    carry: Tree,
    xs: Tree = None,
    length: int | None = None,
    reverse: bool = False,
    **_: Any,
) -> tuple[Tree, Tree]:
    """`jax.lax.scan` as a loop."""
    count = len(jax.tree.leaves(xs)[0]) if length is None else length
    results = {}
    for i in reversed(range(count)) if reverse else range(count):
        x = jax.tree.map(lambda x, i=i: layers[id(x)][i] if id(x) in layers else x[i], xs)
        carry, results[i] = step(carry, x)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *(results[i] for i in range(count)))


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """In place of `jax.checkpoint`, which would trace what is to be seen."""
    return (lambda f: f) if function is None else function


def _wide(bind: Callable[..., Any], keyword: str) -> Callable[..., Any]:
    """An array of float64 that is cast to float32 stays as it is: a norm or softmax computed there would be true to seven digits."""

    def widened(*args: Any, **kwargs: Any) -> Any:
        x = args[0]
        narrows = kwargs.get(keyword) == np.float32 and getattr(x, "dtype", None) == np.float64 and x.ndim > 0
        return bind(*args, **kwargs | ({keyword: np.dtype("float64")} if narrows else {}))

    return widened


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, an attribute has another value."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
