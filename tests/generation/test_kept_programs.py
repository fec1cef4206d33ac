"""Programs kept whole: found without a trace by whatever could have changed them, and by nothing else."""

import functools
import hashlib
import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import jaxmoe
from jaxmoe import compile_cache
from jaxmoe.generation import kept_programs, program_key
from jaxmoe.generation.program_key import Digests, Unnameable
from jaxmoe.generation.programs import Programs, Shape
from jaxmoe.generation.sampling import Controls, Mode
from jaxmoe.models import Decoder, find_family
from jaxmoe.rotary import RopeConfig
from tests.support.families import FAMILIES
from tests.support.meshes import mesh_of

GREEDY = Mode(greedy=True, truncates=False, penalizes=False)


def reversed_mesh() -> jax.sharding.Mesh:
    return jaxmoe.make_mesh(tp=2, ep=4, devices=jax.devices()[::-1])


@pytest.fixture
def folder(fresh_cache, tmp_path):
    """A cache that is in use."""
    return jaxmoe.enable_compile_cache(tmp_path)


def start(*, mesh=(1, 2, 4), reverse=False, rows=4, vocab_size=11, mode=GREEDY):
    """A sampler, as a process that has nothing in memory gets it."""
    jax.clear_caches()
    compilation_cache.reset_cache()
    programs = Programs(reversed_mesh() if reverse else mesh_of(*mesh))
    shape = Shape(rows=rows, prompt=1, cache=1)
    return programs, programs.sampler(shape, vocab_size, mode)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("jaxmoe_*-cache")}


def test_a_kept_program_is_run_without_a_trace(folder, jax_events) -> None:
    start()
    assert jax_events["jaxpr_trace_duration"] == jax_events["cache_misses"] == 1
    jax_events.clear()
    programs, sample = start()
    assert not jax_events
    logits = np.zeros((4, 11), np.float32)
    logits[range(4), [3, 0, 10, 7]] = 1
    controls = jax.tree.map(programs.put, Controls.of(jaxmoe.SamplingParams()))
    zeros = programs.put(np.zeros(4, np.int32))
    seeds = programs.put(np.zeros((4, 2), np.uint32))
    chosen = sample(programs.put(logits, rows=True), seeds, zeros, programs.put(np.int32(6)), None, controls)
    assert chosen.token.tolist() == [3, 0, 10, 7]
    assert chosen.token.sharding.is_fully_replicated
    assert (chosen.position.tolist(), int(chosen.step), chosen.seen) == ([1] * 4, 7, None)


