"""Time of selecting and merging alone: apet and other methods against the floor, and how it grows with the tokens.

Beside every method stand random selection (the ceiling of any method), the formulas as published
(`apet.bench.as_published`) and the floor: one read of the tokens, and the product of the dropped with the kept tokens.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apet.bench.as_published import broadcast_elements
from apet.bench.device import (
    LAUNCH_COLUMNS,
    add_device_flags,
    chosen_device,
    count_launches,
    described,
    graphed,
    launch_cells,
)
from apet.bench.memory import peak_bytes
from apet.bench.output import table
from apet.bench.shapes import AS_PUBLISHED, Shape, block, compressor, parse_methods
from apet.bench.variants import parse_counts
from apet.measure import Timing, fit_growth, ratio, time_in_turns
from apet.methods import get_method

_READ, _PRODUCT, _GRAPH = "read of the tokens", "similarity product", "apet, CUDA graph"
_SIZES = "2304,4096,8192,16384,32768,65536"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("--shapes", default="1x576x1024:96,5x576x1024:192", help="BxNxD:K, separated by commas")
    parser.add_argument("--methods", default="apet", help="beside random and as published; or all")
    parser.add_argument("--scaling", nargs="?", const=_SIZES, help=f"numbers of tokens to time apet at ({_SIZES})")
    parser.add_argument("--scaling_block", default="1x1024:320", help="the other numbers of --scaling: BxD:K")
    parser.add_argument("--memory", help="shapes of which to measure the peak extra memory")
    add_device_flags(parser, repeats=20)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return tables with the figures they were made of.

    Raises:
        ValueError: A flag that cannot be.
    """
    device, dtype = chosen_device(args)
    methods = list(dict.fromkeys(["apet", *parse_methods(args.methods), "random"]))
    shapes = [Shape.parse(text) for text in args.shapes.split(",")]
    sizes = parse_counts(args.scaling, "--scaling") if args.scaling else []
    if len(sizes) in (1, 2):
        raise ValueError(f"--scaling {args.scaling!r} must be three or more numbers of tokens, like {_SIZES}")
    measured = [Shape.parse(text) for text in args.memory.split(",")] if args.memory else []
    scaled = [_scaling_shape(args.scaling_block, size) for size in sizes]
    title = described(device, dtype)

    tables, figures = [], []
    for shape in shapes:
        figure, rows = _time_shape(shape, methods, device, dtype, args)
        figures.append(figure)
        columns = ["", "ms, median (p10..p90)", "as published / this", "this / floor", *LAUNCH_COLUMNS]
        tables.append(table(f"compress {shape}, {title}", columns, rows))
    result: dict[str, Any] = {"shapes": figures}
    if scaled:
        result["scaling"], rows = _time_growth(scaled, device, dtype, args)
        fit = result["scaling"]
        name = f"compress, growth with N, {title}: exponent {fit['exponent']:.3f}, R^2 of a line {fit['r2']:.4f}"
        tables.append(table(name, ["shape", "ms, median (p10..p90)", "us per token"], rows))
    if measured:
        result["memory"], rows = _measure_memory(measured, device, dtype)
        tables.append(table(f"compress, peak extra memory, {title}", ["shape", "", "MiB", "times the input"], rows))
    return {"tables": tables, **result}


def floor_calls(tokens: Tensor, keep: int) -> dict[str, Callable[[], Tensor]]:
    """What no selection with merging can do without: reading the tokens, and donors times receivers in float32."""
    donors, receivers = tokens[:, keep:].float(), tokens[:, :keep].float().transpose(1, 2)
    return {_READ: lambda: tokens.sum(-1), _PRODUCT: lambda: donors @ receivers}


def _scaling_shape(text: str, tokens: int) -> Shape:
    batch, cross, rest = text.partition("x")
    if not cross:
        raise ValueError(f"--scaling_block {text!r} must be BxD:K, like 1x1024:320")
    return Shape.parse(f"{batch}x{tokens}x{rest}")


def _time_shape(shape: Shape, methods: list[str], device, dtype, args) -> tuple[dict[str, Any], list[list]]:
    tokens = block(shape, device, dtype)
    calls: dict[str, Callable[[], Any]] = {name: compressor(name, shape, tokens) for name in methods}
    failed = {}
    if device.type == "cuda":
        try:
            calls[_GRAPH] = graphed(calls["apet"], device)
        except RuntimeError as error:
            failed[_GRAPH] = f"not captured: {str(error).splitlines()[0]}"
    calls[AS_PUBLISHED] = compressor(AS_PUBLISHED, shape, tokens)
    floor = floor_calls(tokens, shape.keep)
    times = time_in_turns(calls | floor, device, repeats=args.repeats, warmup=args.warmup, seconds=args.seconds)
    floor_times = [sum(pair) for pair in zip(*(times[name] for name in floor), strict=True)]
    rows, entries = [], {}
    for name, call in calls.items():
        launches = count_launches(call, device)
        faster, above = ratio(times[AS_PUBLISHED], times[name]), ratio(times[name], floor_times)
        rows.append([_described(name), Timing.of(times[name]), faster, above, *launch_cells(launches)])
        entries[name] = {
            "ms": Timing.of(times[name])._asdict(),
            "as_published_over_this": faster._asdict(),
            "over_floor": above._asdict(),
            "launches": launches._asdict() if launches else None,
        }
    rows += [[name, reason, None, None, *launch_cells(None)] for name, reason in failed.items()]
    for name in floor:
        rows.append([f"floor: {name}", Timing.of(times[name]), None, None, *launch_cells(None)])
        entries[name] = {"ms": Timing.of(times[name])._asdict()}
    return {"shape": str(shape), "calls": entries, "failed": failed}, rows


def _described(name: str) -> str:
    """The name with the stage a method was run at, where it is not the vision stage."""
    if name in (AS_PUBLISHED, _GRAPH):
        return name
    stage = get_method(name).stages[0]
    return name if stage == "vision" else f"{name} (decoder stage)"


def _time_growth(shapes: list[Shape], device, dtype, args) -> tuple[dict[str, Any], list[list]]:
    rows, medians = [], []
    for shape in shapes:
        tokens = block(shape, device, dtype)
        calls = {"apet": compressor("apet", shape, tokens)}
        times = time_in_turns(calls, device, repeats=args.repeats, warmup=args.warmup, seconds=args.seconds)
        timing = Timing.of(times["apet"])
        medians.append(timing.median)
        rows.append([shape, timing, f"{timing.median / shape.tokens * 1e3:.3g}"])
    fit = fit_growth([shape.tokens for shape in shapes], medians)
    points = [[shape.tokens, median] for shape, median in zip(shapes, medians, strict=True)]
    return {"points": points, **fit._asdict()}, rows


def _measure_memory(shapes: list[Shape], device, dtype) -> tuple[list[dict[str, Any]], list[list]]:
    rows, figures = [], []
    for shape in shapes:
        size = shape.batch * shape.tokens * shape.dim * dtype.itemsize
        peak = peak_bytes(shape, "apet", device, dtype)
        # Run as written, the formulas would need more than many machines have; this much is certain.
        broadcast = broadcast_elements(*shape) * dtype.itemsize
        for name, count in (("apet, measured", peak), (f"{AS_PUBLISHED}, one temporary", broadcast)):
            rows.append([shape, name, f"{count / 2**20:,.1f}", f"{count / size:.2f}"])
            figures.append({"shape": str(shape), "what": name, "bytes": count, "times_input": count / size})
    return figures, rows
