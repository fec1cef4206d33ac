"""The reader of ``.bin`` files: where tensors are, and that nothing in a file is ever run."""

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import torch_pickle
from jaxmoe.checkpoint.formats.safetensors import TensorInfo
from jaxmoe.checkpoint.formats.torch_file import read_torch_file
from jaxmoe.checkpoint.formats.torch_pickle import read_torch_pickle
from tests.support.torch_archives import (
    DATA,
    GOOD,
    HOOKS,
    REBUILD,
    archive,
    call,
    count,
    name,
    number,
    pack,
    program,
    state_dict,
    storage,
    tensor,
    text,
)


def load(tensor: TensorInfo) -> np.ndarray:
    """A tensor by its byte range alone."""
    stored = tensor.as_stored()
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        data = np.frombuffer(file.read(tensor.nbytes), stored.dtype).reshape(stored.shape)
    return data if tensor.dim_order is None else data.transpose(np.argsort(tensor.dim_order))


# A small assembler of pickles.


def refuse(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


# Files that torch wrote.


def test_dtypes() -> None:
    file = read_torch_file(DATA / "torch_dtypes.bin")
    assert len(file.tensors) == 18
    for dtype, info in file.tensors.items():
        expected = count(2, 3) > 2 if dtype == "bool" else count(2, 3).astype(info.dtype)
        np.testing.assert_array_equal(load(info), expected, err_msg=dtype, strict=True)
        assert info.dtype.name == dtype


def test_views_share_storages() -> None:
    file = read_torch_file(DATA / "torch_views.bin")
    base = count(4, 6)
    expected = {
        "whole": base,
        "tied": base,
        "rows": base[1:3],
        "row": base[2],
        "scalar": np.float32(7),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": count(2, start=5),
        "one_row": count(3, 1),
    }
    assert list(file.tensors) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(load(file.tensors[key]), value, err_msg=key, strict=True)
    assert file.tensors["whole"].offset == file.tensors["tied"].offset
    assert file.tensors["rows"].offset == file.tensors["whole"].offset + 6 * 4
    assert (file.size, file.skipped) == ((DATA / "torch_views.bin").stat().st_size, ())


def test_permuted_tensors_are_read_only_by_who_asks_for_them() -> None:
    path = DATA / "torch_permuted.bin"
    refuse(path, r"must be contiguous here; 'transposed' is transposed; save it again after tensor.contiguous\(\)")
    tensors = read_torch_file(path, allow_permuted=True).tensors
    assert tensors["transposed"].dim_order == (1, 0)
    np.testing.assert_array_equal(load(tensors["transposed"]), count(4, 6).T)
    np.testing.assert_array_equal(load(tensors["permuted"]), count(2, 3, 4).transpose(2, 0, 1))


def test_other_strides_are_refused() -> None:
    refuse(DATA / "torch_columns.bin", r"'columns' has shape \(4, 2\) with strides \(6, 1\); save it again after")


def test_state_dict_in_a_training_checkpoint() -> None:
    file = read_torch_file(DATA / "torch_training.pt")
    assert list(file.tensors) == ["weight", "bias"]
    np.testing.assert_array_equal(load(file.tensors["weight"]), count(2, 3))
    assert file.skipped == ("optimizer", "epoch", "name", "best")


def test_legacy_file() -> None:
    refuse(DATA / "torch_legacy.bin", r"format before that; rewrite it: torch.save\(torch.load\(path, weights_only")


def test_live_against_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    generator = torch.Generator().manual_seed(0)
    state = {
        f"layers.{i}.weight": torch.randn(3, 4 + i, generator=generator) for i in range(1100)
    }  # > a SETITEMS batch
    state["chunk.0"], state["chunk.1"] = torch.randn(8, 3, generator=generator).chunk(2)
    state["transposed"] = torch.randn(5, 7, generator=generator).T
    torch.save(state, path)
    found = read_torch_file(path, allow_permuted=True).tensors
    assert list(found) == list(state)
    for key, value in state.items():
        np.testing.assert_array_equal(load(found[key]), value.numpy(), err_msg=key, strict=True)
        assert found[key].offset % 4 == 0


@pytest.mark.parametrize("dtype", ["float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_live_scale_and_packed_types(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    data = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    torch.save({"w": data.view(getattr(torch, dtype))}, tmp_path / "w.bin")
    info = read_torch_file(tmp_path / "w.bin").tensors["w"]
    packed = dtype == "float4_e2m1fn_x2"
    assert info.shape == ((2, 6) if packed else (2, 3))  # safetensors counts the 4-bit numbers, torch pairs of them
    assert (info.dtype_name, info.nbytes) == ("F4" if packed else "F8_E8M0", 6)
    assert (tmp_path / "w.bin").read_bytes()[info.offset :][: info.nbytes] == bytes(range(6))


@pytest.mark.parametrize("what", ["sparse", "device", "complex128", "protocol 4", "module"])
def test_live_what_is_no_plain_state_dict(tmp_path: Path, what: str) -> None:
    torch = pytest.importorskip("torch")
    path, protocol = tmp_path / "w.bin", 2
    if what == "sparse":
        value = {"w": torch.eye(3).to_sparse()}
    elif what == "device":
        value = {"w": torch.eye(3), "device": torch.device("cpu")}
    elif what == "complex128":
        value = {"w": torch.zeros(2, dtype=torch.complex128)}
    elif what == "protocol 4":
        value, protocol = {"w": torch.eye(3)}, 4
    else:
        value = torch.nn.Linear(2, 2)
    torch.save(value, path, pickle_protocol=protocol)
    refuse(path, "has protocol 2" if protocol == 4 else "names of a dict of tensors are allowed; one is 'torch")


# Pickles that want to run something.


class Payload:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class ByState:
    """Is harmful when its state is set."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __setstate__(self, state: dict[str, str]) -> None:
        os.system(state["command"])


def armed_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that create `canary` when Python loads them."""
    command = f"touch '{canary}'"
    source = f"open({str(canary)!r}, 'w').close()"
    os_name = os.system.__module__  # posix, or nt
    result = {
        f"reduce {function.__name__}, protocol {protocol}": pickle.dumps(payload, protocol)
        for protocol in range(6)
        for function, payload in {
            os.system: Payload(os.system, command),
            eval: Payload(eval, source),
            exec: Payload(exec, source),
        }.items()
    }
    nested = Payload(os.system, command)
    result |= {
        f"nested, protocol {protocol}": pickle.dumps({"w": [{"deep": (1, nested)}]}, protocol) for protocol in range(6)
    }
    result |= {f"setstate, protocol {p}": pickle.dumps(ByState(command), p) for p in range(6)}
    system, arguments = name(os_name, "system"), text(command)
    imported = call(name("builtins", "__import__"), text("os"))
    result |= {
        "global by a dotted path": program(name("os", "system") + arguments + b"\x85R"),
        "inst": b"(" + arguments + b"i" + f"{os_name}\nsystem\n".encode() + b".",
        "obj": b"(" + system + arguments + b"o.",
        "newobj": program(name("subprocess", "Popen") + text(command) + b"\x85\x81"),
        "stack global": b"\x80\x04" + text(os_name) + text("system") + b"\x93" + arguments + b"\x85R.",
        "getattr of an import": program(call(call(name("builtins", "getattr"), imported, text("system")), arguments)),
        "a memo slot written twice": program(HOOKS + b"q\x000" + system + b"q\x000h\x00" + arguments + b"\x85R"),
        "popped result": program(system + arguments + b"\x85R0" + b"}"),
        "as a dict key": program(b"}" + call(system, arguments) + b"Ns"),
        "inside a persistent id's place": state_dict(w=tensor(call(system, arguments))),
        "as hooks of a tensor": state_dict(w=tensor(hooks=call(system, arguments))),
        "after a good dict": GOOD[:-1] + call(system, arguments) + b"0.",
        "functools.partial": program(call(call(name("functools", "partial"), system, arguments))),
        "operator.methodcaller": program(
            call(call(name("operator", "methodcaller"), text("system"), arguments), imported)
        ),
        "extension registry": program(b"\x82\x01" + arguments + b"\x85R"),
        "copyreg": program(call(name("copyreg", "_reconstructor"), system, name("builtins", "object"), b"N")),
        "numpy": program(call(name("numpy.testing._private.utils", "runstring"), text(source), b"}")),
        "torch.hub": program(call(name("torch.hub", "load"), text("evil/repo"), text("model"))),
        "torch.load": program(call(name("torch.serialization", "load"), text("other.bin"))),
    }
    return result


# All but these create the canary when they are loaded for real: proof that the test has something to refuse.
UNARMED = ("newobj", "copyreg", "extension", "numpy", "torch", "inside", "as hooks", "after")


def payload_names() -> list[str]:
    return list(armed_pickles(Path("canary")))


@pytest.mark.parametrize("attack", payload_names())
def test_nothing_is_run(tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    pickled = armed_pickles(canary)[attack]
    if not attack.startswith(UNARMED):
        try:
            loaded = pickle.loads(pickled)
            if hasattr(loaded, "wait"):
                loaded.wait()
        except Exception:  # some end badly, after the effect
            pass
        assert canary.exists(), "the payload is a dud: the test would prove nothing"
        canary.unlink()
    modules = set(sys.modules)
    refuse(archive(tmp_path / "evil.bin", pickled), "torch pickle has protocol 2|allowed; one is|must|needs")
    assert not canary.exists()
    assert set(sys.modules) == modules


@pytest.mark.parametrize("opcode", [bytes([byte]) for byte in range(256)], ids=lambda opcode: opcode.hex())
def test_every_other_opcode_is_refused(opcode: bytes) -> None:
    allowed = set(torch_pickle._OPCODES) | {b"."}
    if opcode in allowed:
        assert opcode not in torch_pickle._REFUSED_OPCODES
        return
    with pytest.raises(CheckpointError, match="only the opcodes of a dict of tensors are allowed"):
        read_torch_pickle(program(b"N" + opcode + bytes(16)), "a test")


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("collections", "namedtuple"),
        ("collections", "OrderedDict.__init__"),
        ("torch", "load"),
        ("torch", "FloatStorage.__class__"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.storage", "_load_from_bytes"),
        ("_codecs", "encode"),
        ("", ""),
    ],
)
def test_every_other_name_is_refused(module: str, attribute: str) -> None:
    with pytest.raises(CheckpointError, match="only the names of a dict of tensors are allowed"):
        read_torch_pickle(program(name(module, attribute)), "a test")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"}" + text("a") + b"}" + text("_metadata") + b"Nsb", "BUILD needs a dict; there is str"),
        (b"}}" + text("__class__") + b"Nsb", "BUILD may only set the _metadata"),
        (b"}" + pack(b"N", b"}") + b"b", "BUILD may only set the _metadata"),
        (HOOKS + HOOKS + b"R", "built by a dict"),
        (name("torch", "FloatStorage") + b")R", "built by torch.FloatStorage"),
        (name("collections", "OrderedDict") + b"(]tR", "takes 0 to 0 arguments; it is given 1"),
        (name("collections", "OrderedDict") + b"NR", "only a tensor, a size or a dict is built by a call"),
        (REBUILD + b")R", "takes 6 to 7 arguments; it is given 0"),
        (name("torch", "Size") + pack(number(-1)).join([b"(", b"t"]) + b"R", "integers that are not negative"),
        (b"N" + b"q\x00" + b"h\x01", "the memo must be written before it is read"),
        (b"h\x00", "the memo must be written"),
        (b"q\x00", "must find its operands"),
        (b"t", "must find its MARK"),
        (b"\x86", "must find its operands"),
        (b"((" + b"N", "must end with one object"),
        (b"NN", "must end with one object; there are 2"),
        (b"", "must end with one object; there are 0"),
        (b"}(NNu", "a key must be a string or an integer; one is a NoneType"),
        (b"}" + b")" * 1 + b"\x85" * 50 + b"Ns", "a key must be a string or an integer; one is a tuple"),
        (b"}(" + text("a") + b"u", "SETITEMS needs pairs"),
        (b"}" + (text("a") + b"Ns") * 2, "a key may be there only once; 'a' is there twice"),
        (b"](Nu", "SETITEM needs a dict; there is list"),
        (b"}Na", "APPEND needs a list; there is dict"),
        (b"(N(e", "APPEND needs a list; there is NoneType"),
        (b"X\xff\xff\xff\xff", "this one ends in the middle"),
        (b"U\x02\xff\xfe", "a string must be UTF-8"),
        (b"\x8a", "this one ends in the middle"),
        (b"\x8b\xff\xff\xff\x7f", "one is LONG4"),
        (b"c" + b"a" * 400 + b"\n", "a global's name must be a short line"),
        (b"N." + b"more", "4|5"),
        (pack(text("storage")) + b"Q", "a persistent id must be"),
        (text("0") + b"Q", "a persistent id must be"),
        (storage(kind=name("collections", "OrderedDict")), "a storage must have a storage type"),
        (storage(kind=text("FloatStorage")), "a storage must have a storage type"),
        (storage(key=text("../0")), "a storage's key must be a plain name; one is '../0'"),
        (storage(key=number(0)), "a storage's key must be a plain name"),
        (storage(numel=number(-1)), "must have a location and a size"),
        (storage(numel=b"\x88"), "must have a location and a size"),
        (tensor(storage(kind=name("torch.storage", "UntypedStorage"))), "must view a typed storage"),
        (tensor(text("storage")), "must view a typed storage"),
        (tensor(offset=-1), "must have an offset, a size and as many strides"),
        (tensor(strides=(1,)), "must have an offset, a size and as many strides"),
        (tensor(strides=(-3, 1)), "integers that are not negative"),
        (tensor(shape=(2**49, 3)), "integers that are not negative"),
        (tensor(shape=(1,) * 9, strides=(1,) * 9), "up to 8 integers"),
        (tensor(hooks=b"}" + text("a") + b"Ns"), "a tensor must have no hooks"),
        (tensor(more=(b"}" + text("neg") + b"\x88s",)), "a tensor must have no metadata"),
        (call(name("torch._utils", "_rebuild_parameter"), b"}", b"\x88", HOOKS), "a parameter must be a tensor"),
    ],
)
def test_rules_of_the_pickle(body: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_torch_pickle(program(body), "the source")
    assert str(error.value).startswith("the source: ")
    assert "convert the checkpoint to safetensors" in str(error.value)


@pytest.mark.full
def test_operations_are_bounded() -> None:
    with pytest.raises(CheckpointError, match="at most 10000000 operations"):
        read_torch_pickle(program(b")" * torch_pickle.MAX_OPERATIONS), "a test")


def test_bytes_are_bounded() -> None:
    with pytest.raises(CheckpointError, match="at most 100000000 bytes; this one has 100000003"):
        read_torch_pickle(program(b"}" * torch_pickle.MAX_PICKLE_BYTES), "a test")


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b")" + b"\x85" * 300_000, id="nested tuples"),
        pytest.param(b"]" * 100_000 + b"a" * 99_999, id="nested lists"),
        # Each list holds the one before it twice: 2^60 leaves in 500 bytes.
        pytest.param(b"(]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b"t", id="shared lists"),
        pytest.param(b"]q\x00h\x00a", id="a list in itself"),
        pytest.param(b"}q\x00" + text("self") + b"h\x00s", id="a dict in itself"),
    ],
)
def test_nesting_and_sharing_cost_nothing(tmp_path: Path, bomb: bytes) -> None:
    # Beside a tensor, in the state dict, where a reader has to ask whether it holds one.
    file = read_torch_file(archive(tmp_path / "a.bin", state_dict(w=tensor(), x=bomb)))
    assert list(file.tensors) == ["w"]
    assert file.skipped == ("x",)


