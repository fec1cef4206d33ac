"""Mixture-of-Experts checkpoints on a (dp, tp, ep) mesh of GPUs, with JAX.

The public names are imported on first use, so that ``import jaxmoe`` is cheap,
does not import JAX and starts no backend: a script may still choose its devices
(:func:`jaxmoe.mesh.simulate_devices`) after the import.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "make_mesh": "jaxmoe.mesh",
    "simulate_devices": "jaxmoe.mesh",
    "MoEConfig": "jaxmoe.config",
    "RouterConfig": "jaxmoe.config",
    "ExpertPlacement": "jaxmoe.placement",
    "RoutingTrace": "jaxmoe.placement",
    "Balancer": "jaxmoe.placement.balancer",
    "MoE": "jaxmoe.layers",
    "MoEStats": "jaxmoe.layers",
    "logical_state": "jaxmoe.layers",
    "abstract_logical_state": "jaxmoe.layers",
    "load_logical_state": "jaxmoe.layers",
    "load": "jaxmoe.checkpoint.loading.load",
    "save": "jaxmoe.checkpoint.saving.save",
    "convert": "jaxmoe.checkpoint.saving.save",
    "move": "jaxmoe.elastic",
    "generate": "jaxmoe.generation",
    "plan": "jaxmoe.planning",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from jaxmoe.checkpoint.loading.load import load as load
    from jaxmoe.checkpoint.saving.save import convert as convert
    from jaxmoe.checkpoint.saving.save import save as save
    from jaxmoe.config import MoEConfig as MoEConfig
    from jaxmoe.config import RouterConfig as RouterConfig
    from jaxmoe.elastic import move as move
    from jaxmoe.generation import generate as generate
    from jaxmoe.layers import MoE as MoE
    from jaxmoe.layers import MoEStats as MoEStats
    from jaxmoe.layers import abstract_logical_state as abstract_logical_state
    from jaxmoe.layers import load_logical_state as load_logical_state
    from jaxmoe.layers import logical_state as logical_state
    from jaxmoe.mesh import make_mesh as make_mesh
    from jaxmoe.mesh import simulate_devices as simulate_devices
    from jaxmoe.placement import ExpertPlacement as ExpertPlacement
    from jaxmoe.placement import RoutingTrace as RoutingTrace
    from jaxmoe.placement.balancer import Balancer as Balancer
    from jaxmoe.planning import plan as plan


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
