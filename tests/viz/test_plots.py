"""One body over every plot: it draws, onto given axes too, and says what it shows. Then what each one draws."""

import importlib
import sys

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.image import AxesImage  # noqa: E402

from jaxmoe import viz  # noqa: E402
from jaxmoe.placement import ExpertPlacement  # noqa: E402
from jaxmoe.placement.coactivation import coactivation  # noqa: E402
from jaxmoe.placement.synthetic import synthetic_trace  # noqa: E402
from jaxmoe.placement.traffic import route_trace  # noqa: E402

TRACE = synthetic_trace(num_experts=12, experts_per_token=2, num_layers=3, num_windows=4, tokens_per_window=64)
LINEAR = [ExpertPlacement.linear(12, 4)] * 3
EPLB = ExpertPlacement.from_counts(TRACE.total_counts, ep=4, num_slots=16)
BEFORE, AFTER = (route_trace(TRACE, placements, num_nodes=2) for placements in (LINEAR, EPLB))
PAIRS = coactivation(TRACE.expert_ids[:, 0], 12)

PLOTS = {
    "heatmap": lambda ax: viz.expert_heatmap(TRACE.total_counts, ax=ax),
    "heatmap_sorted": lambda ax: viz.expert_heatmap(TRACE.total_counts, sort=True, ax=ax),
    "loads": lambda ax: viz.device_loads({"linear": BEFORE.rows, "eplb": AFTER.rows}, ax=ax),
    "ownership": lambda ax: viz.ownership_map(EPLB[0], num_nodes=2, ax=ax),
    "ownership_padded": lambda ax: viz.ownership_map(ExpertPlacement.linear(10, 4), ax=ax),
    "ownership_many": lambda ax: viz.ownership_map(ExpertPlacement.linear(90, 45), num_nodes=3, ax=ax),
    "ownership_one": lambda ax: viz.ownership_map(ExpertPlacement.linear(30, 1), ax=ax),
    "coactivation": lambda ax: viz.coactivation_matrix(PAIRS, ax=ax),
    "coactivation_by_device": lambda ax: viz.coactivation_matrix(PAIRS, placement=EPLB[0], ax=ax),
    "traffic": lambda ax: viz.traffic_matrix(BEFORE.copies, 4096, num_nodes=2, ax=ax),
    "traffic_many": lambda ax: viz.traffic_matrix(np.ones((16, 16)), 1, ax=ax),
    "traffic_one": lambda ax: viz.traffic_matrix(np.ones((1, 1)), 1, ax=ax),
    "balance": lambda ax: viz.balance_over_time({"linear": BEFORE.rows}, changes={2: "rebalance"}, ax=ax),
    "memory": lambda ax: viz.device_memory(viz.expert_memory(EPLB, 1e9), capacity=2e10, ax=ax),
}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_draws(name, tmp_path) -> None:
    _, given = plt.subplots()
    assert PLOTS[name](given) is given
    ax = PLOTS[name](None)
    assert isinstance(ax, Axes)
    assert ax is not given
    ax.figure.savefig(tmp_path / "plot.png")
    # Whoever sees the picture alone can tell what it shows.
    assert ax.get_xlabel() or name.startswith("ownership")
    assert not ax.get_xlabel() or ax.get_ylabel()


@pytest.mark.parametrize("name", ["heatmap", "coactivation", "traffic"])
def test_colours_print_in_order(name) -> None:
    image = next(child for child in PLOTS[name](None).get_children() if isinstance(child, AxesImage))
    red, green, blue, _ = image.cmap(np.linspace(0, 1, 64)).T
    assert (np.diff(0.299 * red + 0.587 * green + 0.114 * blue) > 0).all()


def test_bars_are_the_loads() -> None:
    ax = viz.device_loads({"before": np.array([[6, 2], [0, 0]]), "after": np.array([4, 4])})
    assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [[1.5, 0.5], [1, 1]]
    assert len({bars[0].get_hatch() for bars in ax.containers}) == 2
    with pytest.raises(ValueError, match="loads are of the same devices"):
        viz.device_loads({"before": np.ones(2), "after": np.ones(3)})


def test_owners_are_the_slots() -> None:
    texts = [text.get_text() for text in PLOTS["ownership"](None).texts]
    assert [text for text in texts if not text.startswith("device")] == [str(e) for e in EPLB[0].slot_to_expert]
    legend = viz.ownership_map(ExpertPlacement(2, 2, [0, 1, 0, -1])).get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["only copy", "one of several replicas", "padding"]


