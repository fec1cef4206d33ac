"""Every mesh of so many devices is tried, and the fastest of those that fit comes first."""

import dataclasses
import json
import re

import pytest

from jaxmoe.cli import main
from jaxmoe.hardware import GPUS
from jaxmoe.planning import plan, search_meshes, sweep
from jaxmoe.planning.memory import CACHE
from tests.support.published import QWEN3_30B


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen")
    (path / "config.json").write_text(json.dumps(QWEN3_30B | {"num_hidden_layers": 4, "torch_dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def found(qwen):
    return search_meshes(qwen, 8, device="h100", batch_size=64, max_length=4096)


def test_all_of_them_are_tried_once(found) -> None:
    layouts = [(*choice.mesh.values(), choice.expert_axes) for choice in (*found.choices, *found.too_large)]
    assert len(set(layouts)) == len(layouts) == 22
    assert {sizes[0] * sizes[1] * sizes[2] for sizes in layouts} == {8}
    assert not found.left_out


def test_memory_is_that_of_the_plan_and_time_decides(found, qwen) -> None:
    for choice in found.choices[::5]:
        planned = plan(qwen, **choice.mesh, expert_axes=choice.expert_axes, batch_size=64, max_length=4096)
        assert choice.bytes_per_device == max(planned.bytes_per_device.values())
        # A step reads all that the cache has room for, and the scores.
        read = choice.decode.cache * GPUS["h100"].memory_bandwidth
        assert 1 <= read / planned.parts[CACHE].max() < 1.25
    times = [choice.decode.seconds for choice in found.choices]
    assert times == sorted(times)
    by_prefill = search_meshes(qwen, 8, device="h100", batch_size=64, max_length=4096, rank_by="prefill")
    prefills = [choice.prefill.seconds for choice in by_prefill.choices]
    assert prefills == sorted(prefills)
    # A copy of the model on each device reads all experts for every token.
    slowest = [choice for choice in found.choices if choice.mesh["dp"] == 8 and choice.expert_axes == ("ep",)]
    assert slowest[0].decode.seconds > 1.5 * times[0]


def test_it_explains_the_first(found) -> None:
    first, parts, next_one = found.explain()
    assert str(found.choices[0]) in first
    assert re.search(r"experts \d+%", parts)
    assert str(found.choices[1]) in next_one
    twins = dataclasses.replace(found, choices=(found.choices[0], found.choices[0]))
    assert twins.explain()[2].endswith("takes as long by the model")


def test_what_does_not_fit_is_dropped_and_what_does_not_divide_is_named(qwen, tmp_path) -> None:
    small = search_meshes(qwen, 2, device="a100-40gb", batch_size=4096, max_length=8192)
    assert not small.choices
    [line] = small.explain()
    assert "nothing fits in the 42.3 GB of a a100-40gb" in line
    assert small.too_large[0].bytes_per_device == min(choice.bytes_per_device for choice in small.too_large)
    config = QWEN3_30B | {"num_hidden_layers": 1, "num_attention_heads": 20, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    uneven = search_meshes(tmp_path, 8, device="h100")
    assert any("tp=8 does not divide" in reason for reason in uneven.left_out.values())
    assert all(choice.mesh["tp"] < 8 for choice in uneven.choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_by": "both"}, 'rank_by is "decode" or "prefill"'),
        ({"skew": 0.5}, "at least 1; got 0.5"),
        ({"dispatch": "carrier pigeon"}, "dispatch backends are auto"),
        ({"prompt_length": 5000, "max_length": 4096}, r"prompt_length is at most max_length \(4096\)"),
        ({"quantized": "yes"}, '"keep" or "dequantize"'),
        ({"dtype": "float8"}, "dtype is one of"),
        ({"max_length": 10**6}, "the model has 40960 positions"),
    ],
    ids=str,
)
def test_nonsense_is_refused(qwen, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        search_meshes(qwen, 8, device="h100", **options)


def test_a_sweep_refuses_nonsense_too(qwen) -> None:
    with pytest.raises(ValueError, match='"keep" or "dequantize"'):
        sweep(qwen, device="h100", batch_sizes=[1], lengths=[8], quantized="yes")


def test_a_sweep_says_where_the_room_ends(qwen) -> None:
    points = sweep(qwen, ep=8, device="h100", batch_sizes=[1, 4096], lengths=[1024, 40960])
    assert [(point.batch_size, point.length) for point in points] == [
        (1, 1024),
        (1, 40960),
        (4096, 1024),
        (4096, 40960),
    ]
    assert [point.fits for point in points] == [True, True, True, False]
    for point in points[:3]:
        planned = plan(qwen, ep=8, device="h100", batch_size=point.batch_size, max_length=point.length)
        assert point.bytes_per_device == max(planned.bytes_per_device.values())
        assert planned.largest_batch >= point.batch_size
        assert planned.largest_length >= point.length


@pytest.mark.parametrize("mesh", [{"ep": 8}, {"dp": 2, "tp": 2, "ep": 2}], ids=str)
def test_one_more_than_the_largest_does_not_fit(qwen, mesh) -> None:
    base = plan(qwen, **mesh, device="h100", batch_size=2048, max_length=4096)
    n = mesh.get("dp", 1) * mesh.get("ep", 1)
    for batch_size, fits in ((base.largest_batch, True), (base.largest_batch + n, False)):
        assert plan(qwen, **mesh, device="h100", batch_size=batch_size, max_length=4096).fits is fits
    for length, fits in ((base.largest_length, True), (base.largest_length + 1, False)):
        assert plan(qwen, **mesh, device="h100", batch_size=2048, max_length=length).fits is fits


def test_the_command(qwen, capsys, tmp_path) -> None:
    page = tmp_path / "plan.html"
    options = ["--device", "h100", "--batch-size", "64", "--max-length", "4096"]
    assert main(["plan", str(qwen), "--devices", "8", *options, "--sweep", "batch,context", "--html", str(page)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Of the layouts 22 fit." in out
    assert "there is room for" in out
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "Every mesh of 8 devices" in text
    assert "<summary>10 more</summary>" in text, "the table shows 12 of 22 meshes at once"
    assert main(["plan", "nowhere", "--html", str(tmp_path / "absent" / "plan.html")]) == 1
    assert "the directory of --html" in capsys.readouterr().err, "before anything else, which may take an hour"
    assert not re.search(r'(src|href)="https?:', text), "the page needs another file"
    assert main(["plan", str(qwen), "--devices", "8", *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["search"]["choices"][0]["mesh"] == report["mesh"]
    for wrong, message in (
        (["--devices", "8"], "name it with --device"),
        (["--devices", "8", "--device", "h100", "--expert-axes", "ep,tp"], "tries every way of sharing"),
        (["--device", "h100", "--sweep", "colors"], "goes over batch, context or both; got colors"),
    ):
        assert main(["plan", str(qwen), *wrong]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", str(qwen), "--devices", "8", "--mesh", "ep=8"])
