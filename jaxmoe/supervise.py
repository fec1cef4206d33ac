"""A parent for one of several processes, that keeps its native output apart and explains its death.

JAX's runtime aborts a process that has lost its coordinator, with a C++ trace that no Python code can prevent, and
the CPU collectives greet on stdout. The child's Python keeps the streams it had; what native code writes goes to
the parent, which drops it, or shows it where asked.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

# Given the reason that stands for an abort from now on; "" where nothing is left to say.
ExplainAbort = Callable[[str], None]

_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def supervise(name: str, *, show_native: bool = False) -> ExplainAbort:
    """Fork: the child returns from here and does the work, the parent waits and exits as the child does.

    Call it before any thread is started. A child that dies of a signal is told in one line on stderr; the parent exits
    with 1 then. SIGTERM, SIGHUP and SIGINT are passed on, and the child ends with its parent.

    Args:
        name: name of the process, for that line.
        show_native: whether to show on stderr what native code writes, instead of dropping it.

    Returns:
        A function for the child to say beforehand what an abort by JAX's runtime will mean. The last reason it was
        given counts, and "" keeps the parent silent: the child has told by itself why it ends.
    """
    native_read, native_write = os.pipe()
    reason_read, reason_write = os.pipe()
    life_read, life_write = os.pipe()  # closed by the system when the parent ends, however it ends
    sys.stdout.flush()
    sys.stderr.flush()
    # Held back for the parent to wait for; the child takes them again.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if child:
        os.close(native_write)
        os.close(reason_write)
        os.close(life_read)
        _parent(child, native_read, reason_read, name, show_native)
    os.close(native_read)
    os.close(reason_read)
    os.close(life_write)
    # A terminal sends an interrupt to its whole process group: here it arrives once, by way of the parent.
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stderr = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)
    os.dup2(native_write, 1)
    os.dup2(native_write, 2)
    os.close(native_write)
    threading.Thread(target=_end_with_parent, args=(life_read,), daemon=True).start()
    return lambda reason: _tell(reason_write, reason)


def _end_with_parent(life: int) -> None:
    os.read(life, 1)
    os._exit(1)


def _tell(pipe: int, reason: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and this process is about to be
        os.write(pipe, (" ".join(reason.split()) + "\n").encode())


def _pass_on(child: int) -> None:
    """Wait for the blocked signals: a handler would leave one until the next byte that comes before a read begins."""
    while True:
        signum = signal.sigwait(_PASSED_ON)
        with contextlib.suppress(ProcessLookupError):  # the child has ended, and the parent is about to
            os.kill(child, signum)


def _parent(child: int, native: int, reasons: int, name: str, show_native: bool) -> NoReturn:
    for signum in _PASSED_ON:
        signal.signal(signum, signal.SIG_DFL)  # one that is ignored would not be waited for
    threading.Thread(target=_pass_on, args=(child,), daemon=True).start()
    while piece := os.read(native, 65536):
        if show_native:
            os.write(2, piece)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status >= 0:
        os._exit(status)
    reason = f"ended by signal {-status} ({signal.strsignal(-status)})"
    # The child is gone, and its end of the pipe with it.
    told = os.read(reasons, 65536).decode().splitlines()
    if status == -signal.SIGABRT and told:
        reason = told[-1] and f"{told[-1]} (JAX's runtime ended this process, see --debug)"
    if reason:
        os.write(2, f"jaxmoe: {name}: error: {reason}\n".encode())
    os._exit(1)
