"""Facts about devices: the sizes of data sheets are near what CUDA reports, and the time of messages."""

import numpy as np
import pytest

from jaxmoe.hardware import GPUS, SIMULATED_CPU, Device, Links, get_gpu
from jaxmoe.planning import topology

# GB of the data sheet, which are of 2**30 bytes.
DATA_SHEET = {
    "a100-40gb": 40,
    "a100": 80,
    "l40s": 48,
    "b200": 180,
    "h100": 80,
    "h100-pcie": 80,
    "h20": 96,
    "h200": 141,
    "h200-nvl": 141,
}


@pytest.mark.parametrize("name", GPUS)
def test_a_program_can_use_a_little_less_than_the_data_sheet_says(name) -> None:
    assert 0.92 < GPUS[name].memory / (DATA_SHEET[name] * 2**30) < 1


# XLA's specs have float32 units and threads of a multiprocessor by compute capability.
@pytest.mark.parametrize(("name", "units", "threads"), [("a100", 64, 2048), ("l40s", 128, 1536), ("h100", 128, 2048)])
def test_a_multiprocessor_is_as_xla_has_it(name, units, threads) -> None:
    assert (GPUS[name].fp32_units, GPUS[name].threads) == (units, threads)
    assert f"fpus_per_core: {units}\n" in topology._target_config(GPUS[name])


def test_one_tile_fits_hopper_and_blackwell() -> None:
    assert (
        len({GPUS[name].block_shared_memory for name in ("h100", "h100-pcie", "h20", "h200", "h200-nvl", "b200")}) == 1
    )


def test_every_message_waits_and_the_two_ways_follow_each_other() -> None:
    links = Links(within=10.0, between=2.0, latency=3.0)
    assert links.seconds(50.0) == 3 + 5
    assert links.seconds(50.0, 4.0, messages=4) == 4 * 3 + 5 + 2
    within, between = np.array([[0.0, 10.0], [20.0, 0.0]]), np.array([[2.0, 0.0], [2.0, 0.0]])
    np.testing.assert_array_equal(links.seconds(within, between), [[4, 4], [6, 3]])


def test_speeds_that_are_none_are_refused() -> None:
    for name in ("within", "between"):
        with pytest.raises(ValueError, match=f"{name} is a finite number above 0; got 0"):
            Links(**({"within": 1, "between": 1, "latency": 0} | {name: 0}))
    with pytest.raises(ValueError, match="latency is a finite number of at least 0; got nan"):
        Links(within=1, between=1, latency=np.nan)
    with pytest.raises(ValueError, match="memory_bandwidth is a finite number above 0; got -1"):
        Device(name="none", memory_bandwidth=-1, links=SIMULATED_CPU.links)


def test_a_gpu_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"devices are a100-40gb, .*h100.*; got 'tpu'"):
        get_gpu("tpu")


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("a100-40gb", ["a100-40gb", "A100-40GB", "NVIDIA A100-SXM4-40GB", "a100 sxm 40 GB"]),
        ("a100", ["A100", "A100-80GB", "NVIDIA A100-SXM4-80GB", "a100_80gb"]),
        ("l40s", ["L40S", "NVIDIA L40S", "l40s-48gb"]),
        ("h100", ["H100", "H100-80GB", "h100_80gb", "NVIDIA H100 80GB HBM3", "H100 SXM5", "nvidia-h100"]),
        ("h100-pcie", ["H100 PCIe", "NVIDIA H100 PCIe", "H100-PCIE-80GB"]),
        ("h20", ["H20", "NVIDIA H20", "H20-96GB"]),
        ("h200-nvl", ["H200 NVL", "NVIDIA H200 NVL", "H200-NVL-141GB"]),
        ("h200", ["H200", "NVIDIA H200", "H200-141GB", "h200 sxm 141 GB HBM3e"]),
        ("b200", ["B200", "NVIDIA B200", "B200-180GB", "b200 192GB"]),
    ],
)
def test_devices_have_the_names_that_people_write(key, names) -> None:
    for name in [key, GPUS[key].name, *names]:
        assert get_gpu(name) is GPUS[key], name


@pytest.mark.parametrize(
    "name", ["", "h100x", "H100-40GB", "H100 NVL", "pcie h100", "H20-141GB", "A100-96GB", "80GB", "h100 h200", None]
)
def test_devices_that_are_not_known_are_refused(name) -> None:
    with pytest.raises(ValueError, match="devices are a100-40gb, a100, .* as in H100-80GB; got "):
        get_gpu(name)