# State dicts.


def test_state_dict_of_our_own(tmp_path: Path) -> None:
    file = read_torch_file(archive(tmp_path / "a.bin", more={"archive/byteorder": b"little"}))
    np.testing.assert_array_equal(load(file.tensors["w"]), count(2, 3))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (program(b"N"), "a checkpoint must be a dict of tensors; this one is a NoneType"),
        (program(tensor()), "a checkpoint must be a dict of tensors; this one is a TensorRef"),
        (program(b"}"), "a checkpoint must hold tensors; this one has none"),
        (state_dict(x=b"}" + text("w") + tensor() + b"s"), "maps names to tensors; 'x' is a dict of them"),
        (state_dict(x=b"]" + tensor() + b"a"), "maps names to tensors; 'x' is a list of them"),
        (state_dict(model=b"}", state_dict=b"}"), "one state dict; there are dicts under state_dict and model"),
        (program(b"}" + number(3) + tensor() + b"s"), "a tensor must have a name; one is 3"),
        (state_dict(**{"": tensor()}), "a tensor must have a name; one is ''"),
        (state_dict(**{"../w": tensor()}), "no '..' path component; one is '../w'"),
        (state_dict(**{"w" * 2000: tensor()}), "a tensor name has at most 1024 bytes"),
        (state_dict(w=tensor(storage(key=text("1")))), "every storage must be in the file; '1' of tensor 'w' is not"),
        (state_dict(w=tensor(storage(numel=number(7)))), "is to have 28 bytes and has 24"),
        (state_dict(w=tensor(storage(numel=number(5)))), "is to have 20 bytes and has 24"),
        (state_dict(w=tensor(storage(kind=name("torch", "DoubleStorage")))), "is to have 48 bytes and has 24"),
        (state_dict(w=tensor(offset=1)), "needs bytes 4 to 28 of storage '0' of 24"),
        (state_dict(w=tensor(shape=(2**40, 3))), "must lie inside its storage"),
        (state_dict(w=tensor(strides=(0, 1))), "must be contiguous, or"),
        (state_dict(w=tensor(strides=(0, 0))), "must be contiguous, or"),
        (state_dict(w=tensor(shape=(2, 2), strides=(2**40, 1))), "must be contiguous, or"),
        (state_dict(w=tensor(strides=(1, 1))), "must be contiguous, or"),
    ],
)
def test_rules_of_the_state_dict(tmp_path: Path, pickled: bytes, message: str) -> None:
    refuse(archive(tmp_path / "a.bin", pickled), message)


