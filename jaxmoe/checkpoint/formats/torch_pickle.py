"""A reader of the pickle inside a torch checkpoint that executes nothing.

A pickle is a program: its GLOBAL opcode imports any name and REDUCE calls it. This is another machine for the same
language. It knows the opcodes that ``torch.save`` writes for a dict of tensors, and a table of names which
stand for descriptions: "a tensor over storage 7" instead of a tensor. Nothing is imported, no attribute is set,
nothing that the file names is called; an opcode or a name that is not in the tables is an error. What comes out is made
of dict, list, tuple, str, int, float, bool, None, `TensorRef`, `StorageRef` and `Name`.

Memory is bounded by the length of the pickle and by `MAX_OPERATIONS`. Objects may be nested deeply, shared, or
contain themselves, because a file can say so: walk them with a list, not by recursion.

Source: Lib/pickletools.py of CPython for the opcodes; torch/_utils.py and torch/serialization.py for the names.
"""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from jaxmoe.checkpoint.errors import CheckpointError

MAX_PICKLE_BYTES = 100_000_000
MAX_OPERATIONS = 10_000_000  # some 40 per tensor; each makes one object at most
MAX_RANK = 8
MAX_SIZE = 2**48  # of a dim, a stride, an offset or a storage

_WAY_OUT = "save only tensors, torch.save(model.state_dict(), ...), or convert the checkpoint to safetensors"


class Name(NamedTuple):
    """A global that the pickle names. It stands for itself: there is nothing behind it to call."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage: the entry ``data/<key>`` of the archive.

    Attributes:
        key: its name there.
        dtype: torch's name of the element type, "bfloat16"; None for untyped bytes.
        numel: elements of that type; bytes where it is None.
    """

    key: str
    dtype: str | None
    numel: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRef:
    """A view of a storage.

    Attributes:
        storage: storage that it views.
        dtype: torch's name of its element type.
        offset: its first element.
        shape: its dims.
        strides: elements from one index of a dim to the next.
    """

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_STORAGE_DTYPES = {
    Name("torch", "DoubleStorage"): "float64",
    Name("torch", "FloatStorage"): "float32",
    Name("torch", "HalfStorage"): "float16",
    Name("torch", "BFloat16Storage"): "bfloat16",
    Name("torch", "LongStorage"): "int64",
    Name("torch", "IntStorage"): "int32",
    Name("torch", "ShortStorage"): "int16",
    Name("torch", "CharStorage"): "int8",
    Name("torch", "ByteStorage"): "uint8",
    Name("torch", "BoolStorage"): "bool",
    Name("torch", "ComplexFloatStorage"): "complex64",
    Name("torch.storage", "UntypedStorage"): None,
}
_DTYPES = {
    Name("torch", name): name
    for name in (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16 uint32 uint64 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
    ).split()
}


class _Refused(Exception):
    """(rule, value received), until the place and the way out are added."""


def _refuse(rule: str, value: str) -> NoReturn:
    raise _Refused(rule, value)


