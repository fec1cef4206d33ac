"""A parent for one of several processes, that keeps its native output apart and explains its death.

JAX's runtime aborts a process that has lost its coordinator, with a C++ trace that no Python code can prevent, and
the CPU collectives greet on stdout. The child's Python keeps the streams it had; what native code writes goes to
the parent, which drops it, or shows it where asked.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn


def supervise(name: str, *, show_native: bool = False) -> None:
    """Fork: the child returns from here and does the work, the parent waits and exits as the child does.

    Call it before any thread is started. A child that dies of a signal is told in one line on stderr; the parent exits
    with 1 then. SIGTERM, SIGHUP and SIGINT are passed on, and the child ends with its parent.

    Args:
        name: of the process, for that line.
        show_native: show on stderr what native code writes, instead of dropping it.
    """
    native_read, native_write = os.pipe()
    life_read, life_write = os.pipe()  # closed by the system when the parent ends, however it ends
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(native_write)
        os.close(life_read)
        _parent(child, native_read, name, show_native)
    os.close(native_read)
    os.close(life_write)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stderr = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)
    os.dup2(native_write, 1)
    os.dup2(native_write, 2)
    os.close(native_write)
    threading.Thread(target=_end_with_parent, args=(life_read,), daemon=True).start()


def _end_with_parent(life: int) -> None:
    os.read(life, 1)
    os._exit(1)


def _parent(child: int, native: int, name: str, show_native: bool) -> NoReturn:
    def pass_on(signum: int, frame: FrameType | None) -> None:
        del frame
        os.kill(child, signum)

    # An interrupt at the terminal reaches the child by itself, one sent to this process alone does not.
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, pass_on)
    while piece := os.read(native, 65536):
        if show_native:
            os.write(2, piece)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGABRT:
        reason = "JAX's runtime ended it: process 0, which coordinates all, is gone or out of reach (see --debug)"
    elif status < 0:
        reason = f"ended by signal {-status} ({signal.strsignal(-status)})"
    else:
        os._exit(status)
    os.write(2, f"jaxmoe: {name}: error: {reason}\n".encode())
    os._exit(1)
