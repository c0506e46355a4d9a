"""The machine: which device and dtype to compute with, its memory, its allocator, its compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from minllama.system.errors import UsageError

KEPT_KERNELS = 64  # a pretraining, whose chunks have one length, has some 40
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(use_gpu: bool, *, local_rank: int | None = None) -> tuple[torch.device, str]:
    """The device to compute on, and a line that says so; a missing GPU is no error.

    Of several processes on this machine, number `local_rank` takes a GPU of its own (None: there
    is only one process). Raises UsageError where there are too few GPUs.
    """
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available() and local_rank is None  # MPS has no collectives
    if not use_gpu or not (cuda or mps):
        note = f"CPU, {torch.get_num_threads()} threads"
        if use_gpu:
            note += "; --use_gpu: no GPU that torch can use was found, so the CPU is used"
        elif cuda or mps:
            note += "; this machine has a GPU: --use_gpu uses it"
        return torch.device("cpu"), note
    if not cuda:
        return torch.device("mps"), "Apple GPU (MPS)"
    if local_rank is None:
        return torch.device("cuda"), torch.cuda.get_device_name()
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"--use_gpu: process {local_rank + 1} of this machine has no GPU of its own: "
            f"start at most --nproc_per_node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), torch.cuda.get_device_name()


def describe_device(device: torch.device) -> str:
    """The device's name, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.processor() or platform.machine()}"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; `auto` is bfloat16 where the device has instructions for it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16  # before Ampere: float16 is fast
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work here, found by compiling a tiny function; None: it works."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, one that fails, no Python headers, no Triton, ...
        return str(error).strip().split("\n")[0]
    return None


def check_compiler(device: torch.device) -> None:
    """Raise UsageError where torch.compile does not work."""
    problem = compiler_problem(device)
    if problem is not None:
        needed = "a C++ compiler (g++, clang++ or Windows' cl) with Python's headers"
        if device.type == "cuda":
            needed = "Triton and a C compiler with Python's headers"
        raise UsageError(
            f"--compile: torch cannot compile here ({problem}): install {needed}, or give "
            "--compile off"
        )


def keep_memory_low() -> None:
    """Have glibc reuse the memory of freed tensors in the next step, and torch forget old kernels.

    By default glibc returns large blocks to the system, which then zeroes their pages again in
    every step: a seventh of a step's time. The peak does not change. Other C libraries are left
    alone. In bfloat16 a CPU's kernels are made for each shape: those of a thousand were kept, half
    a megabyte each, where sequences have many lengths; making them again takes no time that could
    be measured. This is read once, before the first product of matrices.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):  # torch's, oneDNN's
        os.environ.setdefault(name, str(KEPT_KERNELS))
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no block, however large, gets a mapping of its own
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as the flags spell it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def available_memory(device: torch.device) -> int | None:
    """Bytes free on the device (the CPU: in the machine), or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        if sys.platform == "linux":
            text = Path("/proc/meminfo").read_text(encoding="utf-8")
            return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
        if sys.platform == "darwin":
            text = subprocess.check_output(["vm_stat"], text=True, encoding="utf-8")
            pages = map(int, re.findall(r"Pages (?:free|inactive|speculative):\s+(\d+)", text))
            return sum(pages) * int(re.search(r"page size of (\d+)", text)[1])
        # Windows' MEMORYSTATUSEX: its own size and the load, then seven sizes in bytes.
        status = (ctypes.c_uint64 * 8)()
        status[0] = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]  # free physical memory
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, AttributeError):
        return None


def used_memory(device: torch.device) -> int | None:
    """Peak bytes of this process on the device (CPU: resident), or None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform in ("linux", "darwin"):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1024 if sys.platform == "linux" else 1)  # Linux counts in KiB
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: on a GPU, or on the CPU, where torch has no exception for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    words = ("not enough memory", "out of memory", "can't allocate memory")  # Windows, CUDA, Linux
    return known or any(word in str(error) for word in words)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` on float32 weights; float32 switches it off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def training_arithmetic(
    device: torch.device, dtype: torch.dtype, *, deterministic: bool = False
) -> Iterator[None]:
    """How a GPU computes within the block, in which training runs; restores torch's settings.

    Float32 training multiplies in TF32, which rounds factors to 10 bits and sums in float32, in a
    fraction of the time. `deterministic` takes kernels that add in the same order every time.
    """
    if device.type != "cuda":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if dtype == torch.float32:
        torch.set_float32_matmul_precision("high")
    if deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if deterministic:
            torch.use_deterministic_algorithms(was_deterministic)


def prepare_determinism() -> None:
    """What deterministic kernels need before CUDA starts; may be called again."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # No code here reads memory before it writes it, so torch need not fill it.
    torch.utils.deterministic.fill_uninitialized_memory = False
