"""Peak extra memory of one compression. On a CPU in a process of its own, from the kernel's resident-set high mark.

The child is this module: ``python -m apet.bench.memory SHAPE METHOD DTYPE`` prints one number of bytes. Linux only.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from apet.bench.shapes import Shape, block, compressor
from apet.measure import cuda_peak_bytes

_ROOT = Path(__file__).resolve().parents[2]


def peak_bytes(shape: Shape, method: str, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes used at the worst moment beyond the input, outputs included.

    Raises:
        ValueError: A CPU measurement on a system that is not Linux.
        RuntimeError: The measuring process failed; the message holds its error.
    """
    if device.type == "cuda":
        call = compressor(method, shape, block(shape, device, dtype))
        call()
        return cuda_peak_bytes(call, device)
    if not sys.platform.startswith("linux"):
        raise ValueError(f"peak memory on a CPU is measured on Linux only, not on {sys.platform}; leave --memory out")
    paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "apet.bench.memory", str(shape), method, str(dtype).removeprefix("torch.")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {method} on {shape} failed: {done.stderr.strip()[-400:]}")
    return int(done.stdout.split()[-1])


def _main(shape: str, method: str, dtype: str) -> None:
    wanted, cpu = Shape.parse(shape), torch.device("cpu")
    small = Shape(1, 64, 32, 16)
    compressor(method, small, block(small, cpu, torch.float32))()  # loads libraries
    tokens = block(wanted, cpu, getattr(torch, dtype))
    call = compressor(method, wanted, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the high mark starts again from here
    before = _status("VmRSS")
    result = call()
    print(_status("VmHWM") - before)
    del result


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