def test_sharing_is_bounded(tmp_path: Path) -> None:
    """Each of the tensors is the whole of a storage of 40,000 bytes."""
    whole = tensor(storage(numel=number(10_000)), shape=(100, 100), strides=(100, 1))
    for tensors, refused in ((64, False), (128, True)):
        document = state_dict(**dict.fromkeys([f"w{i}" for i in range(tensors)], whole))
        path = archive(tmp_path / f"{tensors}.bin", document, more={"archive/data/0": bytes(40_000)})
        if refused:
            refuse(path, "may have up to 64 times the bytes of their file; these have 5120000 bytes")
        else:
            assert len(read_torch_file(path).tensors) == tensors


# Archives.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"other/data.pkl": GOOD}, "one top directory; this one has archive, other"),
        ({"loose": b""}, "one top directory; this one has archive, loose"),
        ({"/etc/passwd": b""}, "relative paths without '..'; one is '/etc/passwd'"),
        ({"archive/../x": b""}, "relative paths without '..'"),
        ({"archive\\x": b""}, "relative paths without '..'"),
        ({"archive/byteorder": b"big"}, "stored little-endian; the byteorder is b'big'"),
        ({"archive/byteorder": b"little" * 9}, "byteorder has at most 16 bytes"),
        ({"archive/constants.pkl": b""}, "this is a TorchScript program"),
    ],
)
def test_rules_of_the_archive(tmp_path: Path, more: dict[str, bytes], message: str) -> None:
    refuse(archive(tmp_path / "a.bin", more=more), message)