def read_torch_pickle(data: bytes, source: str) -> Any:
    """Interpret the pickle of a torch checkpoint, without running anything.

    Args:
        data: the whole of ``data.pkl``.
        source: file that it is from, for messages.

    Returns:
        The object it describes, with a `TensorRef` for every tensor.

    Raises:
        CheckpointError: it uses an opcode or a name that a dict of tensors does not need, or breaks a rule.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except _Refused as refused:
        rule, value = refused.args
        raise CheckpointError(f"{source}: {rule}; {value} (byte {machine.at}); {_WAY_OUT}") from None


class _Machine:
    """The stack machine of one pickle.

    `stack` holds what has been pushed since the last MARK, `marked` the stacks below it.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.at = 0  # of the current opcode
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if len(self.data) > MAX_PICKLE_BYTES:
            _refuse(f"a pickle has at most {MAX_PICKLE_BYTES} bytes", f"this one has {len(self.data)}")
        if self.data[:2] != b"\x80\x02":
            _refuse("a torch pickle has protocol 2", f"this one starts with {self.data[:2]!r}")
        self.position = 2
        for _ in range(MAX_OPERATIONS):
            self.at = self.position
            opcode = self.take(1)
            if opcode == b".":
                return self.stop()
            operation = _OPCODES.get(opcode)
            if operation is None:
                _refuse("only the opcodes of a dict of tensors are allowed", f"one is {_opcode_name(opcode)}")
            operation(self)
        _refuse(f"a pickle has at most {MAX_OPERATIONS} operations", "this one has more")

    def stop(self) -> Any:
        if self.marked or len(self.stack) != 1:
            _refuse("a pickle must end with one object", f"there are {len(self.stack)} and {len(self.marked)} marks")
        if self.position != len(self.data):
            _refuse("a pickle must end with STOP", f"{len(self.data) - self.position} bytes follow it")
        return self.stack[0]

    # Input and stack.

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            _refuse("a pickle must end with STOP", "this one ends in the middle")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def signed(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little", signed=True)

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            _refuse("a string must be UTF-8", "one is not")

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 256)
        if end < 0:
            _refuse("a global's name must be a short line", "one is not")
        text = self.text(end - self.position)
        self.position += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            _refuse("an operation must find its operands on the stack", "the stack is empty")
        return self.stack.pop()

    def pop_many(self, count: int) -> tuple[Any, ...]:
        values = [self.pop() for _ in range(count)]
        return tuple(reversed(values))

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        if not self.marked:
            _refuse("an operation must find its MARK on the stack", "there is none")
        values, self.stack = self.stack, self.marked.pop()
        return values

    def top(self, kind: type, operation: str) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            found = type(self.stack[-1]).__name__ if self.stack else "nothing"
            _refuse(f"{operation} needs a {kind.__name__}", f"there is {found}")
        return self.stack[-1]

    # Memo.

    def put(self, width: int) -> None:
        index = self.unsigned(width)
        if not self.stack:
            _refuse("an operation must find its operands on the stack", "the stack is empty")
        self.memo[index] = self.stack[-1]

    def get(self, width: int) -> None:
        index = self.unsigned(width)
        if index not in self.memo:
            _refuse("the memo must be written before it is read", f"there is no {index} in it")
        self.push(self.memo[index])

    # Containers.

    def append(self, values: list[Any] | tuple[Any, ...]) -> None:
        self.top(list, "APPEND").extend(values)

    def set_items(self, values: list[Any] | tuple[Any, ...]) -> None:
        target = self.top(dict, "SETITEM")
        if len(values) % 2:
            _refuse("SETITEMS needs pairs", f"there are {len(values)} values")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing anything nested recurses, and a pickle can nest as deeply as it likes.
            if type(key) not in (str, int):
                _refuse("a key must be a string or an integer", f"one is a {type(key).__name__}")
            if key in target:
                _refuse("a key may be there only once", f"{str(key)[:80]!r} is there twice")
            target[key] = value

    # What would import, call and set.

    def name(self) -> None:
        name = Name(self.line(), self.line())
        if name not in _CALLS and name not in _STORAGE_DTYPES and name not in _DTYPES:
            _refuse("only the names of a dict of tensors are allowed", f"one is {str(name)[:120]!r}")
        self.push(name)

    def reduce(self) -> None:
        name, arguments = self.pop_many(2)
        call = _CALLS.get(name) if type(name) is Name else None
        if call is None or type(arguments) is not tuple:
            what = str(name) if type(name) is Name else f"a {type(name).__name__}"
            _refuse("only a tensor, a size or a dict is built by a call", f"one is built by {what}")
        self.push(call(*_checked(name, arguments)))

    def build(self) -> None:
        # A module's state dict carries the versions of its layers as an attribute. Nothing else may, and it is dropped.
        state = self.pop()
        self.top(dict, "BUILD")
        if type(state) is not dict or set(state) != {"_metadata"}:
            _refuse("BUILD may only set the _metadata of a state dict", f"it is given a {type(state).__name__}")

    def persistent(self) -> None:
        pid = self.pop()
        if type(pid) is not tuple or len(pid) != 5 or type(pid[0]) is not str or pid[0] != "storage":
            _refuse("a persistent id must be ('storage', type, key, location, size)", f"one is a {type(pid).__name__}")
        _, kind, key, location, numel = pid
        if type(kind) is not Name or kind not in _STORAGE_DTYPES:
            _refuse("a storage must have a storage type", f"one has a {type(kind).__name__}")
        if type(key) is not str or not (key.isascii() and key.isalnum()):
            _refuse("a storage's key must be a plain name", f"one is {str(key)[:80]!r}" if type(key) is str else "")
        if type(location) is not str or not _is_size(numel):
            _refuse("a storage must have a location and a size", f"storage {key!r} has not")
        self.push(StorageRef(key, _STORAGE_DTYPES[kind], numel))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _checked(name: Name, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    least, most = _ARITIES[name]
    if not least <= len(arguments) <= most:
        _refuse(f"{name} takes {least} to {most} arguments", f"it is given {len(arguments)}")
    return arguments


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _size(dims: Any) -> tuple[int, ...]:
    if type(dims) is not tuple or len(dims) > MAX_RANK or not all(_is_size(dim) for dim in dims):
        _refuse(f"a size, or strides, must be up to {MAX_RANK} integers that are not negative", "one is not")
    return dims


def _tensor_v2(
    storage: Any, offset: Any, size: Any, strides: Any, grad: Any, hooks: Any, metadata: Any = None
) -> TensorRef:
    if type(storage) is not StorageRef or storage.dtype is None:
        _refuse("a tensor must view a typed storage", "one does not")
    return _tensor_v3(storage, offset, size, strides, grad, hooks, Name("torch", storage.dtype), metadata)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRef:
    if type(storage) is not StorageRef:
        _refuse("a tensor must view a storage", "one does not")
    if type(dtype) is not Name or dtype not in _DTYPES:
        _refuse("a tensor must have an element type", "one has not")
    if not _is_size(offset) or len(_size(size)) != len(_size(strides)):
        _refuse("a tensor must have an offset, a size and as many strides", "one has not")
    if type(grad) is not bool or type(hooks) is not dict or hooks:
        _refuse("a tensor must have no hooks", "one has")
    # Metadata are bits such as "negated", which change what the stored numbers mean.
    if metadata is not None and (type(metadata) is not dict or metadata):
        _refuse("a tensor must have no metadata", "one has")
    return TensorRef(storage, _DTYPES[dtype], offset, size, strides)


def _parameter(data: Any, grad: Any, hooks: Any) -> TensorRef:
    if type(data) is not TensorRef or type(grad) is not bool or type(hooks) is not dict or hooks:
        _refuse("a parameter must be a tensor without hooks", "one is not")
    return data


_CALLS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch", "Size"): _size,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
}
_ARITIES = dict(zip(_CALLS, [(0, 0), (1, 1), (6, 7), (7, 8), (3, 3)], strict=True))

