# The public names, each with the module that it comes from. `__init__.py` reads this file to import a name on its first
# use, and type checkers and editors read it in place of `__init__.py`. docs/reference/api.md has a line on each.

from jaxmoe.batches import LineSettings as LineSettings
from jaxmoe.batches import generate_file as generate_file
from jaxmoe.checkpoint import CheckpointError as CheckpointError
from jaxmoe.checkpoint import LoadReport as LoadReport
from jaxmoe.checkpoint import add_adapter as add_adapter
from jaxmoe.checkpoint import convert as convert
from jaxmoe.checkpoint import convert_to_orbax as convert_to_orbax
from jaxmoe.checkpoint import load as load
from jaxmoe.checkpoint import remove_adapter as remove_adapter
from jaxmoe.checkpoint import save as save
from jaxmoe.compile_cache import CompileCacheError as CompileCacheError
from jaxmoe.compile_cache import enable_compile_cache as enable_compile_cache
from jaxmoe.config import MoEConfig as MoEConfig
from jaxmoe.config import RouterConfig as RouterConfig
from jaxmoe.elastic import move as move
from jaxmoe.elastic import rebalance as rebalance
from jaxmoe.generation import ContinuousEngine as ContinuousEngine
from jaxmoe.generation import GenerationStats as GenerationStats
from jaxmoe.generation import Output as Output
from jaxmoe.generation import Request as Request
from jaxmoe.generation import SamplingParams as SamplingParams
from jaxmoe.generation import TokenEvent as TokenEvent
from jaxmoe.generation import Tokenizer as Tokenizer
from jaxmoe.generation import TokenResult as TokenResult
from jaxmoe.generation import generate as generate
from jaxmoe.generation import stream as stream
from jaxmoe.layers import MoE as MoE
from jaxmoe.layers import MoEStats as MoEStats
from jaxmoe.layers import abstract_logical_state as abstract_logical_state
from jaxmoe.layers import load_logical_state as load_logical_state
from jaxmoe.layers import logical_state as logical_state
from jaxmoe.mesh import make_mesh as make_mesh
from jaxmoe.mesh import simulate_devices as simulate_devices
from jaxmoe.models import Decoder as Decoder
from jaxmoe.placement import ExpertPlacement as ExpertPlacement
from jaxmoe.placement import RoutingTrace as RoutingTrace
from jaxmoe.placement.balancer import Balancer as Balancer
from jaxmoe.planning import Plan as Plan
from jaxmoe.planning import compile_steps as compile_steps
from jaxmoe.planning import gpu_topology as gpu_topology
from jaxmoe.planning import plan as plan

__all__: list[str]
__version__: str
__imported__: float
