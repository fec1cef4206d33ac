"""Moving a running model to other devices."""

from jaxmoe.elastic.move import move

__all__ = ["move"]
