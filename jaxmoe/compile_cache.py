"""JAX's cache of compiled programs, in the user's cache folder: `enable_compile_cache`.

JAX's key of a program covers its code, the compiler's version and flags, and the kind of device. The folder's name adds
what it may leave out: the processor that host code was compiled for, since a home may be shared by machines that differ.

An entry is a program that will be run, so a folder that others may write to is not used. JAX evicts what was used least
recently, and writes an entry before its time of use: one without a time is the half of a write that was cut off.
"""

import hashlib
import os
import platform
import shutil
import stat
from pathlib import Path
from typing import Any

import filelock
import jax

from jaxmoe.checks import integer
from jaxmoe.user_files import cache_folder

MOST_BYTES = 4 * 2**30
_LEAST_FREE_BYTES = 256 * 2**20


class CompileCacheError(OSError):
    """The folder cannot hold compiled programs; the message says why. Nothing has been changed."""


def enable_compile_cache(
    directory: str | os.PathLike[str] | None = None, *, max_bytes: int = MOST_BYTES
) -> Path | None:
    """Keep compiled programs on disk, so that the next process loads them where this one compiled.

    It sets JAX's own options (``jax_compilation_cache_dir`` and its limits) for this process, and is called before anything
    is compiled. Where a cache was chosen already, as by ``JAX_COMPILATION_CACHE_DIR``, it stays as it is.
    The ``jaxmoe`` command calls this; the library by itself does not.

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


def _prepare(folder: Path) -> None:
    """Make the folder, refuse it where it cannot be used, and remove halves of entries."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CompileCacheError(f"{folder} cannot be made: {error.strerror or error}") from error
    # Elsewhere than on POSIX, st_mode says nothing about others.
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
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
                if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
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
