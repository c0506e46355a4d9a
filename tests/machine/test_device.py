"""minllama/machine/device.py: which device and dtype, its peak, its memory, its compiler."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch

from minllama.machine import device as device_module
from minllama.machine.device import (
    available_memory,
    check_compiler,
    choose_device,
    choose_dtype,
    compiler_problem,
    describe_device,
    dtype_name,
    prepare_determinism,
    training_arithmetic,
    used_memory,
)
from minllama.system.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, name: str = "", mps: bool = False):
    """A machine with other GPUs than this one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """--use_gpu, as the assignment's commands have it, is no error but is answered."""
    pretend(monkeypatch)
    device, note = choose_device(False)
    assert device == CPU and note == f"CPU, {torch.get_num_threads()} threads"
    device, note = choose_device(True)
    assert device == CPU and "no GPU that torch can use was found" in note


def test_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where asked; of several processes each takes its own, and one too many is refused."""
    pretend(monkeypatch, gpus=2, name="NVIDIA H100")
    assert choose_device(True) == (CUDA, "NVIDIA H100")
    device, note = choose_device(False)
    assert device == CPU and "this machine has a GPU: --use_gpu uses it" in note
    assert choose_device(True, local_rank=1)[0] == torch.device("cuda", 1)
    assert choose_device(False, local_rank=2)[0] == CPU
    with pytest.raises(UsageError, match="process 3 .*at most --nproc_per_node 2"):
        choose_device(True, local_rank=2)


def test_on_apple_silicon(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has no collectives, so that several processes use the CPU."""
    pretend(monkeypatch, mps=True)
    assert choose_device(True)[0].type == "mps"
    assert choose_device(True, local_rank=0)[0] == CPU


def test_choose_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is named is taken; auto takes bfloat16 only where the device multiplies it fast."""
    for name in ("float32", "float16", "bfloat16"):
        assert dtype_name(choose_dtype(name, CPU)) == name
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert choose_dtype("auto", CPU) == expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert choose_dtype("auto", CUDA) == expected
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


def test_memory_of_this_machine() -> None:
    """Bytes, not kilobytes or pages: this process alone takes more than 50 MB with torch."""
    free, used = available_memory(CPU), used_memory(CPU)
    assert free is None or 10e6 < free < 1e14
    assert used is None or 50e6 < used < 1e12
    if sys.platform == "linux":
        assert free is not None and used is not None
    assert describe_device(CPU).startswith("cpu, ")


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               61234.
Pages active:                            398422.
Pages inactive:                          396422.
Pages speculative:                          766.
Pages wired down:                        124500.
"""


def test_a_macs_free_memory_is_not_all_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan compared what a run needs with the memory that the machine was sold with."""
    monkeypatch.setattr(device_module.sys, "platform", "darwin")
    monkeypatch.setattr(device_module.subprocess, "check_output", lambda *_, **__: VM_STAT)
    assert available_memory(CPU) == (61234 + 396422 + 766) * 16384


def test_memory_that_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without /proc, or a system that is none of the three."""
    monkeypatch.setattr(device_module.sys, "platform", "linux")
    monkeypatch.setattr(device_module.Path, "read_text", lambda *_, **__: "MemTotal: 1 kB")
    assert available_memory(CPU) is None
    monkeypatch.setattr(device_module.sys, "platform", "plan9")
    assert available_memory(CPU) is None and used_memory(CPU) is None


def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag, the first line of the reason, and the remedy; not twenty lines of a traceback."""

    def broken(*_: object, **__: object):
        raise RuntimeError("no C++ compiler\nSet TORCHDYNAMO_VERBOSE=1 ...")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiler_problem(CPU) == "no C++ compiler"
    for device, needed in ((CPU, "a C++ compiler"), (CUDA, "Triton")):
        found = r"--compile: .*\(no C\+\+ compiler\): install " + re.escape(needed)
        with pytest.raises(UsageError, match=found) as error:
            check_compiler(device)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert compiler_problem(CPU) is None
    check_compiler(CPU)


def test_the_arithmetic_of_training_ends_with_it(monkeypatch) -> None:
    """Predictions in float32 must not depend on their batch, and so not on TF32's kernels; and a
    sample draws with a sum that has no deterministic kernel. A CPU computes as ever."""

    def now() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()

    cases = {
        (CPU, torch.float32, True): ("highest", False),
        (CUDA, torch.bfloat16, False): ("highest", False),
        (CUDA, torch.bfloat16, True): ("highest", True),
        (CUDA, torch.float32, False): ("high", False),
        (CUDA, torch.float32, True): ("high", True),
    }
    for (device, dtype, deterministic), within in cases.items():
        arithmetic = training_arithmetic(device, dtype, deterministic=deterministic)
        with pytest.raises(ZeroDivisionError), arithmetic:
            assert now() == within
            raise ZeroDivisionError
        assert now() == ("highest", False)


def test_deterministic_kernels_are_asked_for_before_cuda_starts(monkeypatch) -> None:
    """cuBLAS reads its environment once; what the user has set there stays."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    prepare_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_determinism()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
