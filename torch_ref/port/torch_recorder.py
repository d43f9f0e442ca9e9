"""Recording any torch module, by hooks on a copy of it: a `flaxgpt.port.recorder.Recorder`."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flaxgpt.errors import InputError
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
    kind_of,
    loss_of,
    probe,
    refused,
    taken,
    taker,
)
from torch_ref.port.wide import Wide, default_float64


class TorchRecorder:
    """Records a torch module, in `eval()` mode.

        TorchRecorder(model, call=lambda model, batch: model(batch["tokens"]).logits, loss=loss)

    Everything is done to a copy, so the model stays as it is, whatever happens.
    """

    side = "torch"

    def __init__(
        self,
        model: nn.Module,
        *,
        call: Callable[[nn.Module, Any], Any] | None = None,
        loss: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
        take: Take | None = None,
        optimizer: Callable[[nn.Module], Callable[[int], object]] | None = None,
        clip: Callable[[nn.Module], object] | None = None,
        rebuild: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: any module.
            call: (model, batch) -> output, one tensor; None: the model called with the batch.
            loss: (output, batch) -> (); None: a fixed random sum of the output.
            take: which element of a module's result is its output: {"model.layers.{}.self_attn": 0, "<output>": "logits"}.
            optimizer: model -> a function that makes update number n, from 0, of the run, clipping included; None: AdamW as `check` says.
            clip: clips the gradients of a model, whatever its parameters are, and returns their norm; None: by global norm.
            rebuild: makes such a model again. In float64 it is called with torch's default dtype float64, so that what the model computes
                when it is made (the frequencies of rotary positions) is float64 too; None: that is as the model has it.
        """
        self.model, self.how, self.loss, self.take, self.rebuild = model, call or _called, loss, take or {}, rebuild
        self.optimizer, self.clipping = optimizer, clip

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter; one that is tied to another is not there a second time."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    def parameters(self, batch: Batch) -> Tensors:
        """The model's own parameters."""
        return {name: _shared(parameter) for name, parameter in self.model.named_parameters()}

    def buffers(self) -> Tensors:
        """The model's own."""
        return {name: _shared(buffer) for name, buffer in self.model.named_buffers()}

    def record(
        self,
        batch: Batch,
        dtype: str,
        parameters: Mapping[str, np.ndarray] | None = None,
        cotangent: Cotangent | None = None,
        keep: Keep = in_memory,
    ) -> Recording:
        """One forward and backward pass."""
        model = self._copy(dtype, parameters)
        outputs, gradients = {}, {}
        inputs: dict[str, tuple[Kept, ...]] = {}
        unusable: dict[str, str] = {}
        calls: dict[str, int] = {}

        def watch(name: str, output: torch.Tensor) -> None:
            outputs[name] = keep(_numpy(output))
            if output.requires_grad:
                output.register_hook(lambda gradient: gradients.__setitem__(name, keep(_numpy(gradient))))

        def before(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = calls.get(path, -1) + 1
            inputs[_numbered(path, calls[path])] = tuple(keep(_numpy(x)) for x in _tensors((args, kwargs)))

        def after(path: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            name = _numbered(path, calls[path])
            output = _element(name, result, self.take)
            if output is None:
                unusable[name] = kind_of(result)
            else:
                watch(name, output)

        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True)
                module.register_forward_hook(functools.partial(after, path))
        unused = {name: functools.partial(np.zeros, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
        loss, found = self._differentiated(
            model, batch, dtype, cotangent, lambda gradient: keep(_shared(gradient)), functools.partial(watch, OUTPUT)
        )
        return Recording(
            opened(outputs),
            Lazy(inputs, lambda name: tuple(kept() for kept in inputs[name])),
            opened({name: gradients[name] for name in reversed(outputs) if name in gradients}),
            opened(unused | found),
            loss,
            unusable,
        )

    def run_submodule(
        self, batch: Batch, name: str, inputs: tuple[np.ndarray, ...], dtype: str, parameters: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray | None:
        """What one submodule alone returns for these inputs."""
        model = self._copy(dtype, parameters)
        path, _, number = name.partition("@")
        calls: list[None] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            calls.append(None)
            if len(calls) - 1 != int(number or 0):
                return None
            given = [*inputs]
            return _mapped(args, functools.partial(_replaced, given)), _mapped(kwargs, functools.partial(_replaced, given))

        def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if len(calls) - 1 == int(number or 0):
                output = _element(name, result, self.take)
                raise _Reached(None if output is None else _numpy(output))

        try:
            module = model.get_submodule(path)
        except AttributeError:
            return None
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)
        with _precision(dtype), torch.no_grad():
            try:
                self._output(model, _on_torch(batch, dtype), batch)
            except _Reached as reached:
                return reached.args[0]
        return None

    def clip(self, gradients: Mapping[str, np.ndarray], settings: AdamW, dtype: str, keep: Keep = in_memory) -> Clipped:
        """The norm that the gradients had, and the gradients, clipped."""
        wide = torch.float64 if dtype == "float64" else torch.float32
        model = _with(self.model, lambda parameter: torch.zeros((), dtype=wide).expand(parameter.shape))  # what they are does not matter
        _set_gradients(model, gradients)
        norm = self.clipping(model) if self.clipping else nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        return np.asarray(norm), opened({name: keep(_shared(p.grad)) for name, p in model.named_parameters()})

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
        model = self._copy(dtype, parameters)
        update = self.optimizer(model) if self.optimizer else _adamw(model, settings)
        losses = []
        for step in range(updates):
            if gradients is None:
                again = _with(model, torch.Tensor.detach)
                loss, found = self._differentiated(again, batch, dtype, cotangent, lambda gradient: _away(gradient, gradient.dtype))
                losses.append(loss)
                for name, parameter in model.named_parameters():
                    parameter.grad = found.get(name)
            else:
                _set_gradients(model, gradients)
            with _StateAway():
                update(step)
        return np.array(losses), opened({name: keep(_shared(p)) for name, p in model.named_parameters()})

    def _differentiated(
        self,
        model: nn.Module,
        batch: Batch,
        dtype: str,
        cotangent: Cotangent | None,
        keep: Callable[[torch.Tensor], T],
        watch: Callable[[torch.Tensor], None] = lambda output: None,
    ) -> tuple[np.ndarray, dict[str, T]]:
        """The loss, and its gradient with respect to each parameter that it depends on. The model is used up."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        places = collections.Counter[str]()
        found: dict[str, T] = {}
        sums: dict[str, torch.Tensor] = {}

        def finished(name: str, parameter: nn.Parameter) -> None:
            """Its gradient is complete, and nothing asks for the parameter any more: neither stays in memory."""
            gradient, parameter.grad, parameter.data = parameter.grad, None, parameter.new_empty(0)
            if places[name] == 1:
                found[name] = keep(gradient)
            elif name in sums:
                sums[name] += gradient
            else:
                sums[name] = _away(gradient, gradient.dtype)

        # Where a parameter is tied, autograd would hold the gradients from all its places until it has added them up: so each place has a
        # parameter of its own, over the same memory.
        for module in model.modules():
            for name, parameter in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                tied = names[parameter]
                places[tied] += 1
                if places[tied] > 1:
                    setattr(module, name, nn.Parameter(parameter.detach()))
                getattr(module, name).register_post_accumulate_grad_hook(functools.partial(finished, tied))
        with _precision(dtype):
            given = _on_torch(batch, dtype)
            output = self._output(model, given, batch)
            watch(output)
            loss = self._loss(output, given, cotangent)
        loss.backward()
        return _numpy(loss), found | {name: keep(gradient) for name, gradient in sums.items()}

    def _copy(self, dtype: str, parameters: Mapping[str, np.ndarray] | None) -> nn.Module:
        """The model in float64, or (also for bfloat16, which is computed under autocast) in float32."""
        wide = torch.float64 if dtype == "float64" else torch.float32
        with torch.random.fork_rng(devices=[]):
            if dtype == "float64" and self.rebuild:
                with _precision(dtype):
                    model = self.rebuild()
                model.load_state_dict(self.model.state_dict())
                for parameter in model.parameters():
                    parameter.data = _away(parameter.data, wide)
            else:
                model = _with(self.model, lambda parameter: _away(parameter.detach(), wide))
        model = model.to("cpu", wide).eval().requires_grad_(True)
        model.zero_grad()
        if parameters is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.tensor(parameters[name]))
        return model

    def _output(self, model: nn.Module, given: Any, batch: Batch) -> torch.Tensor:
        try:
            result = self.how(model, given)
        except (InputError, _Reached):
            raise
        except Exception as error:
            raise refused(self.side, batch, error) from error
        chosen = result if taker(OUTPUT, self.take) is None else _element(OUTPUT, result, self.take)
        tensors = [*_tensors(chosen)]
        check_output(self.side, result, len(tensors), bool(tensors) and (tensors[0].is_floating_point() or tensors[0].is_complex()))
        return tensors[0]

    def _loss(self, output: torch.Tensor, given: Any, cotangent: Cotangent | None) -> torch.Tensor:
        if self.loss is not None:
            loss = loss_of(self.side, self.loss, output, given)
            if not loss.requires_grad:
                raise InputError("the loss given to the torch recorder does not depend on the parameters: there is no gradient")
            return loss
        weights = (cotangent or probe)(tuple(output.shape))
        if output.is_complex():
            output = output.real + output.imag
        return (output * torch.tensor(weights, dtype=output.dtype)).sum() / output.numel() ** 0.5


class _Reached(Exception):  # noqa: N818 (it is no error)
    """The submodule that was to run alone has run."""


class _StateAway(TorchFunctionMode):
    """Within it, what an optimizer makes to hold for a parameter, its moments, lies in a file if it is large."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return _away(result, result.dtype) if func is torch.zeros_like else result


def _away(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in that precision. A large one lies in a file, which goes with it, and only its pages in use are in memory."""
    x = x.to("cpu", dtype, copy=True)
    if x.nbytes < LARGE:
        return x
    with tempfile.NamedTemporaryFile() as file:
        x.numpy().tofile(file)
        file.flush()
        return torch.from_file(file.name, shared=True, size=x.numel(), dtype=dtype).view(x.shape)


def _with(model: nn.Module, make: Callable[[nn.Parameter], torch.Tensor]) -> nn.Module:
    """A copy with other parameters, where there is never a second copy of the model's own."""
    return copy.deepcopy(model, {id(parameter): nn.Parameter(make(parameter)) for parameter in model.parameters()})


@contextlib.contextmanager
def _precision(dtype: str) -> Iterator[None]:
    if dtype == "float64":
        with default_float64(), Wide():
            yield
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            yield


def _adamw(model: nn.Module, settings: AdamW) -> Callable[[int], None]:
    options = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay, **options)

    def update(step: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()

    return update


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _element(name: str, result: Any, take: Take) -> torch.Tensor | None:
    how = taker(name, take)
    if how is None:
        return next(_tensors(result), None)
    element = taken(name, result, how)
    if not isinstance(element, torch.Tensor):
        raise InputError(f"take: element {how!r} of what {name} returns is no tensor but {kind_of(element)}")
    return element


def _tensors(structure: Any) -> Iterator[torch.Tensor]:
    """The tensors in it, in order."""
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        yield from _tensors(tuple(structure.values()))
    elif isinstance(structure, tuple | list):
        for element in structure:
            yield from _tensors(element)


def _mapped(structure: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The structure with the function of each tensor in its place, in that order."""
    if isinstance(structure, torch.Tensor):
        return function(structure)
    if isinstance(structure, dict):
        return {key: _mapped(value, function) for key, value in structure.items()}
    if type(structure) in (tuple, list):
        return type(structure)(_mapped(element, function) for element in structure)
    return structure


def _replaced(given: list[np.ndarray], x: torch.Tensor) -> torch.Tensor:
    match = next((i for i, array in enumerate(given) if array.shape == tuple(x.shape)), None)
    return x if match is None else torch.tensor(given.pop(match), dtype=x.dtype)


def _numbered(path: str, call: int) -> str:
    return f"{path}@{call}" if call else path


def _on_torch(batch: Any, dtype: str) -> Any:
    if isinstance(batch, Mapping):
        return {name: _on_torch(x, dtype) for name, x in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_on_torch(x, dtype) for x in batch)
    x = torch.tensor(np.asarray(batch))
    if x.is_floating_point():
        return x.to(torch.float64 if dtype == "float64" else torch.float32)
    return x if x.dtype == torch.bool else x.long()


def _set_gradients(model: nn.Module, gradients: Mapping[str, np.ndarray]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = _away(torch.tensor(gradients[name]), parameter.dtype)


def _numpy(x: torch.Tensor) -> np.ndarray:
    """A copy: the next module may write to the tensor."""
    return _shared(x).copy()


def _shared(x: torch.Tensor) -> np.ndarray:
    """The tensor's own memory, where NumPy can read it; bfloat16 as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
