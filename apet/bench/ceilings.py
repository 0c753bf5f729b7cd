"""The ceilings of a device, measured: matrix products per second and bytes read per second."""

import argparse

import torch

from apet.cost import Ceilings
from apet.measure import time_in_turns

_SIDE = {"cuda": 8192, "cpu": 1536}
_READ_BYTES = {"cuda": 2**31, "cpu": 2**28}


def add_ceiling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the ceilings of another machine than this one."""
    parser.add_argument("--tflops", type=float, help="matrix products, TFLOP/s (default: measured here)")
    parser.add_argument("--gbytes", type=float, help="memory, GB/s (default: measured here)")


def chosen_ceilings(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings that the flags name; one that is not given is measured here.

    Raises:
        ValueError: A ceiling that is not above zero.
    """
    for flag, value in (("--tflops", args.tflops), ("--gbytes", args.gbytes)):
        if value is not None and value <= 0:
            raise ValueError(f"{flag} {value} must be above 0")
    if args.tflops is None or args.gbytes is None:
        measured = measure_ceilings(device, dtype)
    return Ceilings(
        measured.flops if args.tflops is None else args.tflops * 1e12,
        measured.bandwidth if args.gbytes is None else args.gbytes * 1e9,
    )


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of ten large square products and of ten sums over a large tensor."""
    side, count = _SIDE.get(device.type, 1536), _READ_BYTES.get(device.type, 2**28) // dtype.itemsize
    square = torch.randn(side, side, device=device, dtype=dtype)
    flat = torch.ones(count, device=device, dtype=dtype)
    calls = {"product": lambda: square @ square, "read": lambda: flat.sum()}
    times = time_in_turns(calls, device, repeats=10)
    return Ceilings(2 * side**3 / (min(times["product"]) * 1e-3), count * dtype.itemsize / (min(times["read"]) * 1e-3))


def described(ceilings: Ceilings) -> str:
    """The two ceilings as text, for the title of a table."""
    return f"ceilings {ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bandwidth / 1e9:.3g} GB/s"
