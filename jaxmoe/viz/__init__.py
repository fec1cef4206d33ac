"""Plots of placements, routing and what they cost. One call each, which returns the matplotlib Axes.

Colors are readable by the color-blind and keep their order when printed in gray; where color
tells things apart, hatches or markers do too.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("plots are drawn by matplotlib: pip install matplotlib (or jaxmoe[notebooks])") from error

from jaxmoe.viz.balance import balance_over_time
from jaxmoe.viz.coactivation import coactivation_matrix
from jaxmoe.viz.heatmap import expert_heatmap
from jaxmoe.viz.load import device_loads
from jaxmoe.viz.memory import device_memory, expert_memory
from jaxmoe.viz.ownership import ownership_map
from jaxmoe.viz.page import plan_page
from jaxmoe.viz.skew import skew_by_layer
from jaxmoe.viz.times import step_times
from jaxmoe.viz.traffic import traffic_matrix

__all__ = [
    "balance_over_time",
    "coactivation_matrix",
    "device_loads",
    "device_memory",
    "expert_heatmap",
    "expert_memory",
    "ownership_map",
    "plan_page",
    "skew_by_layer",
    "step_times",
    "traffic_matrix",
]
