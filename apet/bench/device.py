"""What only a GPU has: launches, hidden waits, graphs, and its peak of allocated memory."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
_COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")


class Launches(NamedTuple):
    """What one call asks of the GPU.

    Attributes:
        kernels: Kernel (or graph) launches.
        copies: Copies and fills.
        syncs: Times the host waits for the device in the middle of the call.
    """

    kernels: int
    copies: int
    syncs: int


def check_device(name: str) -> torch.device:
    """The device a flag names.

    Raises:
        ValueError: No such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs a GPU, and torch {torch.__version__} finds none; use --device cpu")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def count_launches(call: Callable[[], Any], device: torch.device) -> Launches | None:
    """Launches and waits of one call after a warm-up call; None on a CPU, which has none."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    syncs = _count_syncs(call)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize(device)
    names = [event.name for event in recorded.events()]
    kernels = sum(name.startswith(_LAUNCHES) for name in names)
    return Launches(kernels, sum(name.startswith(_COPIES) for name in names), syncs)


def _count_syncs(call: Callable[[], Any]) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call captured as a CUDA graph; replays it and returns the tensors of the capture.

    Raises:
        RuntimeError: From torch, where the call waits for the device or allocates what a capture does not allow.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def cuda_peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes allocated at the worst moment of a call beyond what was allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
