#!/usr/bin/env python3
"""Draws the pictures of README.md into docs/pictures, and prints the figures in them.

    python scripts/readme_pictures.py

It reads docs/configs/Qwen3-30B-A3B/config.json, which has the sizes that were published with that model. No weights are
read. How often each expert is chosen is made up, with a fixed seed. Needs matplotlib (the extra "notebooks").
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jaxmoe
from jaxmoe import viz
from jaxmoe.placement.synthetic import synthetic_trace

MODEL = ROOT / "docs" / "configs" / "Qwen3-30B-A3B"
PICTURES = ROOT / "docs" / "pictures"
EXPERTS, EXPERTS_PER_TOKEN, DEVICES, SLOTS = 128, 8, 8, 144


def main() -> None:
    """One placement, and two pictures of it."""
    trace = synthetic_trace(num_experts=EXPERTS, experts_per_token=EXPERTS_PER_TOKEN, num_layers=1, seed=0)
    placement = jaxmoe.ExpertPlacement.from_counts(trace.total_counts[0], ep=DEVICES, num_slots=SLOTS)
    sizes = {"batch_size": 256, "prompt_length": 1024, "max_length": 8192}
    plan = jaxmoe.plan(MODEL, ep=DEVICES, placement=placement, **sizes, device="h100")
    for name, size in plan.parts.items():
        print(f"{name:26} {size.min() / 1e9:6.2f} to {size.max() / 1e9:5.2f} GB on a device")
    print(f"{'in all':26} {max(plan.bytes_per_device.values()) / 1e9:6.2f} GB")

    ax = viz.ownership_map(placement)
    ax.set_title("one MoE layer of Qwen3-30B-A3B", loc="right", fontsize="medium")
    save(ax, "ownership")
    ax = viz.device_memory(plan.parts, capacity=plan.capacity)
    ax.set_title("256 sequences of 8,192 tokens, prompts of 1,024, against an H100", fontsize="medium")
    save(ax, "memory")


def save(ax: plt.Axes, name: str) -> None:
    """Write the picture of `ax`, without a date or a version in it."""
    path = PICTURES / f"{name}.png"
    ax.figure.savefig(path, dpi=100, metadata={"Software": None})
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
