"""Planning: what a model takes and needs on devices that are not there; ``jaxmoe.plan(path, ep=8)`` to begin with."""

from jaxmoe.callable_package import make_callable
from jaxmoe.plan.devices import DEVICE_KINDS, DeviceKind
from jaxmoe.plan.memory import Plan, plan

__all__ = ["DEVICE_KINDS", "DeviceKind", "Plan", "plan"]

make_callable(__name__)