@pytest.mark.parametrize(
    "other",
    [
        {"vocab_size": 12},
        {"rows": 8},
        {"mode": Mode(greedy=False, truncates=False, penalizes=False)},
        {"mesh": (2, 1, 4)},
        {"reverse": True},
        {"precision": "highest"},
        {"flags": "--xla_cpu_enable_fast_math=false"},
        {"table": "{}"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_changes_a_program_makes_another(folder, jax_events, monkeypatch, tmp_path, other) -> None:
    start()
    jax_events.clear()
    if "flags" in other:
        monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {other['flags']}")
    if "table" in other:
        monkeypatch.setattr(program_key, "data_folder", lambda: tmp_path / "data")
        monkeypatch.setattr(program_key, "__imported__", float("inf"))
        (tmp_path / "data").mkdir()
        (tmp_path / "data/tiles.json").write_text(other["table"])
    with jax.default_matmul_precision(other.get("precision")):
        start(
            **{
                name: value
                for name, value in other.items()
                if name in ("vocab_size", "rows", "mode", "mesh", "reverse")
            }
        )
    assert jax_events["jaxpr_trace_duration"] == 1


def test_other_sources_with_the_same_code_compile_nothing(folder, jax_events, monkeypatch) -> None:
    start()
    before = kept(folder)
    for traces in (1, 0):
        jax_events.clear()
        monkeypatch.setattr(program_key, "_sources", lambda: [("decoder.py", "another digest")])
        start()
        assert jax_events["jaxpr_trace_duration"] == traces
        assert not jax_events["compile_requests_use_cache"]
    assert len(kept(folder) - before) == 1  # a name for the same program


def test_a_program_from_the_cache_of_jax_is_not_kept(folder, jax_events) -> None:
    start()
    for name in kept(folder):
        (folder / name).unlink()
    start()
    assert jax_events["cache_hits"] == 1
    assert not kept(folder)


def test_an_entry_that_is_no_program_is_told_and_replaced(folder, jax_events) -> None:
    start()
    for name in kept(folder):
        compile_cache.write_entry(folder, name.removesuffix("-cache"), zlib.compress(b"no pickle"))
    for path in folder.glob("jit_*"):
        path.unlink()
    jax_events.clear()
    with pytest.warns(UserWarning, match="a compiled program is not kept or found"):
        start()
    assert jax_events["cache_misses"] == 1
    jax_events.clear()
    start()
    assert not jax_events


def test_nothing_is_kept_in_a_folder_of_someone_else(folder, tmp_path, jax_events) -> None:
    folder.chmod(0o770)
    start()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    start()
    assert not kept(folder)
    assert not kept(tmp_path / "chosen")
    assert jax_events["cache_misses"] == 2


def test_sources_that_changed_under_a_process_name_nothing(monkeypatch, tmp_path) -> None:
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(Unnameable, match="a.py has changed since jaxmoe was imported"):
        program_key._files(tmp_path, "*.py")
    monkeypatch.setattr(program_key, "__imported__", float("inf"))
    assert program_key._files(tmp_path, "*.py") == [("a.py", hashlib.sha256(b"a").hexdigest())]


@pytest.mark.parametrize(
    "value",
    [lambda x: x, SimpleNamespace(a=lambda x: x), [kept], functools.partial(kept, "a"), object(), jax.numpy.ones(2)],
    ids=["lambda", "object of lambda", "function of a user", "partial", "object", "array of a device"],
)
def test_code_and_objects_that_no_version_tells_have_no_name(value) -> None:
    with pytest.raises(Unnameable, match="a program depends on"):
        Digests().of(value)


def test_values_that_differ_have_digests_that_differ() -> None:
    rope = RopeConfig(frequencies=(1.0, 0.5))
    values = [
        *(None, 0, 1, 1.0, -0.0, 0.0, True, "1", b"1", "", (), [], {}, set(), (1,), [1], ((1,),), (1, 1), int, float),
        *({"a": 1}, {"b": 1}, {"a": {"b": 1}}, {1, 2}, frozenset({1, 2}), ("a", "b"), ("a\0b",), ("ab",), "a\0b"),
        *(np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.ones(2), np.float32(1), np.dtype("int8")),
        *(rope, RopeConfig(frequencies=(1.0, 0.25)), vars(rope), jax.nn.silu, jax.nn.gelu, Path("a")),
        *(functools.partial(jax.nn.gelu, approximate=True), jax.tree.structure((1,)), jax.tree.structure([1])),
        *(jax.tree.structure(None), jax.tree.structure(1), jax.P("ep"), jax.P("tp"), jax.P(None), nnx.Param),
        *(mesh_of(1, 2, 4), mesh_of(1, 4, 2), reversed_mesh(), GREEDY),
    ]
    digests = Digests()
    found = [digests.of(value) for value in values]
    assert len({*found}) == len(values)
    assert found == [Digests().of(value) for value in values]


def test_digests_are_the_same_in_every_process() -> None:
    value = "[{'a', 'b', 'c', 'd'}, {'x': 1.5}, jax.nn.silu, (None, b'1')]"
    code = f"import jax\nfrom jaxmoe.generation.program_key import Digests\nprint(Digests().of({value}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [Digests().of(eval(value))], done.stderr  # its own sets are in another order


@pytest.mark.full
def test_models_of_every_family_have_a_name() -> None:
    mesh, names = mesh_of(1, 2, 4), set()
    for model_type, config in FAMILIES.items():
        family, text_config = find_family({"model_type": model_type, **config})
        graphdef, state = Decoder(family.read(text_config)[1], mesh=mesh).split_network()
        names.add(Digests().of([graphdef, jax.tree.structure(state)]))
    assert len(names) == len(FAMILIES)


def test_models_that_differ_in_a_setting_alone_have_programs_of_their_own(monkeypatch) -> None:
    names = []

    def name(mesh, function, args, *, holds, digests, **options):
        names.append(kept_programs._name(mesh, function, args, holds, options, digests))
        return kept_programs.Program(None, None)

    monkeypatch.setattr("jaxmoe.generation.programs.compile_program", name)
    for choices in (2, 3, 2):
        config = {**FAMILIES["mixtral"], "model_type": "mixtral", "num_experts_per_tok": choices}
        family, text_config = find_family(config)
        model = Decoder(family.read(text_config)[1], mesh=mesh_of(1, 2, 4))
        programs = Programs(model.mesh)
        programs.init_cache(programs.bind(model), Shape(rows=4, prompt=8, cache=16))
    assert names[0] == names[2] != names[1]
    assert names[0].startswith("jaxmoe_init-")


def test_a_model_is_found_wherever_its_checkpoint_is() -> None:
    family, config = find_family({"model_type": "mixtral", **FAMILIES["mixtral"]})
    model = Decoder(family.read(config)[1], mesh=mesh_of(1, 2, 4))
    before = model.split_network()[0]
    model.origin = jaxmoe.models.Origin(path=Path("elsewhere"))
    assert model.split_network()[0] == before
    assert model.source == Path("elsewhere")
