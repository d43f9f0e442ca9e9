"""Loading a model, whatever it is; saving and restoring with Orbax, parameters apart from moments, which sampling does not read."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.layout import shape_faults
from flaxgpt.data.tokenizer import Tokenizer
from flaxgpt.errors import InputError
from flaxgpt.hosts import is_first, of_all, of_first
from flaxgpt.model import init_params
from flaxgpt.run.folder import CHECKPOINTS
from flaxgpt.run.saved import MARK, WRITING, best_step, commit, remove, report_choice, saved_steps, seal, unfinished, verify
from flaxgpt.run.source import Source, open_run, open_source
from flaxgpt.state import TrainState
from flaxgpt.types import Params

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports its every step through absl, and what fails it raises as well,
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and a read that fails both raises and logs a traceback here


ASYNC = ocp.AsyncOptions(create_directories_asynchronously=False)
"""Folders are made before the threads that write into them, which wait 5 minutes for one that can't be made, and the process for them."""


class LoadedRun(NamedTuple):
    """A trained run.

    Attributes:
        params: float32, on the default device.
        cfg: what it was made with.
        tokenizer: what its token ids mean.
    """

    params: Params
    cfg: TrainConfig
    tokenizer: Tokenizer


def load_run(folder: Path | str) -> LoadedRun:
    """The newest weights of a run folder, written by either trainer, with its config and tokenizer.

    Raises:
        InputError: it is not a run folder, or has no checkpoint that fits its config.
    """
    source = open_run(Path(folder))
    return LoadedRun(load_params(source), source.run, source.tokenizer)


class LoadedModel(NamedTuple):
    """What generating and comparing need.

    Attributes:
        params: float32, on the default device.
        cfg: the model.
        tokenizer: what its token ids mean, if that is known; its vocabulary may be smaller than the model's, which is then padded.
    """

    params: Params
    cfg: GPTConfig
    tokenizer: Tokenizer | None


def load(path_or_id: Path | str, *, n_heads: int | None = None, meta: Path | None = None) -> LoadedModel:
    """A model, whatever it is; one tensor is read at a time, so that no second copy of it is ever in memory.

    Args:
        path_or_id: a run folder (of either trainer); a Hugging Face folder; a file: nanoGPT's checkpoint, or a state_dict of the
            reference (of `torch.save`, or safetensors; pickles need torch, and are read with `weights_only`); or an id on the Hugging
            Face hub such as "openai-community/gpt2", or its short name: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2. Ids need
            the extra `hf`; what was downloaded once is in the hub's cache, and HF_HUB_OFFLINE=1 is obeyed.
        n_heads: attention heads of a state_dict without a config, whose shapes don't imply them.
        meta: nanoGPT's vocabulary of characters; None: the meta.pkl beside its checkpoint, if there is one.

    Raises:
        InputError: there is no such model, it is of another kind than flaxgpt computes (all that differs is named), or its files
            are damaged, or pickles of anything but tensors and plain values.
    """
    source = open_source(path_or_id, n_heads=n_heads, meta=meta)
    return LoadedModel(load_params(source), source.cfg, source.tokenizer)


def load_with_tokenizer(path_or_id: Path | str) -> LoadedModel:
    """A model, as `load` reads it, whose token ids have a known meaning.

    Raises:
        InputError: as `load`, or it is not known what they mean.
    """
    loaded = load(path_or_id)
    if loaded.tokenizer is None:
        remedy = "convert_checkpoint.py --to run --meta meta.pkl makes a run folder that says so"
        raise InputError(f"it is not known what the tokens of {path_or_id} mean: {remedy}")
    return loaded


def load_params(source: Source) -> Params:
    """The parameters of a source that was opened, float32, on the default device.

    Raises:
        InputError: it is a run folder without a checkpoint that fits its config.
    """
    if source.params is not None:
        return jax.tree.map(lambda parameter: jax.device_put(parameter[()]), source.params)
    with Checkpoints(source.path / CHECKPOINTS) as checkpoints:
        return checkpoints.restore_params(source.cfg)


