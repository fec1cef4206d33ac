"""Planning for devices that are not there: memory and time that a model takes, and its compiled programs."""

from jaxmoe.planning.exchanges import Exchange, describe_exchanges, read_exchanges
from jaxmoe.planning.few_layers import CountedStep, compile_few_layers
from jaxmoe.planning.memory import Plan, plan
from jaxmoe.planning.roofline import StepTime, step_time
from jaxmoe.planning.search import MeshChoice, MeshSearch, search_meshes
from jaxmoe.planning.steps import CompiledStep, compile_steps
from jaxmoe.planning.sweeps import SweepPoint, sweep
from jaxmoe.planning.topology import gpu_topology

__all__ = [
    "CompiledStep",
    "CountedStep",
    "Exchange",
    "MeshChoice",
    "MeshSearch",
    "Plan",
    "StepTime",
    "SweepPoint",
    "compile_few_layers",
    "compile_steps",
    "describe_exchanges",
    "gpu_topology",
    "plan",
    "read_exchanges",
    "search_meshes",
    "step_time",
    "sweep",
]
