"""What only a GPU has: launches, hidden waits, graphs, and its peak of allocated memory."""

import argparse
import functools
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
        busy_ms: Time of all kernels and copies on the GPU: what is left of the call without gaps between them.
        longest: Names of the kernels that take most of it, with how often they ran and their milliseconds.
    """

    kernels: int
    copies: int
    syncs: int
    busy_ms: float
    longest: tuple[tuple[str, int, float], ...]


# Columns of the tables; `launch_cells` fills them.
LAUNCH_COLUMNS = ("launches", "syncs", "GPU busy ms")
_LONGEST = 8


def launch_cells(launches: Launches | None) -> list[Any]:
    """The cells of `LAUNCH_COLUMNS`."""
    return [None] * 3 if launches is None else [launches.kernels, launches.syncs, launches.busy_ms]


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_device_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Where, in what precision and how often to measure."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=repeats, help="measurements of each call")
    parser.add_argument("--warmup", type=int, default=2, help="rounds in front that are not counted")
    parser.add_argument("--seconds", type=float, help="stop a table after so much time and at least three measurements")


def chosen_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and precision of parsed flags.

    Raises:
        ValueError: As `check_device`.
    """
    device = check_device(args.device)
    return device, DTYPES[args.dtype] if args.dtype else default_dtype(device)


def described(device: torch.device, dtype: torch.dtype) -> str:
    """Device and precision as text, for the title of a table."""
    return f"{device.type}, {str(dtype).removeprefix('torch.')}"


def check_device(name: str) -> torch.device:
    """The device of a name.

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
    names, spent = [], {}
    for event in recorded.events():
        names.append(event.name)
        if event.device_type == torch.autograd.DeviceType.CUDA:
            runs, before = spent.get(event.name, (0, 0.0))
            spent[event.name] = runs + 1, before + event.time_range.elapsed_us() / 1e3
    longest = sorted(((name, runs, ms) for name, (runs, ms) in spent.items()), key=lambda one: -one[2])
    return Launches(
        sum(name.startswith(_LAUNCHES) for name in names),
        sum(name.startswith(_COPIES) for name in names),
        syncs,
        sum(ms for *_, ms in longest),
        tuple(longest[:_LONGEST]),
    )


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

    The graph reads what the call holds at the same addresses at every replay, so the replay holds the call.

    Raises:
        RuntimeError: From torch, where the call waits for the device or allocates what a capture does not allow.
    """
    call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()  # a capture that fails half-way leaves the random generator unusable
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = call()

    return functools.partial(_replay, graph, output, call)


def _replay(graph: torch.cuda.CUDAGraph, output: Any, held: Callable[[], Any]) -> Any:
    graph.replay()
    return output


def context_lost(device: torch.device) -> bool:
    """Whether an earlier failure, such as an assertion on the device, left its context unusable for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