class Checkpoints:
    """The `checkpoints` folder of a run: a numbered folder for each saved count of updates. A context manager.

    A checkpoint is written under another name, given its checksums, and renamed, and only then are older ones deleted. So
    whatever has a number and fits its checksums is whole, and what a kill leaves behind is not taken for a checkpoint.

    Of several processes, each writes and reads its shards; the first does all the rest. They meet in Orbax: before a save
    begins, by which time the first is done with the one before, and when all of it is written.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        """Keep the newest `keep` checkpoints, and that of the lowest validation loss; None: all."""
        self._folder, self._keep, self._at = folder.absolute(), keep, 0
        self._saving: Future[None] | None = None

    @property
    def newest(self) -> int | None:
        """The updates that the newest checkpoint has behind it; None: there is no checkpoint."""
        return max(saved_steps(self._folder), default=None)

    def save(self, state: TrainState) -> None:
        """Save in the background, once the save before is done. The state may be donated right after: Orbax has taken hold of its contents.

        Raises:
            OSError: what was saved before could not be written.
        """
        self.wait()
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in unfinished(self._folder):
                remove(leftover)
        step = int(state.step)
        scratch = self._folder / f"{step}{WRITING}"
        rest = (state.step, state.opt_state, state.key)
        items = {"params": ocp.args.StandardSave(state.params), "rest": ocp.args.StandardSave(rest)}
        with _raised_and_no_more():
            self._orbax.save(scratch, args=ocp.args.Composite(**items), custom_metadata=MARK)
        self._saving = self._thread.submit(self._finish, scratch, step)

    def wait(self) -> None:
        """Wait until what was saved is on disk, with its number.

        Raises:
            OSError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving:
            saving.result()

    def restore(self, template: TrainState, shardings: TrainState) -> TrainState:
        """The newest whole checkpoint, with the shapes of `template`, each leaf placed as `shardings` says. Newer ones, damaged, are named.

        Raises:
            InputError: there is none, or it is of another model.
        """
        wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, shardings)
        items = self._restore(params=wanted.params, rest=(wanted.step, wanted.opt_state, wanted.key))
        step, opt_state, key = items["rest"]
        return TrainState(step, items["params"], opt_state, key)

    def restore_params(self, cfg: GPTConfig) -> Params:
        """Only the parameters of the checkpoint that `restore` takes, on the default device.

        Raises:
            InputError: as `restore`.
        """
        shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return self._restore(params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes))["params"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until what was saved is on disk, whatever ended the run."""
        if "_orbax" not in self.__dict__:  # nothing was saved
            return
        with contextlib.closing(self._orbax), self._thread:
            self.wait()
            if is_first():
                self._prune()  # again, since the last evaluation came after the last save

    @functools.cached_property
    def _orbax(self) -> ocp.AsyncCheckpointer:
        """Made at its first use, as is the thread: a folder that is only read needs neither."""
        return ocp.AsyncCheckpointer(_handler(), async_options=ASYNC)

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "checkpoint")

    def _finish(self, scratch: Path, step: int) -> None:
        """In the background: give what Orbax writes its checksums and its number, then delete what it replaces."""
        with _raised_and_no_more():
            self._orbax.wait_until_finished()
        if not is_first():
            return
        seal(scratch)
        commit(scratch, self._folder / str(step))
        for damaged in saved_steps(self._folder):
            if self._at < damaged != step:  # or the run would have gone on from it
                remove(self._folder / str(damaged))
        self._at = step
        self._prune()

    def _prune(self) -> None:
        steps = [step for step in saved_steps(self._folder) if step <= self._at]  # newer ones are damaged: not to be kept in their place
        kept = {*steps[-self._keep :], best_step(self._folder.parent, steps)} if self._keep else {*steps}
        for step in steps:
            if step not in kept:
                remove(self._folder / str(step))

    def _restore(self, **wanted: Any) -> Any:
        faults: list[str] = []
        for step in of_first(lambda: saved_steps(self._folder)[::-1]):
            path = self._folder / str(step)
            verified, fault = of_first(lambda path=path: _verified(path))
            items = None
            if not fault:
                try:
                    items = self._restore_from(path, wanted)
                except InputError:
                    raise
                except Exception as error:  # Orbax wraps some in a bare Exception
                    cause = error.__cause__ or error
                    fault = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
                fault = next(filter(None, of_all(fault)), None)
            if not fault:
                self._at = step
                if is_first():
                    report_choice(path, faults, verified=verified)
                return items
            if not of_first(path.exists):  # deleted by the run meanwhile, so there is a newer one
                return self._restore(**wanted)
            faults.append(f"the checkpoint {path} is damaged ({fault})")
        raise InputError(f"no whole checkpoint: {'; '.join(faults)}" if faults else f"no checkpoint in {self._folder}")

    def _restore_from(self, path: Path, wanted: dict[str, Any]) -> Any:
        handler = _handler()  # not a Checkpointer of Orbax's, in which processes that have read theirs wait for one that can't
        # Compared before anything is read: the moments have the shapes of the parameters, so these decide.
        saved = handler.metadata(path).item_metadata["params"]
        if saved is None:
            raise InputError(f"{path} is not a checkpoint of this program: it has no parameters")
        if faults := shape_faults(_shapes(saved.tree), _shapes(wanted["params"])):
            raise InputError(f"the checkpoint {path} does not fit this run's config.json: {'; '.join(faults)}")
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        return handler.restore(path, args=ocp.args.Composite(**args))


@contextlib.contextmanager
def _raised_and_no_more() -> Iterator[None]:
    """What Orbax raises within is raised, and no warning comes after it at the end of Python: of each coroutine that was not come to."""
    try:
        yield
    except Exception:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning, module="sys$")  # where there is no module left
        raise


def _report_unless_late(report: Callable[[Any], object], unraisable: Any) -> None:
    """Python's `sys.unraisablehook`, `report`, but for what comes late of a save or restore that has failed.

    Orbax raises what the first of its reads or writes fails with, and closes the event loop under the others. A write then calls that loop
    from a thread of C++, which has nobody else to tell that it is closed; a read that is thrown away makes an error even of that.
    """
    error = unraisable.exc_value
    write = unraisable.object is None and str(error) == "Event loop is closed"
    read = isinstance(error, Exception) and isinstance(error.__cause__, GeneratorExit)
    if not (write or read):
        report(unraisable)


def _verified(path: Path) -> tuple[bool, str | None]:
    """Whether a checkpoint could be verified, and what is wrong with it."""
    try:
        return verify(path), None
    except (ValueError, OSError) as error:
        return False, str(error)


def _handler() -> ocp.CompositeCheckpointHandler:
    standard, options = ocp.StandardCheckpointHandler, ocp.CompositeOptions(async_options=ASYNC)
    return ocp.CompositeCheckpointHandler(composite_options=options, params=standard(), rest=standard())


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}


sys.unraisablehook = functools.partial(_report_unless_late, sys.unraisablehook)
