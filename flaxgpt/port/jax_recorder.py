"""What the recorders of models in JAX have in common: parameters by name, one pass, updates."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxgpt.errors import InputError
from flaxgpt.port.recorder import OUTPUT, AdamW, Batch, Cotangent, Recording, Take, Tensors, kind_of, probe, refused
from flaxgpt.port.tap import Tape, recording, to_numpy

Tree = Any
"""A pytree of arrays."""

Loss = Callable[[jax.Array, Any], jax.Array]
"""(the model's output, the batch) -> (), to be differentiated."""


QUICK = {"xla_backend_optimization_level": 0}
"""A pass is compiled for one run: of GPT-2 with two layers, that takes 2.8 s in place of 4.5 s on one core."""


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

    def record(self, batch: Batch, dtype: str, parameters: Tensors | None = None, cotangent: Cotangent | None = None) -> Recording:
        """One forward and backward pass."""
        tapes = []

        def run(params: Tree, given: Any) -> tuple[Any, ...]:
            with unrolled():
                tape = Tape(jax.tree.leaves(params)[0], self.take)
                tapes.append(tape)

                def forward(params: Tree) -> jax.Array:
                    with recording(tape):
                        output = self._output(params, given, batch, dtype, tape)
                    return self._loss(tape.watched(OUTPUT, output), given, cotangent)

                loss, gradients = jax.value_and_grad(forward)(params)
                return loss, gradients, tape.outputs, tape.inputs, tape.gradients

        with precision(dtype):
            found = jax.jit(run, donate_argnums=0, compiler_options=QUICK)(self._params(batch, parameters, dtype), on_device(batch, dtype))
            loss, gradients, outputs, inputs, backward = jax.tree.map(to_numpy, jax.device_get(found))
        outputs = {name: outputs[name] for name in tapes[0].outputs}  # a jitted function returns dicts in the order of their keys
        backward = {name: backward[name] for name in reversed(outputs) if name in backward}
        if dtype == "float64" and (narrow := [name for name, x in outputs.items() if x.dtype == np.float32]):
            raise InputError(
                f"the {self.side} model computes {narrow[0]} in float32 where float64 is asked for: "
                "give the recorder a function of the dtype that makes the model, or leave dtype out of its modules"
            )
        own = named(gradients, self.template(batch)[1])
        return Recording(outputs, inputs, backward, own, loss, tapes[0].classes, tapes[0].unusable)

    def run_submodule(
        self, batch: Batch, name: str, inputs: tuple[np.ndarray, ...], dtype: str, parameters: Tensors | None = None
    ) -> np.ndarray | None:
        """What one submodule alone returns for these inputs."""

        def run(params: Tree, given: Any) -> jax.Array | None:
            with unrolled():
                tape = Tape(jax.tree.leaves(params)[0], self.take, (name, inputs))
                with recording(tape):
                    self._output(params, given, batch, dtype, tape)
                return tape.outputs.get(name) if name in tape.inputs else None

        with precision(dtype):
            found = jax.jit(run, compiler_options=QUICK)(self._params(batch, parameters, dtype), on_device(batch, dtype))
            return None if found is None else to_numpy(found)

    def clip(self, gradients: Tensors, settings: AdamW, dtype: str) -> Tensors:
        """The gradients, clipped, and the norm that they had."""
        with precision(dtype):
            tree = {name: jnp.asarray(g, _at_least_float32(dtype)) for name, g in gradients.items()}
            clip = self.clipping or clip_by_global_norm(settings.clip_norm)
            clipped, norm = clip.update(tree, clip.init(tree))[0], optax.tree.norm(tree)
            return {"norm": to_numpy(norm), **jax.tree.map(to_numpy, clipped)}

    def train(
        self,
        batch: Batch,
        settings: AdamW,
        updates: int,
        dtype: str,
        parameters: Tensors | None = None,
        gradients: Tensors | None = None,
        cotangent: Cotangent | None = None,
    ) -> Tensors:
        """Some updates."""
        losses = []
        with precision(dtype):
            _, stacked = self.template(batch)
            wide = _at_least_float32(dtype)
            params = jax.tree.map(
                jnp.copy, self._params(batch, parameters, wide)
            )  # an update donates them, and they may be the model's own
            given = on_device(batch, dtype)
            tx = self.optimizer or make_optimizer(settings)
            fixed = None if gradients is None else restored(gradients, params, stacked, wide)
            state = tx.init(params)

            def run(params: Tree) -> jax.Array:
                output = self._output(jax.tree.map(lambda x: x.astype(dtype), params), given, batch, dtype, None)
                return self._loss(output, given, cotangent)

            @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=QUICK)
            def update(params: Tree, state: optax.OptState, given_grads: Tree) -> tuple[Any, ...]:
                loss, grads = jax.value_and_grad(run)(params) if given_grads is None else (0.0, given_grads)
                changes, state = tx.update(grads, state, params)
                return optax.apply_updates(params, changes), state, loss

            for _ in range(updates):
                params, state, loss = update(params, state, fixed)
                if fixed is None:
                    losses.append(to_numpy(loss))
            after = {f"parameter/{name}": x for name, x in named(jax.tree.map(to_numpy, params), stacked).items()}
        return ({"loss": np.array(losses)} if losses else {}) | after

    def _params(self, batch: Batch, parameters: Tensors | None, dtype: str) -> Tree:
        """A copy, which may be donated."""
        tree, stacked = self.template(batch)
        if parameters is None:
            return jax.tree.map(lambda x: jnp.array(x, dtype), self.own())
        return restored(parameters, tree, stacked, dtype)

    def _output(self, params: Tree, given: Any, batch: Batch, dtype: str, tape: Tape | None) -> jax.Array:
        try:
            result = self.call(params, given, dtype, tape)
        except InputError:
            raise
        except Exception as error:
            raise refused(self.side, batch, error) from error
        leaves = jax.tree.leaves(result)
        if not leaves or not isinstance(leaves[0], jax.Array):
            raise InputError(f"the {self.side} model returns {kind_of(result)}: give the recorder a call that returns one array")
        return leaves[0]

    def _loss(self, output: jax.Array, given: Any, cotangent: Cotangent | None) -> jax.Array:
        if self.loss is not None:
            return self.loss(output, given)
        weights = (cotangent or probe)(output.shape)
        return (output * jnp.asarray(weights, output.dtype)).sum() / output.size**0.5


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """What all of it runs in: float64 where asked for, and products of float32 that are not rounded to less."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == "float64"))
        stack.enter_context(jax.default_matmul_precision("float32"))
        if dtype == "float64":
            for primitive, keyword in ((jax.lax.convert_element_type_p, "new_dtype"), (jax.lax.dot_general_p, "preferred_element_type")):
                stack.enter_context(replaced(primitive, "bind", _wide(primitive.bind, keyword)))
        yield


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """A function is traced as one: scans are loops, what is jitted is inlined, and nothing is rematerialised."""
    with jax.disable_jit(), replaced(jax, "remat", _as_it_is), replaced(jax, "checkpoint", _as_it_is):
        yield


def named(tree: Tree, stacked: Mapping[str, int]) -> Tensors:
    """A tree's arrays by dotted path; those below a stacked path by the number of the layer that follows it."""
    arrays = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = dotted(path)
        prefix = _prefix(name, stacked)
        if prefix is None:
            arrays[name] = x
        else:
            arrays |= {f"{prefix}.{i}{name[len(prefix) :]}": x[i] for i in range(stacked[prefix])}
    return arrays


def restored(arrays: Tensors, tree: Tree, stacked: Mapping[str, int], dtype: Any) -> Tree:
    """The inverse of `named`, of a tree of that structure."""

    def leaf(path: Any, _: Any) -> jax.Array:
        name = dotted(path)
        prefix = _prefix(name, stacked)
        if prefix is None:
            return jnp.array(arrays[name], dtype)
        return jnp.array(np.stack([arrays[f"{prefix}.{i}{name[len(prefix) :]}"] for i in range(stacked[prefix])]), dtype)

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


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Torch's rule: a factor of limit / (norm + 1e-6) where that is below 1. (Optax's own has no 1e-6.)"""

    def clip(grads: Tree, _: Tree | None) -> Tree:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(clip)


def _prefix(name: str, stacked: Mapping[str, int]) -> str | None:
    return next((prefix for prefix in stacked if name.startswith(f"{prefix}.")), None)


def _at_least_float32(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


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