_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.signed(4)),
    b"K": lambda m: m.push(m.unsigned(1)),
    b"M": lambda m: m.push(m.unsigned(2)),
    b"\x8a": lambda m: m.push(m.signed(m.unsigned(1))),  # LONG1: up to 255 bytes; LONG4 is not allowed
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.push(m.text(m.unsigned(4))),
    b"U": lambda m: m.push(m.text(m.unsigned(1))),
    b"(": lambda m: m.mark(),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.push(m.pop_many(1)),
    b"\x86": lambda m: m.push(m.pop_many(2)),
    b"\x87": lambda m: m.push(m.pop_many(3)),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append(m.pop_many(1)),
    b"e": lambda m: m.append(m.pop_mark()),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items(m.pop_many(2)),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"q": lambda m: m.put(1),
    b"r": lambda m: m.put(4),
    b"h": lambda m: m.get(1),
    b"j": lambda m: m.get(4),
    b"c": lambda m: m.name(),
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
"""Opcodes that ``torch.save`` writes, but for STOP, which ends `_Machine.run`."""

_REFUSED_OPCODES = {
    b"i": "INST", b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX", b"\x93": "STACK_GLOBAL", b"P": "PERSID",
    b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x8b": "LONG4", b"\x95": "FRAME", b"\x80": "PROTO",
    b"d": "DICT", b"l": "LIST", b"p": "PUT", b"g": "GET", b"I": "INT", b"L": "LONG", b"S": "STRING", b"V": "UNICODE",
    b"F": "FLOAT", b"0": "POP", b"1": "POP_MARK", b"2": "DUP", b"B": "BINBYTES", b"C": "SHORT_BINBYTES",
    b"T": "BINSTRING", b"\x8c": "SHORT_BINUNICODE", b"\x94": "MEMOIZE", b"\x8f": "EMPTY_SET",
    b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER",
}  # fmt: skip
"""For the message alone: what is refused is everything that is not in `_OPCODES`."""


def _opcode_name(opcode: bytes) -> str:
    return _REFUSED_OPCODES.get(opcode, f"byte {opcode.hex()}")
