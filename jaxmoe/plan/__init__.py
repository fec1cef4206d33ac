"""Planning: what a model takes and needs on devices that are not there; ``jaxmoe.plan(path, ep=8)`` to begin with."""

from jaxmoe.callable_package import make_callable
from jaxmoe.plan.memory import Plan, plan
from jaxmoe.plan.steps import CompiledStep, compile_steps
from jaxmoe.plan.topology import gpu_topology

__all__ = ["CompiledStep", "Plan", "compile_steps", "gpu_topology", "plan"]

make_callable(__name__)
