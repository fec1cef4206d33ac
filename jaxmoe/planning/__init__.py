"""Planning for devices that are not there: the memory that a model takes, and its compiled programs."""

from jaxmoe.planning.memory import Plan, plan
from jaxmoe.planning.steps import CompiledStep, compile_steps
from jaxmoe.planning.topology import gpu_topology

__all__ = ["CompiledStep", "Plan", "compile_steps", "gpu_topology", "plan"]
