"""Several processes that train one model, one or more on each host: how they meet, what they agree on, and how they end together."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from flaxgpt.errors import InputError
from flaxgpt.run.cli import Processes
from flaxgpt.run.folder import LOCK, read_text
from flaxgpt.types import Params

Value = TypeVar("Value")

_FAILED, _PATIENCE_MS = "flaxgpt/failed", 24 * 3600 * 1000
_PEER_LOST = re.compile("[A-Z_]+: .*(?i:gloo|nccl|connection|socket)")  # as UNKNOWN: Gloo AllReduce failed: ...
_numbers = itertools.count()  # of what is shared and of barriers, which every process comes to in the same order
_speaks = threading.Lock()  # taken by whatever ends this process, so that one line says why


@contextlib.contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Meet the other processes of this run, if there are any, before anything is computed; within this context, all end if one does.

    A process that fails tells the others, which repeat its line and exit as well; its own exit skips JAX's, which would wait for them.
    One that is killed tells nobody. Then a computation with it fails at once (CPU), or JAX's coordination service misses its
    heartbeats and aborts the others, with what it knows.

    Raises:
        InputError: the flags do not fit each other.
        SystemExit: with 2, not all processes came within `join_timeout`.
    """
    if not _several(processes):
        yield
        return
    with _deadline(processes):
        _initialize(processes)
    finished = threading.Event()
    watch = threading.Thread(target=_watch, args=(finished,), daemon=True)
    watch.start()
    try:
        yield
        barrier()  # JAX's own, when a process exits, waits for no longer than `heartbeat_timeout`
    except InputError as error:
        _fail(2, f"error: process {jax.process_index()}: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _fail(130, f"process {jax.process_index()} was stopped")
    except Exception as error:
        first, *_ = [*str(error).splitlines(), type(error).__name__]
        lost = _PEER_LOST.match(first)
        if not lost:
            traceback.print_exc()
        said = f"lost another process ({first}): if it died, --resume goes on from the last checkpoint" if lost else f"failed: {first}"
        _fail(1, f"error: process {jax.process_index()} {said}")
    finally:
        finished.set()
        watch.join()  # before the interpreter ends, under a thread that waits in JAX


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def of_first(function: Callable[[], Value]) -> Value:
    """What a function returns in the first process, in all of them; the others do not call it. It goes through JSON."""
    if jax.process_count() == 1:
        return function()
    client, name = _client(), f"flaxgpt/{next(_numbers)}"
    if is_first():
        client.key_value_set(name, json.dumps(function()))
    return json.loads(client.blocking_key_value_get(name, _PATIENCE_MS))


def of_all(value: Value) -> list[Value]:
    """What every process has, by process, in all of them. It goes through JSON."""
    if jax.process_count() == 1:
        return [value]
    client, name = _client(), f"flaxgpt/{next(_numbers)}"
    client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{name}/{i}", _PATIENCE_MS)) for i in range(jax.process_count())]


def barrier() -> None:
    """Wait for all processes. No device takes part, so it does not matter what these are computing."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"flaxgpt/{next(_numbers)}", _PATIENCE_MS)


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through this context before the others, who find in the cache what it has put there; then all go on."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()
    barrier()


def check_same(**values: object) -> None:
    """InputError if a process was started otherwise than the first: values by name, which go through JSON."""
    mine = json.loads(json.dumps(values))
    theirs = of_first(lambda: mine)
    if other := [name for name in mine if mine[name] != theirs[name]]:
        raise InputError(f"{', '.join(other)} differ from those of process 0: start the same command in every process, with the same data")


def first_numbers(params: Params) -> list[float]:
    """A sum over the first row of each parameter, which for the blocks is the first block: it tells two models apart, and reads little."""
    return [float(np.asarray(parameter[:1], np.float64).sum()) for parameter in jax.tree.leaves(params)]


def check_shared(folder: Path) -> None:
    """InputError in a process that does not see the run folder that the first has locked."""
    lock = of_first(lambda: read_text(folder / LOCK))
    late = time.monotonic() + 60  # NFS may remember for so long that a folder was not there
    while read_text(folder / LOCK) != lock:
        if time.monotonic() > late:
            raise InputError(f"{folder} is not the folder that process 0 writes: it has to be on a file system that all hosts share")
        time.sleep(0.2)


class Agreement:
    """For what one process knows and all must act on at the same update, as signals and time.

    Called by all at every update, it gives all the largest of each value. It is a computation of all devices, a few bytes, which is
    dispatched like an update and read one call later, when it has long been done: nothing waits for it, but what is known is
    that of the update before. A single process gets its own values, at once.
    """

    def __init__(self, mesh: Mesh, values: int) -> None:
        """So many values, none of them negative."""
        self._rows, everywhere = (NamedSharding(mesh, spec) for spec in (P(mesh.axis_names), P()))
        if jax.process_count() > 1:
            zeros = self._everybody(np.zeros(values))
            self._largest = jax.jit(lambda rows: rows.max(0), out_shardings=everywhere).lower(zeros).compile()
            barrier()  # CPUs (Gloo) give a first exchange 30 s, and another process may have been busy for longer
            self._known = jax.block_until_ready(self._largest(zeros))

    def __call__(self, *values: float) -> tuple[float, ...]:
        """The largest of each. Several processes get zeros at the first call, and everything as float32."""
        if jax.process_count() == 1:
            return values
        known, self._known = np.asarray(self._known), self._largest(self._everybody(values))
        return tuple(known.tolist())

    def _everybody(self, values: ArrayLike) -> jax.Array:
        mine = np.tile(np.float32(values), (jax.local_device_count(), 1))
        return jax.make_array_from_process_local_data(self._rows, mine)


def _several(processes: Processes) -> bool:
    """Whether flags say, or a launcher says, that there are several processes.

    `jax.distributed.initialize()` finds the same launchers, but it can't be asked before it acts: where there is none it raises, and in a
    job of one process it takes all GPUs but one away.
    """
    given = {f"--{name.replace('_', '-')}": getattr(processes, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return _launched() > 1
    if missing:
        raise InputError(f"{', '.join(given)} go together: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if not re.fullmatch(r".+:\d+", processes.coordinator):
        raise InputError(f"--coordinator {processes.coordinator}: expected host:port, where process 0 can be reached")
    if not 0 <= processes.process_id < processes.num_processes:
        raise InputError(f"--process-id {processes.process_id}: expected 0 to {processes.num_processes - 1}, as --num-processes has it")
    return processes.num_processes > 1


def _launched() -> int:
    """How many processes SLURM, Open MPI, Kubernetes or Cloud TPU has started."""
    from jax._src.clusters import ClusterEnv  # JAX offers no other way to ask

    for cluster in ClusterEnv._cluster_types:
        if cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # a pod of its own, which need not be allowed to ask what it belongs to
        if not cluster.opt_in_only_method and cluster.is_env_present():
            try:
                return cluster.get_process_count()
            except Exception as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise InputError(f"{cluster.__name__} does not say how many processes there are ({reason}): pass --coordinator") from None
    return 1


def _client() -> Any:
    """The client of the coordination service, which has keys with values and barriers. JAX itself has no public name for it."""
    return ocp.multihost.get_jax_distributed_client()


def _initialize(processes: Processes) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from run/signals.py
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            initialization_timeout=2 * processes.join_timeout,  # then JAX aborts; `_deadline` comes first
            heartbeat_timeout_seconds=processes.heartbeat_timeout,
            shutdown_timeout_seconds=processes.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"the processes can't meet at {processes.coordinator or 'the coordinator'} ({reason})") from None


@contextlib.contextmanager
def _deadline(processes: Processes) -> Iterator[None]:
    """Exit with 2 if this is not left in time. JAX's own timeout aborts the process from C++, where nothing can be caught."""
    who = f"process {processes.process_id}" if processes.process_id is not None else "this process"
    which = f"the {processes.num_processes} processes" if processes.num_processes else "the processes"
    where = processes.coordinator or "the coordinator"
    line = f"error: {who} has waited {processes.join_timeout} s, and not all of {which} have come to {where}"
    timer = threading.Timer(processes.join_timeout, lambda: _exit(2, line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _watch(finished: threading.Event) -> None:
    """In the background: end this process when another says that it has failed."""
    client = _client()
    while not finished.wait(0.5):
        with contextlib.suppress(Exception):  # there is no such key; or no service any more, and then JAX ends this process
            code, line = json.loads(client.key_value_try_get(_FAILED))
            _leave(code, line)


def _fail(code: int, line: str) -> None:
    """End this process, and with it the others."""
    with contextlib.suppress(Exception):  # another was faster, or the service is gone
        _client().key_value_set(_FAILED, json.dumps([code, line]))
    _leave(code, line)


def _leave(code: int, line: str) -> None:
    """Say why, and exit when all do: the first process holds what the others hear it by."""
    if not _speaks.acquire(blocking=False):
        time.sleep(60)  # another thread is at it, and ends this one
    with contextlib.suppress(Exception):
        print(line, file=sys.stderr, flush=True)
        _client().wait_at_barrier("flaxgpt/end", 5000)
    _exit(code)


def _exit(code: int, line: str = "") -> None:
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
