"""Running one function over many items in a few threads."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def run_in_threads(work: Callable[[Item], None], items: Iterable[Item], threads: int) -> None:
    """Call ``work(item)`` for every item, from `threads` threads, taking the items in order.

    After the first exception, of a thread or of the caller (Ctrl-C), no further item is begun; it is raised once all
    threads have stopped.
    """
    source, lock, stop = iter(items), threading.Lock(), threading.Event()

    def loop() -> None:
        while not stop.is_set():
            with lock:
                item = next(source, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="jaxmoe-load") as pool:
        try:
            for done in [pool.submit(loop) for _ in range(threads)]:
                done.result()
        finally:
            stop.set()
