"""Programs that are compiled before the weights are here are those that run with them."""

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxmoe
from jaxmoe.cli import main
from jaxmoe.generation import ContinuousEngine, Request
from jaxmoe.planning import warm as warming
from tests.support.meshes import mesh_of

DEMO = Path(__file__).resolve().parent.parent.parent / "demo"


@pytest.fixture
def cache(tmp_path):
    """JAX's cache in a folder of its own; its programs by name."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in zip(names, (str(tmp_path / "cache"), True, 0.0), strict=True):
        jax.config.update(name, value)
    yield lambda: sorted(path.name for path in (tmp_path / "cache").glob("*-cache"))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.full
def test_a_loaded_model_finds_every_program(cache, capsys) -> None:
    argv = ["warm", str(DEMO), "--mesh", "dp=2,tp=2,ep=2", "--num-slots", "8", "--max-length", "32"]
    assert main([*argv, "--batch-size", "2", "--prompt-length", "3", "--max-new-tokens", "4"]) == 0
    warmed = cache()
    assert len(warmed) > 10
    said = capsys.readouterr().err
    assert "prefill of" in said
    assert "samplers" in said

    jax.clear_caches()
    model = jaxmoe.load(DEMO, mesh=mesh_of(2, 2, 2), progress=False)
    engine = ContinuousEngine(model, num_slots=8, max_length=32, balancer=jaxmoe.Balancer())
    for length in (2, 20):
        engine.submit(Request(token_ids=[3] * length, max_new_tokens=4))
    while engine.has_work:
        engine.step()
    jaxmoe.generate(model, [[1, 2, 3], [4]], max_new_tokens=4)
    programs = [
        name
        for name in cache()
        if name.startswith(("jit_prefill", "jit_decode", "jit_sample", "jit_init", "jit_empty"))
    ]
    assert programs
    assert [name for name in programs if name not in warmed] == []


def test_sizes_are_checked() -> None:
    model = warming.abstract_checkpoint_model(DEMO, mesh_of(2, 2, 2))
    with pytest.raises(ValueError, match="max_new_tokens is an integer from 1 to"):
        next(warming.warm_batch(model, batch_size=1, prompt_length=3, max_new_tokens=10**6))
    with pytest.raises(ValueError, match="max_length"):
        next(warming.warm_engine(model, max_length=10**6))
    with pytest.raises(ValueError, match="quantized is one of keep, dequantize; got 'no'"):
        warming.abstract_checkpoint_model(DEMO, mesh_of(2, 2, 2), quantized="no")


def test_pages_are_those_that_fit_beside_weights_to_come(monkeypatch) -> None:
    """A few bytes more or less that are free make no other programs."""
    from jaxmoe.generation.continuous import plan_sizes, room

    model = warming.abstract_checkpoint_model(DEMO, mesh_of(2, 2, 2))
    options = {"num_slots": 4000, "page_size": 16, "num_pages": None, "prefill_chunk": 64, "max_length": 512}

    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_limit": 20_000_000, "bytes_in_use": self.used}

    pages = {}
    for used in (0, 20_000, 2_000_000, 5_000_000):
        monkeypatch.setattr(type(model.mesh), "local_devices", property(lambda _, used=used: [Device(used)]))
        pages[used] = plan_sizes(model, **options)[0].pages
    assert pages[0] == pages[20_000] > pages[2_000_000] > pages[5_000_000] > 100
    assert [room._coarse(number) for number in (-1, 0, 5, 63, 64, 1000, 1023)] == [-1, 0, 5, 63, 64, 992, 1008]
