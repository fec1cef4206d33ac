"""Several processes, each with its own devices, that work as one.

`initialize` is `jax.distributed.initialize` with a watchdog. Every process runs the same program on the same
input; decisions are made from values that all of them hold. The watchdog makes a failure common property: a process
that fails says why, one that dies stops giving signs of life, and either makes the others exit with status 1
and one line on stderr, where a collective would wait forever.
"""

import atexit
import contextlib
import hashlib
import itertools
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn, TextIO

import jax
import numpy as np

# Keys of the coordination service, each followed by a process id.
_ALIVE, _FAILED, _STOPPED, _FINISHED = "jaxmoe/alive/", "jaxmoe/failed/", "jaxmoe/stopped/", "jaxmoe/finished/"
# Apart from those, which the watchdog reads all together; followed by the number of the barrier and a process id.
_AT_BARRIER = "jaxmoe-barrier/"

# As long as the coordination service can wait. Whoever waits is ended by the watchdog where that is in vain.
_FOREVER_MS = 2**31 - 1

_FIRST_IS_GONE = "process 0, which coordinates the others, is gone or out of reach"

# This process's membership, as `jax.distributed` holds its own: a process joins once.
_watchdog: "Watchdog | None" = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    failure_timeout: float = 60.0,
    explain_abort: Callable[[str], None] = lambda reason: None,
) -> None:
    """Join this process to the others; call it before anything uses a device, and before `jaxmoe.simulate_devices`.

    Afterwards ``jax.devices()`` are those of all processes, and `simulate_devices` counts the devices of each.

    Args:
        coordinator: address ``host:port`` at which process 0 listens; None, with the next two, takes all three from the
            cluster (SLURM, Open MPI, Kubernetes and whatever else ``jax.distributed`` knows).
        num_processes: number of processes.
        process_id: number of this one, from 0.
        failure_timeout: seconds without a sign of life after which a process counts as dead.
        explain_abort: function from `jaxmoe.supervise.supervise` that is told what it means if JAX's runtime aborts this
            process.

    Raises:
        ValueError: some of the three are given and others not, or they do not fit together.
        RuntimeError: the others cannot be reached, devices are already running (`jaxmoe.simulate_devices` starts them), or
            this process has joined before.

    Example:
        >>> jaxmoe.distributed.initialize("10.0.0.1:29500", num_processes=2, process_id=0)
        >>> mesh = jaxmoe.make_mesh(ep=jax.device_count())
    """
    global _watchdog
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(
            "several processes need coordinator, num_processes and process_id, or none of them on a cluster that JAX "
            f"knows; got coordinator={coordinator!r}, num_processes={num_processes!r}, process_id={process_id!r}"
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"a coordinator is written host:port; got {coordinator!r}")
    if failure_timeout <= 0:
        raise ValueError(f"failure_timeout is a number of seconds above 0; got {failure_timeout}")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process ids run from 0 to num_processes - 1; got {process_id} of {num_processes}")
    _check_first()
    # XLA's CPU devices have no collectives between processes of themselves; no other platform reads this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = math.ceil(failure_timeout)
    join_seconds = max(seconds, 60)
    explain_abort(
        f"the processes did not find together within {join_seconds} s; start all of them, where each reaches process 0"
        + (f" at {coordinator}" if coordinator else "")
    )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=join_seconds,
            # JAX's own answer to a lost process is to abort with a C++ trace. The watchdog comes before it.
            heartbeat_timeout_seconds=max(10, 3 * seconds),
            shutdown_timeout_seconds=seconds,
            coordinator_bind_address=_bind_address(coordinator),
        )
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"the processes did not find together: {error}") from error
    # The coordination service has no public name; Orbax reaches for it in the same way. jax.process_index() would start
    # the backend, and devices can still be simulated after this.
    from jax._src.distributed import global_state as state

    _watchdog = Watchdog(state.client, state.process_id, state.num_processes, failure_timeout, explain_abort)
    # Registered after JAX's own, so run before it.
    atexit.register(finish)
    sys.excepthook = _fail_on_exception