def test_traffic_is_in_bytes_and_blank_at_home() -> None:
    ax = viz.traffic_matrix(np.array([[9.0, 2.0], [1.0, 9.0]]), token_bytes=1000)
    (image,) = (child for child in ax.get_children() if isinstance(child, AxesImage))
    drawn = np.ma.filled(image.get_array(), np.nan)
    assert drawn[0, 1] == 2
    assert drawn[1, 0] == 1
    assert np.isnan(drawn[[0, 1], [0, 1]]).all()


@pytest.mark.parametrize(
    "plot",
    [
        lambda: viz.expert_heatmap(np.array([[5]])),
        lambda: viz.device_loads({"all": np.array([3.0])}),
        lambda: viz.coactivation_matrix(np.zeros((1, 1))),
        lambda: viz.traffic_matrix(np.ones((1, 1)), 1),
        lambda: viz.balance_over_time({"all": np.ones((1, 1, 1))}),
        lambda: viz.device_memory({"experts": np.array([1e9])}),
    ],
)
def test_one_of_a_kind_has_one_number_on_its_axis(plot) -> None:
    ax = plot()
    low, high = sorted(ax.get_xlim())
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [0]


@pytest.mark.parametrize(("most", "arrow"), [(1, False), (900, True)])
def test_the_scale_tells_what_it_cuts_off(most, arrow) -> None:
    counts, pairs = np.ones((8, 64)), np.ones((64, 64)) - np.eye(64)
    counts[0, 0] = pairs[0, 1] = pairs[1, 0] = most
    heatmap, matrix = (
        next(child for child in ax.get_children() if isinstance(child, AxesImage))
        for ax in (viz.expert_heatmap(counts), viz.coactivation_matrix(pairs))
    )
    assert heatmap.colorbar.extend == ("max" if arrow else "neither")
    assert matrix.colorbar.extend == ("max" if arrow else "neither")


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("size", [8, 144, 256])
def test_labels_of_a_matrix_are_within_the_figure(size) -> None:
    values = np.random.default_rng(0).random((size, size))
    for ax in (viz.traffic_matrix(values, 14336), viz.coactivation_matrix(values)):
        ax.figure.draw_without_rendering()
        boxes = [ax.get_tightbbox(), *(other.get_tightbbox() for other in ax.figure.axes)]
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= ax.figure.bbox.x1


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("devices", [1, 4, 8, 144])
def test_a_legend_leaves_room_for_the_bars(devices) -> None:
    bytes_n = np.full(devices, 1e9)
    names = ("routed experts", "attention", "embedding and head", "key/value cache and state", "other")
    strategies = ("linear", "eplb_uneven", "layer_affinity")
    memory = viz.device_memory(dict.fromkeys(names, bytes_n), capacity=8e10)
    for ax in (memory, viz.device_loads(dict.fromkeys(strategies, bytes_n))):
        ax.figure.draw_without_rendering()
        assert ax.get_position().width > 0.55
    # As they are stacked, from the top down.
    assert [text.get_text() for text in memory.get_legend().get_texts()] == ["capacity", *reversed(names)]


def test_no_traffic_has_a_plain_scale() -> None:
    ax = viz.traffic_matrix(np.zeros((4, 4)), 4096)
    (image,) = (child for child in ax.get_children() if isinstance(child, AxesImage))
    assert image.get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("num_nodes", "message"),
    [
        (0, "num_nodes is an integer of at least 1; got 0"),
        (3, "4 devices are no multiple of num_nodes=3"),
        (8, "4 devices are no multiple of num_nodes=8"),
    ],
)
def test_nodes_that_do_not_split_are_refused(num_nodes, message) -> None:
    with pytest.raises(ValueError, match=message):
        viz.ownership_map(LINEAR[0], num_nodes=num_nodes)
    with pytest.raises(ValueError, match=message):
        viz.traffic_matrix(np.ones((4, 4)), 1, num_nodes=num_nodes)


def test_lines_differ_without_colour() -> None:
    ax = viz.balance_over_time({str(i): BEFORE.rows for i in range(8)})
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.get_lines()[:8]}
    assert len(looks) == 8
    with pytest.raises(ValueError, match="no loads to draw"):
        viz.balance_over_time({})


def test_memory_adds_up() -> None:
    parts = viz.expert_memory(EPLB, 10)
    assert sum(parts.values()).tolist() == [3 * 4 * 10] * 4
    assert parts["experts"].sum() == 3 * 12 * 10
    with pytest.raises(ValueError, match="parts are of the same devices"):
        viz.device_memory({})


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "jaxmoe.viz")
    with pytest.raises(ImportError, match=r"pip install matplotlib \(or jaxmoe\[notebooks\]\)"):
        importlib.import_module("jaxmoe.viz")
