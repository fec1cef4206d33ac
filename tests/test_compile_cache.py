"""The compile cache: JAX's own, in a folder that is safe to use, which never stops a run."""

import argparse
import os
import shutil
import stat
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxmoe
from jaxmoe import compile_cache
from jaxmoe.cli import main, options

DEMO = Path(__file__).resolve().parent.parent / "demo"


def compile_once(number: int) -> float:
    """Compile a program that no other test has, and run it."""
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) * number + 1)(np.float32(0)))


def test_programs_come_from_the_cache_the_next_time(fresh_cache, jax_events) -> None:
    folder = jaxmoe.enable_compile_cache()
    assert folder.parent == Path(os.environ["XDG_CACHE_HOME"]) / "jaxmoe" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert compile_once(101) == 1
    assert jax_events["cache_hits"] == 0
    assert jax_events["cache_misses"] > 0
    missed = jax_events["cache_misses"]
    compilation_cache.reset_cache()  # as in another process
    assert compile_once(101) == 1
    assert jax_events["cache_hits"] == missed == jax_events["cache_misses"]


def test_a_cache_that_was_chosen_stays(fresh_cache, tmp_path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert jaxmoe.enable_compile_cache(tmp_path / "other") == tmp_path / "own"
    assert jax.config.jax_compilation_cache_max_size == -1
    jax.config.update("jax_enable_compilation_cache", False)
    assert jaxmoe.enable_compile_cache(tmp_path / "other") is None
    assert not (tmp_path / "other").exists()


def test_size_is_bounded(fresh_cache, tmp_path) -> None:
    folder = jaxmoe.enable_compile_cache(tmp_path, max_bytes=20_000)
    for number in range(201, 216):
        compile_once(number)
    sizes = [path.stat().st_size for path in folder.glob("*-cache")]
    assert len(sizes) > 1
    assert sum(sizes) <= 20_000
    with pytest.raises(ValueError, match="max_bytes is an integer of at least 1; got 0"):
        jaxmoe.enable_compile_cache(tmp_path / "other", max_bytes=0)


def test_halves_of_entries_are_removed_unless_one_is_being_written(fresh_cache, tmp_path) -> None:
    folder = jaxmoe.enable_compile_cache(tmp_path)
    for name in ("half-cache", "whole-cache", "whole-atime"):
        (folder / name).write_bytes(b"12345678")
    with filelock.FileLock(folder / ".lockfile"):
        compile_cache._prepare(folder)
        assert (folder / "half-cache").exists()
    compile_cache._prepare(folder)
    assert {path.name for path in folder.iterdir()} - {".lockfile"} == {"whole-cache", "whole-atime"}


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(fresh_cache, tmp_path, mode: int) -> None:
    folder = jaxmoe.enable_compile_cache(tmp_path)
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(mode)
    with pytest.raises(jaxmoe.CompileCacheError, match="others may write to it, and what is in it would be run; chmod"):
        jaxmoe.enable_compile_cache(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_of_another_user_is_not_used(fresh_cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(jaxmoe.CompileCacheError, match="belongs to another user"):
        jaxmoe.enable_compile_cache(tmp_path)


def test_a_full_disk_is_told(fresh_cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(jaxmoe.CompileCacheError, match="has 1 MiB left, and a cache gets none below 256"):
        jaxmoe.enable_compile_cache(tmp_path)


def test_machines_that_share_a_home_have_folders_of_their_own(fresh_cache, monkeypatch) -> None:
    hosts = [compile_cache._host()]
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    for flags in ("sse2", "sse2 avx512f"):
        # The clock is another at every start.
        for megahertz in (2100, 2200):
            text = f"processor : 0\nmodel name : A\ncpu MHz : {megahertz}\nflags : {flags}\n\nprocessor : 1\n"
            monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
            hosts.append(compile_cache._host())
    assert hosts[1] == hosts[2] != hosts[3] == hosts[4]
    assert hosts[0] not in hosts[1:]


def test_a_cache_that_breaks_while_it_is_used_stops_nothing(fresh_cache, tmp_path) -> None:
    folder = jaxmoe.enable_compile_cache(tmp_path)
    shutil.rmtree(folder)
    folder.write_text("no folder")
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        assert compile_once(301) == 1


def test_the_command_goes_on_without_a_default_that_cannot_be_used(fresh_cache, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    options.use_compile_cache(argparse.Namespace(compile_cache=None))
    assert capsys.readouterr().err.startswith(f"compiled programs are not kept: {tmp_path}/file/jaxmoe/compiled/")
    with pytest.raises(jaxmoe.CompileCacheError, match="cannot be made: Not a directory"):
        options.use_compile_cache(argparse.Namespace(compile_cache=str(tmp_path / "file")))
    options.use_compile_cache(argparse.Namespace(compile_cache="none"))
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.full
def test_the_second_start_of_a_model_traces_and_compiles_nothing(fresh_cache, jax_events, capsys) -> None:
    argv = ["generate", str(DEMO), "--mesh", "dp=2,tp=2,ep=2", "--prompt-ids", "1,2", "--max-new-tokens", "2"]
    texts = []
    for _ in range(2):
        jax.clear_caches()
        compilation_cache.reset_cache()
        jax_events.clear()
        assert main(argv) == 0
        texts.append(capsys.readouterr().out)
        if len(texts) == 1:
            assert jax_events["cache_misses"] >= 4  # the cache, prefill, decode, and the sampler
    assert not jax_events
    assert texts[0] == texts[1]


def test_entries_of_our_own_keep_to_the_limit(fresh_cache, tmp_path) -> None:
    folder = jaxmoe.enable_compile_cache(tmp_path, max_bytes=1000)
    for number in range(4):
        compile_cache.write_entry(folder, f"e{number}", bytes([number]) * 400)
        compile_cache.read_entry(folder, "e0")  # used, and so not the oldest
    assert sorted(path.name for path in folder.glob("*-cache")) == ["e0-cache", "e3-cache"]
    assert compile_cache.read_entry(folder, "e3") == bytes([3]) * 400
    compile_cache.write_entry(folder, "large", bytes(1001))
    assert compile_cache.read_entry(folder, "large") is None
    (folder / "e3-cache").write_bytes((folder / "e3-cache").read_bytes()[:-1])
    assert compile_cache.read_entry(folder, "e3") is None


def test_a_folder_of_our_own_is_known_by_its_name_and_its_mode(fresh_cache, tmp_path) -> None:
    assert compile_cache.own_folder() is None
    folder = jaxmoe.enable_compile_cache(tmp_path)
    assert compile_cache.own_folder() == folder
    folder.chmod(0o770)
    assert compile_cache.own_folder() is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compile_cache.own_folder() is None
