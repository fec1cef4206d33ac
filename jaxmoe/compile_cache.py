"""JAX's cache of compiled programs, in the user's cache folder: `enable_compile_cache`.

JAX's key of a program covers its code, the compiler's version and flags, and the kind of device. The folder's name adds
what it may leave out: the processor that host code was compiled for, since a home may be shared by machines that differ.

An entry is a program that will be run, so a folder that others may write to is not used. JAX evicts what was used least
recently, and writes an entry before its time of use: one without a time is the half of a write that was cut off.
`read_entry` and `write_entry` keep entries of jaxmoe's own there, in the same form, so that one limit holds for all.
"""

import hashlib
import os
import platform
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import filelock
import jax

from jaxmoe.checks import integer
from jaxmoe.user_files import cache_folder

MOST_BYTES = 4 * 2**30
_LEAST_FREE_BYTES = 256 * 2**20
_LOCK_SECONDS = 10
_DIGEST_BYTES = hashlib.sha256().digest_size


class CompileCacheError(OSError):
    """The folder cannot hold compiled programs; the message says why. Nothing has been changed."""


def enable_compile_cache(
    directory: str | os.PathLike[str] | None = None, *, max_bytes: int = MOST_BYTES
) -> Path | None:
    """Keep compiled programs on disk, so that the next process loads them where this one compiled.

    It sets JAX's own options (``jax_compilation_cache_dir`` and its limits) for this process, and is called before anything
    is compiled. Where a cache was chosen already, as by ``JAX_COMPILATION_CACHE_DIR``, it stays as it is.
    The ``jaxmoe`` command calls this; the library by itself does not. Programs of `jaxmoe.generate` and
    `jaxmoe.ContinuousEngine` are kept whole there too, and found without a trace; as those are pickles, the folder must be
    the user's own.

    Args:
        directory: folder of the programs; None for one in the user's cache folder.
        max_bytes: size from which on those used least recently are removed, in bytes.

    Returns:
        The folder that JAX uses; None where its cache is turned off, as by ``JAX_ENABLE_COMPILATION_CACHE=false``.

    Raises:
        CompileCacheError: the folder cannot be made or written, others may write to it, or its disk is full.
        ValueError: `max_bytes` is no integer of at least 1.

    Example:
        >>> folder = jaxmoe.enable_compile_cache("build/programs")
    """
    max_bytes = integer("max_bytes", max_bytes, least=1)
    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir:
        return Path(config.jax_compilation_cache_dir)
    folder = (cache_folder() / "compiled" if directory is None else Path(directory)) / _host()
    _prepare(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", max_bytes)
    # The programs of a small model take less than JAX's second each, and more than a second together.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def own_folder() -> Path | None:
    """The folder that `enable_compile_cache` has chosen; None where there is none, or others may write to it by now."""
    config: Any = jax.config
    if not config.jax_enable_compilation_cache or not config.jax_compilation_cache_dir:
        return None
    folder = Path(config.jax_compilation_cache_dir)
    return folder if folder.name == _host() and folder.is_dir() and _is_own(folder.stat()) else None


def read_entry(folder: Path, name: str) -> bytes | None:
    """Read an entry, and note that it was used; None where there is none that is whole.

    Raises:
        OSError: the folder cannot be used, or another process has it for too long.
    """
    entry = folder / f"{name}-cache"
    with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS):
        if not entry.exists():
            return None
        content = entry.read_bytes()
        _time_of_use(entry).write_bytes(_now())
    data = content[_DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == content[:_DIGEST_BYTES] else None


def write_entry(folder: Path, name: str, data: bytes) -> None:
    """Write an entry, in place of what was used least recently where the folder would grow beyond its limit.

    Raises:
        OSError: the folder cannot be used, or another process has it for too long.
    """
    config: Any = jax.config
    most = config.jax_compilation_cache_max_size
    entry, content = folder / f"{name}-cache", hashlib.sha256(data).digest() + data
    if len(content) > most:
        return
    with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS):
        entry.unlink(missing_ok=True)
        sizes = {each: each.stat().st_size for each in folder.glob("*-cache")}
        total = sum(sizes.values()) + len(content)
        for oldest in sorted(sizes, key=_last_use):
            if total <= most:
                break
            oldest.unlink()
            _time_of_use(oldest).unlink(missing_ok=True)
            total -= sizes[oldest]
        entry.write_bytes(content)
        _time_of_use(entry).write_bytes(_now())


def _time_of_use(entry: Path) -> Path:
    return entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")


def _last_use(entry: Path) -> int:
    time_of_use = _time_of_use(entry)
    return int.from_bytes(time_of_use.read_bytes(), "little") if time_of_use.exists() else 0


def _now() -> bytes:
    return time.time_ns().to_bytes(8, "little")


def _is_own(found: os.stat_result) -> bool:
    # Elsewhere than on POSIX, st_mode says nothing about others.
    return not hasattr(os, "getuid") or (
        found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _prepare(folder: Path) -> None:
    """Make the folder, refuse it where it cannot be used, and remove halves of entries."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CompileCacheError(f"{folder} cannot be made: {error.strerror or error}") from error
    if not _is_own(found):
        raise CompileCacheError(
            f"{folder} belongs to another user, or others may write to it, and what is in it would be run; "
            "chmod go-w, or another folder, makes it safe"
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise CompileCacheError(f"{folder} is not writable")
    if free < _LEAST_FREE_BYTES:
        raise CompileCacheError(
            f"the disk of {folder} has {free / 2**20:.0f} MiB left, and a cache gets none below 256"
        )
    try:
        _remove_halves(folder)
    except OSError as error:
        raise CompileCacheError(f"{folder} cannot be used: {error.strerror or error}") from error


def _remove_halves(folder: Path) -> None:
    # JAX writes under this lock. While another process has it, that one is at work, and none of its entries is cut off.
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=0):
            for entry in folder.glob("*-cache"):
                if not _time_of_use(entry).exists():
                    entry.unlink(missing_ok=True)
    except filelock.Timeout:
        return


def _host() -> str:
    """Name the machine's processor: what host code may be compiled for."""
    facts = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        wanted = ("model name", "flags", "Features", "CPU part")
        first, _, _ = cpuinfo.read_text(errors="replace").partition("\n\n")
        facts += [line for line in first.splitlines() if line.startswith(wanted)]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"{platform.machine() or 'any'}-{digest[:12]}"
