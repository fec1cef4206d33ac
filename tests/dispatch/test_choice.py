"""Names, and the choice from static shapes."""

import dataclasses

import pytest

from jaxmoe.dispatch import DISPATCHES, DispatchLayout, DispatchShape, dispatch_cost, explain_dispatch, get_dispatch
from jaxmoe.dispatch.choose import RATES
from jaxmoe.dispatch.rates import rates_file, write_rates
from jaxmoe.hardware import Device, Links


def layout_of(tp: int, ep: int, expert_axes: tuple[str, ...] = ("ep",)) -> DispatchLayout:
    return DispatchLayout(
        mesh_shape=(("dp", 1), ("tp", tp), ("ep", ep)),
        expert_axes=expert_axes,
        partial_axes=() if "tp" in expert_axes else ("tp",),
        num_slots=64,
    )


def shape_of(tokens: int, choices: int, layout: DispatchLayout, width: int = 4096) -> DispatchShape:
    """A call in bfloat16."""
    return DispatchShape(tokens=tokens, choices=choices, width=width, itemsize=2, layout=layout)


def test_names():
    for name in DISPATCHES:
        assert get_dispatch(name, "gpu").name == name
    with pytest.raises(ValueError, match=r"dispatch backends are auto, replicated, all_gather, .*; got 'alltoall'"):
        get_dispatch("alltoall", "cpu")


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_a_backend_for_gpus_is_refused_elsewhere_and_never_chosen(platform):
    with pytest.raises(
        NotImplementedError, match=r"'ragged_all_to_all' cannot run on cpu: XLA has no .*all_to_all runs"
    ):
        get_dispatch("ragged_all_to_all", "cpu")
    for T in (1, 64, 4096, 2**20):
        for layout in (layout_of(1, 8), layout_of(2, 4), layout_of(8, 1), layout_of(2, 4, ("ep", "tp"))):
            assert explain_dispatch(shape_of(T, 2, layout), platform).name != "ragged_all_to_all"


def test_a_backend_is_refused_where_xla_breaks(monkeypatch):
    wide = layout_of(1, 64)
    with pytest.raises(
        NotImplementedError, match=r"cannot run on this mesh: .* 32 ranks, .* with 64, here along ep: use 'all"
    ):
        get_dispatch("ragged_all_to_all", "gpu", wide)
    over_both = layout_of(8, 8, ("ep", "tp"))
    with pytest.raises(
        NotImplementedError, match=r"with 64, here along ep and tp: .* or expert_axes of at most 32 devices"
    ):
        get_dispatch("ragged_all_to_all", "gpu", over_both)
    assert "writes beyond it" in explain_dispatch(shape_of(4096, 2, wide), "gpu").left_out["ragged_all_to_all"]
    # As many ranks as its barrier has room for, however many devices there are.
    for layout in (layout_of(1, 32), layout_of(8, 32)):
        assert get_dispatch("ragged_all_to_all", "gpu", layout, processes=4).name == "ragged_all_to_all"
    flag = "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel"
    for flags, breaks in (
        (flag, True),
        (f"{flag}=true --other", True),
        (f"{flag}=true {flag}=false", False),
        ("--a=1", False),
    ):
        monkeypatch.setenv("XLA_FLAGS", flags)
        assert get_dispatch("ragged_all_to_all", "gpu", layout_of(1, 8))
        choice = explain_dispatch(shape_of(4096, 2, layout_of(1, 8)), "gpu", processes=2)
        assert ("crashes" in choice.left_out["ragged_all_to_all"]) == breaks
        if breaks:
            with pytest.raises(
                NotImplementedError, match=f"{flag} asks for crashes in a run of several processes, here 2"
            ):
                get_dispatch("ragged_all_to_all", "gpu", layout_of(1, 8), processes=2)
        else:
            assert get_dispatch("ragged_all_to_all", "gpu", layout_of(1, 8), processes=2)
    assert get_dispatch("all_to_all", "gpu", wide, processes=8).name == "all_to_all"


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("layout", [layout_of(1, 8), layout_of(2, 4), layout_of(2, 4, ("ep", "tp"))])
def test_few_tokens_are_replicated_and_many_exchanged(platform, layout):
    assert explain_dispatch(shape_of(1, 8, layout), platform).name == "replicated"
    assert explain_dispatch(shape_of(2**18, 1, layout), platform).name == "all_to_all"


def test_nothing_is_exchanged_where_one_device_holds_every_expert():
    assert explain_dispatch(shape_of(16384, 2, layout_of(1, 1)), "gpu").name == "replicated"


@pytest.mark.parametrize("T", [1, 8, 64, 512, 4096, 32768])
def test_choice_is_the_least_modeled_time_and_says_so(T):
    shape = shape_of(T, 8, layout_of(2, 4), width=2048)
    choice = explain_dispatch(shape, "gpu")
    assert choice.seconds == {
        name: dispatch_cost(backend, shape).seconds(RATES["gpu"])
        for name, backend in DISPATCHES.items()
        if backend.auto
    }
    assert choice.name == min(choice.seconds, key=choice.seconds.get)
    assert str(choice).startswith(
        f"{choice.name} for {T} tokens, by time modeled for gpu: {choice.name} {choice.seconds[choice.name] * 1e6:.0f} µs"
    )
    assert str(choice).endswith("ragged_all_to_all left out: used only where it is named")


def test_rows_in_eight_bits_make_an_exchange_cheaper():
    layout = layout_of(1, 8)
    plain, rounded = (
        dispatch_cost(DISPATCHES["all_to_all"], shape_of(4096, 2, dataclasses.replace(layout, wire_dtype=wire_dtype)))
        for wire_dtype in (None, "float8_e4m3fn")
    )
    assert rounded.wire_bytes == pytest.approx(0.75 * plain.wire_bytes, rel=0.01)


def test_measured_rates_replace_published_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    shape, kind = shape_of(64, 8, layout_of(1, 8)), "a GPU"
    published = explain_dispatch(shape, "gpu", kind)
    assert published == explain_dispatch(shape, "gpu")
    links = Links(within=1e9, between=1e9, latency=1.0)
    file = write_rates(kind, 8, memory_bandwidth=1e12, links=links, machine={"versions": {"jax": "0"}})
    choice = explain_dispatch(shape, "gpu", kind)
    assert ", by rates measured here: " in str(choice)
    device = Device(name="", memory_bandwidth=1e12, links=links)
    assert choice.seconds == {
        name: dispatch_cost(DISPATCHES[name], shape).seconds(device) for name in published.seconds
    }
    assert explain_dispatch(shape, "gpu", "another") == published
    assert explain_dispatch(shape_of(64, 8, layout_of(2, 8)), "gpu", kind).measured is False
    file.rename(rates_file("another", 8))
    write_rates("a third", 8, memory_bandwidth=1e12, links=links, machine={})  # another write: files are read anew
    with pytest.raises(
        ValueError, match="it was measured on 8 of 'a GPU'.*measure them again with scripts/gpu_session --gpus 8"
    ):
        explain_dispatch(shape, "gpu", "another")
