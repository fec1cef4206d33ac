"""Planning: what a model takes and needs on devices that are not there; ``jaxmoe.plan(path, ep=8)`` to begin with."""

from jaxmoe.planning.memory import Plan, plan
from jaxmoe.planning.steps import CompiledStep, compile_steps
from jaxmoe.planning.topology import gpu_topology

__all__ = ["CompiledStep", "Plan", "compile_steps", "gpu_topology", "plan"]
