"""Planning for devices that are not there: memory and time that a model takes, and its compiled programs."""

from jaxmoe.planning.exchanges import Exchange, describe_exchanges, read_exchanges
from jaxmoe.planning.few_layers import CountedStep, compile_few_layers
from jaxmoe.planning.measured import Measured, read_measured
from jaxmoe.planning.memory import Plan, plan
from jaxmoe.planning.roofline import StepTime, TimeModel, step_time
from jaxmoe.planning.search import MeshChoice, MeshSearch, search_meshes
from jaxmoe.planning.steps import CompiledStep, compile_steps
from jaxmoe.planning.sweeps import SweepPoint, sweep
from jaxmoe.planning.topology import gpu_topology
from jaxmoe.planning.what_if import DevicesChoice, PlacementChoice, compare_devices, compare_placements

__all__ = [
    "CompiledStep",
    "CountedStep",
    "DevicesChoice",
    "Exchange",
    "Measured",
    "MeshChoice",
    "MeshSearch",
    "PlacementChoice",
    "Plan",
    "StepTime",
    "SweepPoint",
    "TimeModel",
    "compare_devices",
    "compare_placements",
    "compile_few_layers",
    "compile_steps",
    "describe_exchanges",
    "gpu_topology",
    "plan",
    "read_exchanges",
    "read_measured",
    "search_meshes",
    "step_time",
    "sweep",
]
