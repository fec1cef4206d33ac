"""Planning for devices that are not there: the memory that a model takes, and its compiled programs."""

from jaxmoe.planning.exchanges import Exchange, describe_exchanges, read_exchanges
from jaxmoe.planning.memory import Plan, plan
from jaxmoe.planning.steps import CompiledStep, compile_steps
from jaxmoe.planning.topology import gpu_topology

__all__ = [
    "CompiledStep",
    "Exchange",
    "Plan",
    "compile_steps",
    "describe_exchanges",
    "gpu_topology",
    "plan",
    "read_exchanges",
]
