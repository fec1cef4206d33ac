"""Docstrings say what things are, arguments begin with their noun, and the spelling is that of NumPy, JAX and Flax."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxmoe"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/**/*.md"),
    ]
)

QUESTION = re.compile(r"^(What|How|Which|Who|Whose|Where|When|Why)\b[^?]*$")
SECTIONS = ("Args", "Attributes")
# Words that an argument's line cannot begin with, for the noun is missing.
HEADLESS = re.compile(
    r"^(of|from|in|to|by|as|for|with|over|at|on|how|what|which|who|where|see|is|has|called|given)\b", re.I
)
BRITISH = re.compile(
    r"""\b(?:
    \w*(?:quantis|normalis|initialis|serialis|organis|recognis|optimis|summaris|parallelis(?!m)|materialis|generalis)\w*
    | (?:behaviour|colour|neighbour|favour)\w* | centre[sd]? | programmes? | artefact\w* | catalogue\w* | learnt | grey
    | \w*(?:travelled|travelling|cancelled|cancelling|labelled|labelling|modelled|modelling|signalled|signalling)
    )\b""",
    re.I | re.X,
)


def docstrings() -> Iterator[tuple[str, str]]:
    """(where, text) of every docstring of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'the file')}", text


def argument_lines(docstring: str) -> Iterator[str]:
    """The first line of every argument and attribute."""
    inside = ""
    for line in docstring.splitlines():
        if match := re.fullmatch(r"(\w+):", line):
            inside = match[1]
        elif inside in SECTIONS and (match := re.fullmatch(r"    \*{0,2}\w+(?:, \w+)*: (.*)", line)):
            yield match[1]


def test_first_lines_say_what_a_thing_is_or_does() -> None:
    assert not [f"{where}: {line}" for where, text in docstrings() if QUESTION.match(line := text.partition("\n")[0])]


def test_lines_of_arguments_begin_with_their_noun() -> None:
    assert not [
        f"{where}: {line}" for where, text in docstrings() for line in argument_lines(text) if HEADLESS.match(line)
    ]


@pytest.mark.parametrize("folder", ["jaxmoe", "scripts", "tests", "pages"])
def test_spelling_is_american(folder: str) -> None:
    files = PAGES if folder == "pages" else sorted((ROOT / folder).rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in files
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in BRITISH.finditer(line)
    ]
    assert not found


def test_the_rules_find_what_breaks_them() -> None:
    for rule, broken, kept in (
        (QUESTION, "What it is.", "What is it?"),
        (HEADLESS, "of the layer", "offset of the layer"),
        (BRITISH, "a normalised colour", "a normalized color, modeled for parallelism"),
    ):
        assert rule.search(broken)
        assert not rule.search(kept)
    assert [*argument_lines("Do.\n\nArgs:\n    x: of it.\n        more: y\n\nReturns:\n    z: of it.")] == ["of it."]
