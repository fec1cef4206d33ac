"""Compiled programs kept whole beside JAX's compile cache: the next process runs them without tracing them.

JAX finds its own entry of a program by the code that tracing and lowering give, and those take most of a second start. Here
a program is found by `jaxmoe.generation.program_key` instead, an entry that names another: the program itself is kept under
its code, so that a change of sources which leaves the code alone costs a trace and no compilation.

A program is kept as a pickle and machine code, both of which run when they are read. The folder of
`jaxmoe.enable_compile_cache` alone is used for that, where no one else may write.
"""

import contextlib
import pickle
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxmoe.compile_cache import own_folder, read_entry, write_entry
from jaxmoe.generation.program_key import Digests, Unnameable, closure_of, name_code, name_program
from jaxmoe.mesh import is_present


class Program(NamedTuple):
    """A compiled program, and what it gives as `jax.ShapeDtypeStruct` with shardings."""

    compiled: jax.stages.Compiled
    out: Any


def compile_program(
    mesh: Mesh, function: Callable, args: tuple, *, holds: Mapping[str, Any], digests: Digests, **options: Any
) -> Program:
    """Find a program that an earlier process has kept, or compile it and keep it.

    Args:
        mesh: mesh of the arguments.
        function: function to compile, whose closure is a part of what the program is found by.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`, on the mesh.
        holds: values to go by in place of the object that `function` closes over as `self`; they do not change.
        digests: digests of them, which other programs share.
        options: arguments of `jax.jit`.
    """
    folder = own_folder() if not mesh.is_multi_process and is_present(mesh.devices.flat[0]) else None
    name = None if folder is None else _name(mesh, function, args, holds, options, digests)
    if folder is None or name is None:
        lowered = jax.jit(function, **options).lower(*args)
        return _program(lowered, lowered.compile())
    with _never_stopping():
        if (code := read_entry(folder, name)) and (found := _find(folder, code.decode(), mesh, args)):
            return found
    lowered = jax.jit(function, **options).lower(*args)
    code_name = f"jaxmoe_{function.__name__}-{name_code(mesh, lowered, args)}"
    with _never_stopping():
        if found := _find(folder, code_name, mesh, args):
            write_entry(folder, name, code_name.encode())
            return found
    with _events_of_cache() as events:
        program = _program(lowered, lowered.compile())
    # A program from JAX's own cache cannot be kept: on a CPU it would lose its functions.
    if events["cache_misses"] and not events["cache_hits"]:
        with _never_stopping():
            _keep(folder, code_name, program)
            write_entry(folder, name, code_name.encode())
    return program


def _name(
    mesh: Mesh, function: Callable, args: tuple, holds: Mapping[str, Any], options: Any, digests: Digests
) -> str | None:
    closed_over = closure_of(function)
    if "self" in closed_over:
        closed_over["self"] = holds
    try:
        name = name_program(mesh, function, args, {"closure": closed_over, "options": options}, digests)
    except Unnameable:
        return None
    return f"jaxmoe_{function.__name__}-{name}"


def _program(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> Program:
    return Program(compiled, _out(lowered.out_info, compiled))


def _out(infos: Any, compiled: jax.stages.Compiled) -> Any:
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        infos,
        compiled.output_shardings,
    )


def _keep(folder: Path, name: str, program: Program) -> None:
    executable, _, _ = serialize_executable.serialize(program.compiled)
    infos = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), program.out)
    write_entry(folder, name, zlib.compress(pickle.dumps((executable, infos)), 1))


def _find(folder: Path, name: str, mesh: Mesh, args: tuple) -> Program | None:
    entry = read_entry(folder, name)
    if entry is None:
        return None
    executable, infos = pickle.loads(zlib.decompress(entry))
    compiled = serialize_executable.deserialize_and_load(
        executable,
        jax.tree.structure((args, {})),
        jax.tree.structure(infos),
        backend=mesh.devices.flat[0].client,
        execution_devices=[*mesh.devices.flat],
    )
    return Program(compiled, _out(infos, compiled))


@contextlib.contextmanager
def _never_stopping() -> Iterator[None]:
    """Tell of whatever goes wrong with a kept program, and go on: it can be compiled."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"a compiled program is not kept or found: {type(error).__name__}: {error}", stacklevel=4)


@contextlib.contextmanager
def _events_of_cache() -> Iterator[Counter[str]]:
    """Count what JAX says of its own cache in this thread."""
    found: Counter[str] = Counter()
    thread = threading.get_ident()

    def listen(event: str, **_: Any) -> None:
        if threading.get_ident() == thread:
            found[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)