def _check_first() -> None:
    """Refuse to join where it is too late, before anything is changed; JAX says it without naming what came first."""
    # It has no public name, and jax.devices() would start what is asked about.
    from jax._src import xla_bridge

    if jax.distributed.is_initialized():
        raise RuntimeError(
            "a process joins the others once, and this one has; leave the second jaxmoe.distributed.initialize out"
        )
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            f"processes join before their devices start: {jax.local_device_count()} {jax.default_backend()} devices are "
            "already running in this one, from jaxmoe.simulate_devices, jax.devices() or an array; call "
            "jaxmoe.distributed.initialize first thing in the program, and jaxmoe.simulate_devices after it"
        )


def finish() -> None:
    """Leave in step with the others; a process that ends does it by itself."""
    global _watchdog
    watchdog, _watchdog = _watchdog, None
    if watchdog is None:
        return
    try:
        watchdog.client.key_value_set(f"{_FINISHED}{watchdog.process_id}", "")
        # However long one still has to do: the watchdog goes on until all have arrived, for until then one may die.
        watchdog.client.wait_at_barrier("jaxmoe/finish", _FOREVER_MS)
    except RuntimeError as error:
        watchdog.fail(error)
    watchdog.stop()
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is process 0, the one that talks to the user; so is a process alone."""
    return _watchdog is None or _watchdog.process_id == 0


def fail(error: BaseException, *, show_traceback: bool = False) -> NoReturn:
    """Tell the others of an error, print it in one line, and end this process with status 1."""
    assert _watchdog is not None, "fail() is for processes that called initialize()"
    if show_traceback:
        traceback.print_exception(error, file=_watchdog.stderr)
    _watchdog.fail(error)


def broadcast(values: np.ndarray) -> np.ndarray:
    """Give every process the `values` of process 0; all pass the same shape and dtype.

    Raises:
        RuntimeError: a process has come to its end, and will pass none.
    """
    from jax.experimental import multihost_utils

    barrier()
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def barrier() -> None:
    """Wait until every process is here, however long it still has to do.

    The first collective of CPU devices gives up on a partner that is 30 seconds late.

    Raises:
        RuntimeError: a process has come to its end, and will never be here.
    """
    if _watchdog is None:
        return
    client, number = _watchdog.client, next(_watchdog.barriers)
    client.key_value_set(f"{_AT_BARRIER}{number}/{_watchdog.process_id}", "")
    for process in range(_watchdog.num_processes):
        finished = False
        while True:
            try:
                client.blocking_key_value_get(f"{_AT_BARRIER}{number}/{process}", 1000)
                break
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if finished:
                raise RuntimeError(
                    f"process {process} has come to its end, and process {_watchdog.process_id} waits for it to do the "
                    "same next; every process runs the same program"
                )
            # It may have been here just before: that is looked for once more.
            finished = f"{_FINISHED}{process}" in dict(client.key_value_dir_get(_FINISHED))


def check_same(parts: Mapping[str, Any]) -> None:
    """Refuse to go on where a process was given something else than process 0.

    Args:
        parts: values by their name for the message; the ``repr`` of a value tells all of it.

    Raises:
        ValueError: in the process that differs.
    """
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint32) for value in parts.values()]
    )
    same = np.all(broadcast(digests) == digests, axis=1)
    if not same.all():
        different = " and ".join(name for name, is_same in zip(parts, same, strict=True) if not is_same)
        raise ValueError(
            f"every process is given the same input, but {different} differ between process 0 and process "
            f"{jax.process_index()}; start all of them with the same arguments and files"
        )


class Watchdog:
    """A thread that gives signs of life, looks for those of the others, and ends the process where one is missing.

    Args:
        client: client of the coordination service that process 0 runs.
        process_id: number of this process.
        num_processes: number of processes.
        timeout: seconds without a sign of life after which a process counts as dead.
        explain_abort: function that explains the end of the process, given to `initialize`.
    """

    def __init__(
        self, client: Any, process_id: int, num_processes: int, timeout: float, explain_abort: Callable[[str], None]
    ) -> None:
        self.client = client
        self.timeout = timeout
        self.barriers = itertools.count()  # numbered alike in every process, for all run the same program
        self.stderr: TextIO = sys.stderr
        self.process_id, self.num_processes = process_id, num_processes
        self._interval = min(1.0, timeout / 5)
        self._end = threading.Event()
        self._ending = threading.Lock()
        self._explain_abort = explain_abort
        explain_abort("another process is gone or out of reach" if process_id == 0 else _FIRST_IS_GONE)
        client.key_value_set(f"{_ALIVE}{process_id}", "", allow_overwrite=True)
        self._thread = threading.Thread(target=self._watch, name="jaxmoe-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, leaving the process as it is."""
        self._end.set()
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others of an error and end this process, see `fail`."""
        if threading.current_thread() is threading.main_thread():
            # Asked to end more than once: it is on the way.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a collective whose partner has died. The watchdog is about to find out which, and ends us.
            time.sleep(self.timeout + 3 * self._interval)
        reason = " ".join(str(error).split()) or type(error).__name__
        with self._ending:
            self._set(_FAILED, reason)
            self._exit(reason)

    def _watch(self) -> None:
        beats = 0
        heard = {process: ("", time.monotonic()) for process in range(self.num_processes) if process != self.process_id}
        while not self._end.wait(self._interval):
            beats += 1
            try:
                # Alone among these, this call gives up where process 0 is there and does not answer.
                self.client.blocking_key_value_get(f"{_ALIVE}{self.process_id}", math.ceil(1000 * self.timeout))
                self.client.key_value_set(f"{_ALIVE}{self.process_id}", str(beats), allow_overwrite=True)
                told = dict(self.client.key_value_dir_get("jaxmoe/"))
            except RuntimeError:
                self._stop_for(_FIRST_IS_GONE, tell=False)
            now = time.monotonic()
            for process, (last, since) in heard.items():
                if (reason := told.get(f"{_FAILED}{process}")) is not None:
                    self._stop_for(f"stopped because process {process} failed: {reason}")
                beat = told.get(f"{_ALIVE}{process}", "")
                if beat != last:
                    heard[process] = (beat, now)
                elif now - since > self.timeout:
                    self._stop_for(f"stopped because process {process} gave no sign of life for {self.timeout:g} s")

    def _stop_for(self, reason: str, *, tell: bool = True) -> NoReturn:
        with self._ending:
            self._exit(reason, tell=tell)

    def _exit(self, reason: str, *, tell: bool = True) -> NoReturn:
        # JAX may abort this process before it has ended, and that is no news any more.
        self._explain_abort("")
        line = f"jaxmoe: process {self.process_id} of {self.num_processes}: error: {reason}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr, or it is closed
            print(line, file=self.stderr, flush=True)
        if tell:
            self._set(_STOPPED, "")
        if self.process_id == 0:
            self._wait_for_others()
        # Not sys.exit: the main thread may be inside a collective that never ends, and JAX's own exit waits for all.
        os._exit(1)

    def _wait_for_others(self) -> None:
        """The service dies with process 0: let the others read why first. A dead one does not answer."""
        deadline = time.monotonic() + 3 * self._interval
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline and len(self.client.key_value_dir_get(_STOPPED)) < self.num_processes:
                time.sleep(self._interval / 5)

    def _set(self, key: str, value: str) -> None:
        # Where process 0 is gone there is nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self.client.key_value_set(f"{key}{self.process_id}", value, allow_overwrite=True)


def _bind_address(coordinator: str | None) -> str | None:
    """On loopback listen there alone, and not on every address of the machine as JAX does by default."""
    if coordinator is None:
        return None
    host = coordinator.rpartition(":")[0]
    return coordinator if host == "localhost" or host.startswith("127.") else None


def _fail_on_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    if _watchdog is not None:
        _watchdog.fail(error)
