"""GPUs by their makers' data sheets, and the rate that MFU is measured against."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

from minllama.machine.device import dtype_name, training_arithmetic


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet, the rates without sparsity."""

    tflops: float  # of bfloat16 matrix products summed in float32 (V100, T4: float16)
    float32_tflops: float  # of float32 ones, in TF32 where it has it, as training has them
    memory_gb: float
    link_gb_s: float  # each way to another GPU of the machine: NVLink, else PCIe

    def flops(self, dtype: str) -> float:
        """FLOP/s of training in this dtype, at most."""
        return 1e12 * (self.float32_tflops if dtype == "float32" else self.tflops)


# By the words of the name that torch has for them. The first that fits counts.
GPUS = {
    "B300": Gpu(2250, 1125, 270, 900),
    "GB200": Gpu(2500, 1250, 186, 900),
    "B200": Gpu(2250, 1125, 180, 900),
    "GH200": Gpu(989, 494, 96, 450),
    "H200 NVL": Gpu(835, 417, 141, 450),
    "H200": Gpu(989, 494, 141, 450),
    "H100 NVL": Gpu(835, 417, 94, 300),
    "H100 PCIe": Gpu(756, 378, 80, 64),
    "H100": Gpu(989, 494, 80, 450),
    "A100": Gpu(312, 156, 80, 300),
    "L40S": Gpu(362, 183, 48, 32),
    "L40": Gpu(181, 90.5, 48, 32),
    "L4": Gpu(121, 60, 24, 32),
    "A10G": Gpu(70, 35, 24, 32),
    "A10": Gpu(125, 62.5, 24, 32),
    "V100-PCIE": Gpu(112, 14, 32, 16),
    "V100": Gpu(125, 15.7, 32, 150),
    "T4": Gpu(65, 8.1, 16, 16),
    "RTX 6000 Ada": Gpu(364, 182, 48, 32),
    "A6000": Gpu(155, 77, 48, 32),
    "5090": Gpu(209, 105, 32, 64),
    "4090": Gpu(165, 82.6, 24, 32),
    "3090": Gpu(71, 35.6, 24, 32),
}
OTHERS = r"\b(Ti|D|Laptop|MIG)\b"  # slower or faster than what they are named after
# Width of the product that is timed where no data sheet is known. A CPU reaches its rate at 1,024
# in milliseconds; a GPU is not busy below some thousands, and needs no second for them.
TIMED_WIDTH = {"cpu": 1024, "cuda": 8192, "mps": 4096}


def find_gpu(name: str) -> Gpu | None:
    """The GPU of which torch has this name; None: not known."""
    if re.search(OTHERS, name):
        return None
    return next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: the data sheet's, else a large product timed here."""
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.flops(dtype_name(dtype))
    return measured_flops(device, dtype, width=TIMED_WIDTH[device.type])


def measured_flops(device: torch.device, dtype: torch.dtype, *, width: int) -> float:
    """FLOP/s of square matrix products as training makes them, the fastest of three after two."""
    generator = torch.Generator(device).manual_seed(0)  # not the run's own
    a = torch.randn(width, width, generator=generator, device=device).to(dtype)
    seconds = []
    with training_arithmetic(device, dtype):
        for _ in range(5):
            started = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return 2 * width**3 / min(seconds[2:])
