"""The examples in docstrings are true, all of them: every module of the package is run through doctest."""

import ast
import doctest
import importlib
import re
from functools import cache
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "jaxmoe").rglob("*.py"))
}
PROMPT = re.compile(r"^\s*>>> ", re.MULTILINE)
WITH_EXAMPLES = [name for name, path in MODULES.items() if PROMPT.search(path.read_text(encoding="utf-8"))]
# The folders that examples read, by their paths from the root.
FOLDERS = ("demo", "docs", "tests")


@cache
def demo_model() -> jaxmoe.Decoder:
    return jaxmoe.load("demo", mesh=jaxmoe.make_mesh(tp=2, ep=4), dtype="float32")


def prepared(source: str) -> dict[str, object]:
    """The names that an example takes for given, beside those of its module."""
    names = {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "jaxmoe": jaxmoe, "Path": Path}
    names |= {"prompts": ["def is_valid(name):"], "token_ids": [[5, 6, 7]]}
    return names | ({"model": demo_model()} if re.search(r"\bmodel\b", source) else {})


def docstrings(path: Path) -> list[tuple[str, str]]:
    """(name, text) of a file's docstrings; doctest's own finder passes over cached properties in Python 3.11."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    return [(getattr(node, "name", path.name), ast.get_docstring(node) or "") for node in nodes]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that has what examples read, and takes what they write."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


# Examples that run a model, which takes seconds.
COSTLY = {
    "jaxmoe.batches.api",
    "jaxmoe.models.decoder",
    "jaxmoe.generation.api",
    "jaxmoe.generation.continuous.engine",
    "jaxmoe.generation.engine",
    "jaxmoe.generation.streaming",
    "jaxmoe.elastic.rebalance",
    "jaxmoe.checkpoint.loading.load",
    "jaxmoe.layers.logical",
}
CASES = [pytest.param(name, marks=pytest.mark.full) if name in COSTLY else name for name in WITH_EXAMPLES]


@pytest.mark.parametrize("name", CASES)
def test_examples(name, folder) -> None:
    if name == "jaxmoe.distributed":
        pytest.skip("its example starts several processes, and so does tests/distributed")
    if name == "jaxmoe.planning.topology":
        try:
            jaxmoe.gpu_topology("h100", 1)
        except NotImplementedError as error:
            pytest.skip(f"its example is for tests/aot: {error}")
    module = importlib.import_module(name)
    attempted, said = 0, []
    for owner, text in docstrings(MODULES[name]):
        names = prepared(text) | vars(module)
        test = doctest.DocTestParser().get_doctest(text, names, owner, str(MODULES[name]), 0)
        attempted += doctest.DocTestRunner().run(test, out=said.append).attempted
    assert not said, "".join(said)
    assert attempted


def test_no_example_is_left_out() -> None:
    assert [name for name in WITH_EXAMPLES if "doctest: +SKIP" in MODULES[name].read_text(encoding="utf-8")] == []
