"""Accelerators to plan a training for: memory and peak rates from public data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Rates are dense (without sparsity), in TFLOP/s, of products accumulated in fp32.

    memory_gib: what the driver shows. half: fp16 and bf16. convolution: fp32 convolutions, which
    torch runs in TF32 by default where the device has it. single: fp32 matrix products, which torch
    keeps out of TF32 by default.
    """

    memory_gib: float
    half: float
    convolution: float
    single: float


# Data sheets often print rates with sparsity, twice these; SXM versions unless named otherwise.
DEVICES = {
    "b200": Device(179.0, half=2250, convolution=1125, single=75),
    "h200": Device(140.4, half=989.4, convolution=494.7, single=66.9),
    "h100": Device(79.6, half=989.4, convolution=494.7, single=66.9),
    "h100_pcie": Device(79.6, half=756.5, convolution=378.0, single=51.2),
    "a100_80": Device(80.0, half=312.0, convolution=156.0, single=19.5),
    "a100_40": Device(40.0, half=312.0, convolution=156.0, single=19.5),
    "v100_32": Device(32.0, half=125.0, convolution=15.7, single=15.7),
    "l40s": Device(45.0, half=362.1, convolution=183.2, single=91.6),
    "a6000": Device(48.0, half=154.8, convolution=77.4, single=38.7),
    "rtx4090": Device(24.0, half=165.2, convolution=82.6, single=82.6),
    "rtx3090": Device(24.0, half=71.2, convolution=35.6, single=35.6),
}
