"""FLOPs, cache bytes and the time to the first token as `apet.cost` predicts them; nothing is run but the ceilings."""

import argparse
from typing import Any

from apet.bench.ceilings import add_ceiling_flags, chosen_ceilings
from apet.bench.ceilings import described as described_ceilings
from apet.bench.device import add_device_flags, chosen_device, described
from apet.bench.output import table
from apet.bench.presets import PRESETS, Preset, get_preset
from apet.bench.variants import parse_counts
from apet.cost import Ceilings, decode_cost, prefill_cost

_COLUMNS = ["", "batch", "TFLOP", "cache, MiB", "TTFT, ms", "speed-up", "ms per decoded token", "decoding speed-up"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("--preset", default="llava-1.5-7b", help=", ".join(PRESETS))
    parser.add_argument("--tokens", type=int, help="visual tokens, averaged over the layers (default: the preset's)")
    parser.add_argument("--text_tokens", type=int, default=64, help="text tokens of a prompt")
    parser.add_argument("--batch", default="1,16", help="batch sizes, separated by commas")
    add_ceiling_flags(parser)
    add_device_flags(parser, repeats=1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Predict, and return a table with the figures.

    Raises:
        ValueError: A flag that cannot be.
    """
    device, dtype = chosen_device(args)
    preset, batches = get_preset(args.preset), parse_counts(args.batch, "--batch")
    ceilings = chosen_ceilings(args, device, dtype)
    rows, figures = [], []
    for batch in batches:
        base: dict[str, float] | None = None
        for compressed in (False, True):
            figure = predicted(preset, compressed, args.tokens, args.text_tokens, batch, dtype, ceilings)
            base = base or figure
            gains = {name: base[name] / figure[name] for name in ("ttft_ms", "decode_ms")}
            name = "compressed" if compressed else "none"
            rows.append(
                [name, batch, figure["flops"] / 1e12, figure["kv_bytes"] / 2**20, figure["ttft_ms"], gains["ttft_ms"],
                 figure["decode_ms"], gains["decode_ms"]]
            )  # fmt: skip
            figures.append({"name": name, "batch": batch, **figure, "speedup": gains})
    title = f"predicted cost, {preset.name}, {described(device, dtype)}, {described_ceilings(ceilings)}"
    return {"tables": [table(title, _COLUMNS, rows)], "ceilings": vars(ceilings), "predictions": figures}


def predicted(
    preset: Preset, compressed: bool, tokens: int | None, text_tokens: int, batch: int, dtype, ceilings: Ceilings
) -> dict[str, float]:
    """FLOPs, cache bytes, milliseconds to the first token and per decoded token."""
    config = preset.compression("apet", tokens) if compressed else None
    dims, visual = preset.dims(), preset.visual_tokens(config)
    prefill = prefill_cost(dims, visual, text_tokens=text_tokens, batch=batch, dtype=dtype, early_exit=compressed)
    step = decode_cost(dims, [text_tokens + count for count in visual], batch=batch, dtype=dtype)
    return {
        "flops": prefill.flops,
        "kv_bytes": prefill.kv_bytes,
        "ttft_ms": prefill.seconds(ceilings) * 1e3,
        "decode_ms": step.seconds(ceilings) * 1e3,
    }
