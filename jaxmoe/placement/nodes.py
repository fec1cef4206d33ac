"""The one check that nodes hold equally many devices."""

from jaxmoe.checks import integer


def check_nodes(devices: int, number: int, *, name: str = "num_nodes") -> int:
    """Split devices over nodes: from the number of nodes the devices of each, or the other way round.

    Args:
        devices: devices in all.
        number: nodes, or devices of a node; the one is the other's quotient.
        name: name of the argument that `number` came in, for the message.

    Returns:
        devices / number.

    Raises:
        ValueError: `number` is no integer of at least 1, or leaves a node with fewer devices than another.

    Example:
        >>> check_nodes(8, 2)
        4
    """
    number = integer(name, number, least=1)
    if devices % number:
        raise ValueError(f"nodes hold equally many devices: {devices} devices are no multiple of {name}={number}")
    return devices // number
