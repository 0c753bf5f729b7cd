"""Time of whole answers over batch sizes and answer lengths, and of one decoded token.

The same ways of running a model as in `prefill`. A decoded token costs the difference between the longest and the
shortest answer over the difference of their lengths.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apet.bench.comparison import COLUMNS, Comparison
from apet.bench.device import add_device_flags, chosen_device, described
from apet.bench.output import table
from apet.bench.prefill import add_model_flags
from apet.bench.presets import Preset
from apet.bench.variants import NONE, RANDOM, Variant, built, make_variants, parse_counts, runnable
from apet.measure import time_in_turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_model_flags(parser)
    add_device_flags(parser, repeats=5)
    parser.add_argument("--compile", action="store_true", help="compile decoding (but not the published way's)")
    parser.add_argument("--new_tokens", default="2,16", help="answer lengths, separated by commas")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return tables with the figures they were made of.

    Raises:
        ValueError: A flag that cannot be.
    """
    return measure(*built(args), args)


@torch.inference_mode()
def measure(preset: Preset, model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """As `run`, on a model that was built before."""
    device, dtype = chosen_device(args)
    batches = parse_counts(args.batch, "--batch")
    lengths = sorted(set(parse_counts(args.new_tokens, "--new_tokens")))
    methods = [name for name in args.methods.split(",") if name not in (NONE, RANDOM)]
    variants = make_variants(model, preset, methods, args.tokens, not args.no_published, args.apet)
    if args.compile:
        variants = {
            name: one if one.pipeline is not None else one.compiled(lengths[-1]) for name, one in variants.items()
        }
    tables, figures = [], []
    for batch in batches:
        inputs = preset.inputs(batch, args.text_tokens, device, dtype)
        # What must fit into memory; compilation is left to the measurement.
        fine, failed = runnable(
            variants, lambda variant, inputs=inputs: replace(variant, cache=None).generate(inputs, lengths[-1])
        )
        found = [_time_answers(fine, inputs, batch, length, device, args) for length in lengths]
        title = f"{preset.name}, batch {batch}, {described(device, dtype)}{', compiled' if args.compile else ''}"
        rows = [
            [name, length, *compared.cells()]
            for length, by_name in zip(lengths, found, strict=True)
            for name, compared in by_name.items()
        ]
        rows += [[name, None, reason, *[None] * (len(COLUMNS) - 1)] for name, reason in failed.items()]
        tables.append(table(f"whole answers, {title}", ["", "new tokens", *COLUMNS], rows))
        if len(lengths) > 1:
            tables.append(_decoding(title, found, lengths))
        calls = [
            {"new_tokens": length} | {name: compared.as_json() for name, compared in by_name.items()}
            for length, by_name in zip(lengths, found, strict=True)
        ]
        figures.append({"batch": batch, "calls": calls, "failed": failed})
    return {"tables": tables, "batches": figures, "budget": variants[RANDOM].config.to_dict()}


def _time_answers(
    variants: Sequence[Variant], inputs: Mapping[str, Tensor], batch: int, length: int, device, args
) -> dict[str, Comparison]:
    calls = {variant.name: lambda variant=variant: variant.generate(inputs, length) for variant in variants}
    around = {variant.name: variant.active for variant in variants}
    options = {"repeats": args.repeats, "warmup": args.warmup, "seconds": args.seconds}
    if args.compile:
        # Patching forgets compiled steps, so each variant stays patched and has its own turn.
        times = {}
        for name, call in calls.items():
            with around[name]():
                times |= time_in_turns({name: call}, device, **options)
    else:
        times = time_in_turns(calls, device, around=around, **options)
    return {name: Comparison.of(times, name, batch) for name in calls}


def _decoding(title: str, found: Sequence[Mapping[str, Comparison]], lengths: Sequence[int]) -> dict[str, Any]:
    added = lengths[-1] - lengths[0]
    rows = [[name, (found[-1][name].time.median - found[0][name].time.median) / added] for name in found[0]]
    return table(f"decoding, {title}", ["", "ms per token"], rows)
