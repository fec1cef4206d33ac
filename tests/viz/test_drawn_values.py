"""What stands in a plot, where it stands there."""

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from jaxmoe import viz  # noqa: E402
from jaxmoe.planning import PlacementChoice, StepTime  # noqa: E402


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_parts_of_memory_stand_on_each_other() -> None:
    ax = viz.device_memory(
        {"experts": np.array([1e9, 2e9]), "cache": np.array([3e9, 4e9]), "rest": np.array([5e9, 6e9])}
    )
    edges = [[(bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars] for bars in ax.containers]
    assert edges == [[(0, 1), (0, 2)], [(1, 4), (2, 6)], [(4, 9), (6, 12)]]


def test_balance_over_time_is_the_mean_over_layers() -> None:
    loads = np.array([[[4.0, 0.0], [2.0, 2.0]], [[3.0, 1.0], [0.0, 4.0]]])  # [windows, layers, devices]
    line = viz.balance_over_time({"linear": loads}).get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), [(2 + 1) / 2, (1.5 + 2) / 2])


def test_a_row_of_the_traffic_matrix_is_the_sender() -> None:
    ax = viz.traffic_matrix(np.array([[0.0, 2.0], [1.0, 0.0]]), token_bytes=1)
    (there,) = (text for text in ax.texts if text.get_text() == "2")
    assert there.get_position() == (1, 0)  # x, y
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("to device", "from device")


def test_a_line_of_skew_is_a_placement_and_a_point_of_it_a_layer() -> None:
    time = StepTime(phase="decode", tokens=1, dense=1, experts=0, cache=0, exchange=0, sums=0, dispatch={})
    sizes = {"bytes_per_device": 0, "replica_bytes": 0, "fits": True, "largest_batch": 1, "sent_per_token": None}
    one, two, untold = (
        PlacementChoice(placement="eplb", redundancy=extra, skew=skew, decode=time, prefill=time, **sizes)
        for extra, skew in ((0, (1.5, 2.0)), (1, (1.0, 1.25)), (0, ()))
    )
    lines = viz.skew_by_layer([one, two]).get_lines()[:2]
    assert [(line.get_label(), tuple(line.get_ydata())) for line in lines] == [
        ("eplb, 0 redundant", (1.5, 2.0)),
        ("eplb, 1 redundant", (1.0, 1.25)),
    ]
    with pytest.raises(ValueError, match="judged by a trace"):
        viz.skew_by_layer([one, untold])