def test_compressed_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", GOOD)
        file.writestr("archive/data/0", bytes(1_000_000))
    refuse(path, "must be stored, not compressed, because tensors are read by byte range; 'archive/data.pkl'")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_entries(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(zipfile.ZipInfo("archive/data.pkl"), GOOD)
    refuse(path, "'archive/data.pkl' is there twice")


def test_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/version", b"3")
    refuse(path, "'archive' has none")
    with zipfile.ZipFile(path, "w"):
        pass
    refuse(path, "starts with b'PK")


def test_streamed_archive(tmp_path: Path) -> None:
    """A writer that cannot seek puts sizes after the data, as torch does."""

    class Pipe:
        def __init__(self, path: Path) -> None:
            self.file = open(path, "wb")  # noqa: SIM115

        def write(self, data: bytes) -> int:
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    pipe = Pipe(tmp_path / "a.bin")
    with zipfile.ZipFile(pipe, "w") as file:  # type: ignore[arg-type]
        file.writestr("archive/data.pkl", GOOD)
        file.writestr("archive/data/0", count(6).tobytes())
    pipe.file.close()
    np.testing.assert_array_equal(load(read_torch_file(tmp_path / "a.bin").tensors["w"]), count(2, 3))


def test_zip64_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as file:
        for entry, data in {"archive/data.pkl": GOOD, "archive/data/0": count(6).tobytes()}.items():
            with file.open(entry, "w", force_zip64=True) as target:
                target.write(data)
    np.testing.assert_array_equal(load(read_torch_file(path).tensors["w"]), count(2, 3))


def patched(path: Path, *changes: tuple[int, bytes]) -> Path:
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = (DATA / "torch_training.pt").read_bytes()
    path = tmp_path / "a.bin"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_torch_file(path)
    path.write_bytes(data + b"\0")
    refuse(path, "must end with the end record of its directory")
    path.write_bytes(data[:30] + b"\0" + data[30:])
    refuse(path, "must")


@pytest.mark.full
def test_every_changed_byte_is_harmless(tmp_path: Path) -> None:
    """Whatever a byte is changed to, the answer is a `CheckpointError` or tensors inside the file."""
    data = (DATA / "torch_training.pt").read_bytes()
    path = tmp_path / "a.bin"
    changes = np.random.default_rng(0).integers(0, 256, len(data))
    for at, value in enumerate(changes):
        path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        try:
            tensors = read_torch_file(path, allow_permuted=True).tensors
        except CheckpointError:
            continue
        for info in tensors.values():
            assert 0 <= info.offset <= info.offset + info.nbytes <= len(data)
            assert load(info).shape == info.shape


def test_headers_that_disagree(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin")
    good = path.read_bytes()
    local = good.index(b"PK\x03\x04", 30)  # of data/0
    central = good.index(b"PK\x01\x02", good.index(b"PK\x01\x02") + 1)
    for at, value, message in [
        (local + 30, b"archive/data/1", "must agree with the central directory"),
        (local + 22, b"\x17\0\0\0", "must agree with the central directory"),
        (local + 8, b"\x08\0", "must agree with the central directory"),
        (local + 6, b"\x01\0", "must agree with the central directory"),
        (local + 14, b"\x00\0\0\1", "must agree with the central directory"),
        (local, b"PK\x05\x06", "must point to headers"),
        (central + 8, b"\x01\0", "must be plain, not encrypted, patched or split"),
        (central + 10, b"\x0c\0", "must be stored, not compressed"),
        (central + 24, b"\x17\0\0\0", "must be stored, not compressed"),
        (central + 20, b"\x00\1\0\0\x00\1\0\0", "must agree with the central directory"),
        (central + 42, b"\0\0\0\0", "must agree with|must not overlap"),
        (central + 42, b"\xff\xff\xff\x00", "must lie inside the file"),
        (central + 42, b"\xff\xff\xff\xff", "must have a zip64 field"),
        (central, b"PK\x05\x06", "must be a list of entries"),
        (len(good) - 10, b"\xff\xff\0\0", "must end where its end record starts"),
        (len(good) - 12, b"\x02\0", "split|must end with its last entry"),
        (len(good) - 14, b"\x02\0\x02\0", "must end with its last entry"),
        (len(good) - 14, b"\x09\0\x09\0", "must hold all its entries"),
        (len(good) - 14, b"\xff\xff\xff\xff", "zip64"),
        (len(good) - 18, b"\x01\0", "split"),
    ]:
        path.write_bytes(good)
        refuse(patched(path, (at, value)), message)


def test_messages_show_the_start_of_a_long_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.bin", more={"archive/data/1": bytes(3000)})
    local = path.read_bytes().index(b"PK\x03\x04", 30)
    refuse(patched(path, (local + 26, struct.pack("<H", 2000))), "must agree with the central directory")
    path = archive(tmp_path / "b.bin", more={f"archive/{'n' * 60_000}": b""})
    refuse(path, "name has at most 1024 bytes; b'archive/n.* has 60008")


def test_overlapping_entries(tmp_path: Path) -> None:
    """Two directory entries for one range of bytes multiply a file's size."""
    path = archive(tmp_path / "a.bin", more={"archive/data/1": count(6).tobytes()})
    good = path.read_bytes()
    first, second = (good.rindex(b"archive/data/" + key) - 46 for key in (b"0", b"1"))
    refuse(patched(path, (second + 42, good[first + 42 : first + 46])), "must not overlap|must agree")


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data, message in [
        (b"", "this one of 0 bytes"),
        (b"<html>", "starts with b'<html>'; it is a server's answer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (pickle.dumps({"w": 1}), r"rewrite it: torch.save\(torch.load"),
        (b"PK\x03\x04", "the file has 4 bytes"),
    ]:
        path.write_bytes(data)
        refuse(path, message)
    os.mkfifo(tmp_path / "fifo")
    refuse(tmp_path / "fifo", "must be a regular file")
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "missing")
