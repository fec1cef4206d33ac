"""Loading: the plan of every byte and where it goes, and the threads that carry it out, from files to devices."""

from jaxmoe.checkpoint.loading.apart import add_adapter, add_adapters, plan_factors, remove_adapter
from jaxmoe.checkpoint.loading.buffers import aligned_array
from jaxmoe.checkpoint.loading.execute import load_arrays, load_shards
from jaxmoe.checkpoint.loading.load import load
from jaxmoe.checkpoint.loading.merge import merge_adapter
from jaxmoe.checkpoint.loading.plan import LoadPlan, make_load_plan, plan_load, plan_packed
from jaxmoe.checkpoint.loading.report import AdapterReport, LoadReport, bytes_per_device
from jaxmoe.checkpoint.loading.threads import run_in_threads

__all__ = [
    "AdapterReport",
    "LoadPlan",
    "LoadReport",
    "add_adapter",
    "add_adapters",
    "aligned_array",
    "bytes_per_device",
    "load",
    "load_arrays",
    "load_shards",
    "make_load_plan",
    "merge_adapter",
    "plan_factors",
    "plan_load",
    "plan_packed",
    "remove_adapter",
    "run_in_threads",
]
