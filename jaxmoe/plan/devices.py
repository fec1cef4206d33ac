"""What is known of a kind of device without having one."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """One kind of device.

    Attributes:
        name: as a person says it.
        memory: bytes of its memory by data sheet; a program can use some GB less.
    """

    name: str
    memory: float


# By NVIDIA's data sheets.
DEVICE_KINDS = {
    "a100-40gb": DeviceKind(name="A100 40 GB", memory=40e9),
    "a100": DeviceKind(name="A100 80 GB", memory=80e9),
    "l40s": DeviceKind(name="L40S", memory=48e9),
    "h100": DeviceKind(name="H100 SXM", memory=80e9),
    "h200": DeviceKind(name="H200 SXM", memory=141e9),
    "b200": DeviceKind(name="B200", memory=180e9),
}


def get_device_kind(name: str) -> DeviceKind:
    """The kind of device of that name.

    Raises:
        ValueError: it is not known here.
    """
    if name not in DEVICE_KINDS:
        raise ValueError(f"devices are {', '.join(DEVICE_KINDS)}; got {name!r}")
    return DEVICE_KINDS[name]
