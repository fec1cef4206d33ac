"""The name that a compiled program is found again by without being traced: a digest of all that a trace may depend on.

That is jaxmoe's own sources, versions, options of JAX, the user's tables of measurements, the devices, and what the traced
function is given: arguments, and the values that it closes over, a model's static part among them. Every value is taken
apart down to numbers, names and the like. Code that is not jaxmoe's or of a library whose version counts could change
without a trace in the digest, and so a program with such code in it has no name: `Unnameable`.
"""

import dataclasses
import enum
import functools
import hashlib
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Set
from importlib.metadata import version
from typing import Any

import flax
import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe import __imported__
from jaxmoe.kernels.grouped_matmul import known_verdicts
from jaxmoe.user_files import data_folder

# Code of these is told by a version, or for jaxmoe itself by its sources.
_TOLD = {*sys.stdlib_module_names, "flax", "jax", "jaxlib", "jaxmoe", "ml_dtypes", "numpy"}


# Of exactly these types.
_PLAIN = {type(None), bool, int, float, complex, str, bytes}
_TOLD_BY_REPR = (bool, int, float, complex, str, bytes, pathlib.PurePath, np.dtype)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, jax.stages.Wrapped)


class Unnameable(ValueError):
    """There is a value in a program that cannot be told from others of its kind in the next process."""


def name_program(mesh: Mesh, function: Callable, args: tuple, parts: Mapping[str, Any], digests: "Digests") -> str:
    """Name a program that has not been traced, of one process on devices of its own, in 64 hexadecimal digits.

    Args:
        mesh: mesh that it runs on.
        function: function to be traced.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`.
        parts: everything else that it and its compilation are given, by name.
        digests: digests of what other programs were given.

    Raises:
        Unnameable: a part depends on code that the name cannot tell.
    """
    if not function.__module__.startswith("jaxmoe."):
        raise Unnameable(f"a program is made in {function.__module__}, which no version tells")
    kind = mesh.devices.flat[0].device_kind
    return digests.of(
        {
            "function": f"{function.__module__}.{function.__qualname__}",
            "arguments": _arguments(args),
            "parts": parts,
            "sources": _sources(),
            "measurements": _files(data_folder(), "*.json"),
            "verdicts": sorted(map(str, known_verdicts(kind).items())),
            "surrounding mesh": str(jax.sharding.get_abstract_mesh()),
            "versions": [sys.version, flax.__version__, np.__version__, ml_dtypes.__version__],
            "environment": _environment(mesh),
        }
    )


def name_code(mesh: Mesh, lowered: jax.stages.Lowered, args: tuple) -> str:
    """Name a program by the code that it was lowered to; arguments as above."""
    out = jax.tree.structure(lowered.out_info)
    return Digests().of([lowered.as_text(), out, _arguments(args), mesh, _environment(mesh)])


def closure_of(function: Callable) -> dict[str, Any]:
    """The values that a function closes over, by name."""
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }


class Digests:
    """Digests of values that do not change: another value has another one, in any process. Each is made once."""

    def __init__(self) -> None:
        # The values are held: an id may be given again once its value is gone.
        self._known: dict[int, tuple[Any, str]] = {}

    def of(self, value: Any) -> str:
        """Tell a plain value by itself, and others by a digest.

        Raises:
            Unnameable: the value, or one inside it, is of a kind that is not known here, or its code is not.
        """
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if id(value) not in self._known:
            text = "\0".join([_code(value if isinstance(value, type) else type(value)), *self._parts(value)])
            self._known[id(value)] = value, hashlib.sha256(text.encode()).hexdigest()
        return self._known[id(value)][1]

    def _parts(self, value: Any) -> Iterable[str]:
        of = self.of
        if isinstance(value, type):
            return ["type"]
        if isinstance(value, enum.Enum):
            return [value.name]
        if isinstance(value, _TOLD_BY_REPR):
            return [repr(value)]
        if isinstance(value, np.ndarray | np.generic):
            return [f"{value.dtype} {value.shape}", hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
        if isinstance(value, Mapping):
            return [of(each) for pair in value.items() for each in pair]
        if isinstance(value, Set):
            return sorted(map(of, value))
        if isinstance(value, tuple | list | PartitionSpec):
            return map(of, value)
        if isinstance(value, functools.partial):
            return map(of, (value.func, value.args, value.keywords))
        if isinstance(value, _FUNCTIONS):
            return [_code(value)]
        if isinstance(value, jax.tree_util.PyTreeDef):
            return map(of, (value.node_data(), value.children()))
        if isinstance(value, Mesh):
            devices = [(device.platform, device.id) for device in value.devices.flat]
            return map(of, (value.axis_names, value.axis_types, value.devices.shape, devices))
        if isinstance(value, NamedSharding):
            return map(of, (value.mesh, value.spec, value.memory_kind))
        if dataclasses.is_dataclass(value):
            return [of(getattr(value, field.name)) for field in dataclasses.fields(value)]
        if type(value).__module__.startswith(("jaxmoe.", "flax.")) and hasattr(value, "__dict__"):
            return [of(vars(value))]
        raise Unnameable(f"a program depends on {value!r:.100}, which cannot be told from others")


def _code(value: Any) -> str:
    """Name a class or function, which stands for its code."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "<unknown>")
    if (module or "").partition(".")[0] not in _TOLD or "<" in name:
        raise Unnameable(f"a program depends on code that no version tells: {module}.{name}")
    return f"{module}.{name}"


def _arguments(args: tuple) -> Any:
    leaves, tree = jax.tree.flatten(args)
    return tree, [(leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding) for leaf in leaves]


def _environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, options and devices, on which the compilation of the same code depends."""
    devices = [*mesh.devices.flat]
    client = devices[0].client
    return {
        "versions": [jax.__version__, version("jaxlib")],
        "options": _options(),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        "platform": [client.platform, client.platform_version, len(client.devices())],
        "devices": [(each.device_kind, getattr(each, "core_count", None)) for each in devices],
    }


def _options() -> list[tuple[str, str]]:
    """Every option of JAX, as this thread has it."""
    config: Any = jax.config
    return [(name, str(getattr(config, name, value))) for name, value in sorted(config.values.items())]


@functools.cache
def _sources() -> list[tuple[str, str]]:
    return _files(pathlib.Path(__file__).parents[1], "*.py")


def _files(folder: pathlib.Path, pattern: str) -> list[tuple[str, str]]:
    """Name and digest of each file.

    Raises:
        Unnameable: one of them has changed since jaxmoe was imported: what this process goes by may be older.
    """
    found = []
    for file in sorted(folder.rglob(pattern)):
        state = file.stat()
        if max(state.st_mtime, state.st_ctime) > __imported__:
            raise Unnameable(f"{file} has changed since jaxmoe was imported")
        found.append((str(file.relative_to(folder)), hashlib.sha256(file.read_bytes()).hexdigest()))
    return found
