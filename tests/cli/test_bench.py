"""`jaxmoe bench dispatch`: the table, its JSON and what is refused."""

import json

import pytest

from jaxmoe.cli import main
from jaxmoe.dispatch import DISPATCHES


def rows(capsys, *options: str) -> list[dict]:
    assert main(["bench", "dispatch", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_row_for_every_model_mesh_number_of_tokens_and_backend(capsys):
    found = rows(capsys)
    assert len(found) == 6 * 4 * 4 * len(DISPATCHES)
    for i in range(0, len(found), len(DISPATCHES)):
        compared = found[i : i + len(DISPATCHES)]
        assert [row["dispatch"] for row in compared] == list(DISPATCHES)
        (chosen,) = (row for row in compared if row["auto"])
        able = [row["modelled_seconds"] for row in compared if DISPATCHES[row["dispatch"]].auto]
        assert chosen["modelled_seconds"] == min(able)


def test_bytes_of_one_shape(capsys):
    """Two experts a token, each on one of eight devices: two rows there and two back, seven eighths of them elsewhere."""
    options = ("--model", "mixtral-8x7b", "--mesh", "ep=8", "--tokens", "4096")
    by_name = {row["dispatch"]: row for row in rows(capsys, *options)}
    assert by_name["all_to_all"]["payload_bytes"] == 2 * 512 * 2 * 7 // 8 * 4096 * 2
    assert by_name["ragged_all_to_all"]["payload_bytes"] == by_name["all_to_all"]["payload_bytes"]
    assert by_name["all_gather"]["payload_bytes"] == 7 * 512 * 4096 * (2 + 4)
    assert by_name["all_to_all"]["padding_bytes"] > 0 == by_name["all_gather"]["padding_bytes"]
    (rounded,) = (
        row for row in rows(capsys, *options, "--wire-dtype", "float8_e4m3fn") if row["dispatch"] == "all_to_all"
    )
    assert rounded["payload_bytes"] == by_name["all_to_all"]["payload_bytes"] * 3 // 4


def test_the_table_names_what_auto_chooses(capsys):
    options = ["--model", "qwen3-30b-a3b", "--mesh", "tp=2,ep=4", "--tokens", "1", "--expert-axes", "ep,tp"]
    assert main(["bench", "dispatch", *options, "--platform", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "replicated" in out
    assert "*" in out
    assert "ragged" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--expert-axes", "tp"], "expert_axes is"), (["--wire-dtype", "int8"], "got wire_dtype='int8'")],
)
def test_what_is_refused(capsys, options, message):
    assert main(["bench", "dispatch", *options]) == 1
    assert message in capsys.readouterr().err
