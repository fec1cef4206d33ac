"""Moving a running model to other devices, and its experts between those that it is on."""

from jaxmoe.elastic.move import move
from jaxmoe.elastic.rebalance import rebalance

__all__ = ["move", "rebalance"]
