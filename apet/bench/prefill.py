"""Time to the first token, by components: apet against no compression, random selection and the published way.

Models of published dimensions with random weights (`apet.bench.presets`). "none" is the model of transformers as it is;
random selection at the same budget is the ceiling of any method.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import apet
from apet.bench.ceilings import add_ceiling_flags, chosen_ceilings
from apet.bench.ceilings import described as described_ceilings
from apet.bench.comparison import COLUMNS, Comparison, percent, timings_as_json
from apet.bench.components import TOTAL, marked, tower_stops_early
from apet.bench.device import (
    LAUNCH_COLUMNS,
    add_device_flags,
    chosen_device,
    count_launches,
    described,
    graphed,
    launch_cells,
)
from apet.bench.output import table
from apet.bench.presets import PRESETS, Preset
from apet.bench.shapes import AS_PUBLISHED
from apet.bench.variants import NONE, RANDOM, Variant, built, make_variants, parse_counts, runnable
from apet.cost import Ceilings, prefill_cost
from apet.measure import FEWEST, Timing, time_in_turns

# Behind the name of a variant that runs as one captured graph.
GRAPH = ", CUDA graph"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the commands that run a preset."""
    parser.add_argument("--preset", default="cpu-small", help=", ".join(PRESETS))
    parser.add_argument("--tokens", type=int, help="visual tokens, averaged over the layers (default: the preset's)")
    parser.add_argument("--text_tokens", type=int, default=64, help="text tokens of a prompt")
    parser.add_argument("--methods", default="apet", help="beside none and random, separated by commas")
    parser.add_argument(
        "--apet", action="append", default=[], metavar="NAME=VALUE,...",
        help="further settings (docs/options.md) for one more run of every method; random selection goes without",
    )  # fmt: skip
    parser.add_argument("--batch", default="1", help="batch sizes, separated by commas")
    parser.add_argument("--attn_implementation", default="sdpa", help="sdpa, eager or flash_attention_2")
    parser.add_argument("--no_published", action="store_true", help="leave out the published pipeline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_model_flags(parser)
    add_ceiling_flags(parser)
    add_device_flags(parser, repeats=10)
    parser.add_argument("--cuda_graphs", action="store_true", help="also as one captured graph per variant and batch")


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
    if args.cuda_graphs and device.type != "cuda":
        raise ValueError("--cuda_graphs needs --device cuda")
    methods = [name for name in args.methods.split(",") if name not in (NONE, RANDOM)]
    variants = make_variants(model, preset, methods, args.tokens, not args.no_published, args.apet)
    ceilings = chosen_ceilings(args, device, dtype)
    tables, figures = [], []
    for batch in batches:
        inputs = preset.inputs(batch, args.text_tokens, device, dtype)
        title = f"{preset.name}, batch {batch}, {described(device, dtype)}"
        fine, failed = runnable(variants, lambda variant, inputs=inputs: variant.prefill(inputs))
        figure, rows = _time_to_first_token(fine, failed, inputs, batch, device, args)
        parts, part_rows = _components(fine, inputs, device, args)
        _add_predictions(figure, rows, fine, preset, inputs, args.text_tokens, dtype, ceilings)
        columns = ["", *COLUMNS, *LAUNCH_COLUMNS, "predicted ms"]
        tables.append(table(f"time to first token, {title}, {described_ceilings(ceilings)}", columns, rows))
        names = [variant.name for variant in fine if variant.pipeline is None]
        tables.append(table(f"components in ms, {title}", ["", *names], part_rows))
        figures.append({"batch": batch, "calls": figure, "components": parts, "failed": failed})
    return {"tables": tables, "batches": figures, "budget": variants[RANDOM].config.to_dict()}


def _time_to_first_token(
    variants: Sequence[Variant], failed: dict[str, str], inputs: Mapping[str, Tensor], batch: int, device, args
) -> tuple[dict[str, Any], list[list]]:
    calls = {variant.name: lambda variant=variant: variant.prefill(inputs) for variant in variants}
    around = {variant.name: variant.active for variant in variants}
    if args.cuda_graphs:
        for variant in [one for one in variants if one.pipeline is None]:
            try:
                with variant.active():
                    calls[variant.name + GRAPH] = graphed(variant.embedded_prefill(inputs), device)
            except (RuntimeError, ValueError) as error:
                failed[variant.name + GRAPH] = f"not captured: {str(error).splitlines()[0]}"
    times = time_in_turns(calls, device, repeats=args.repeats, warmup=args.warmup, seconds=args.seconds, around=around)
    rows, figures = [], {}
    for name in calls:
        launches = None
        if name != AS_PUBLISHED or batch == 1:  # each further sample repeats the launches of the first
            with around[name]() if name in around else nullcontext():
                launches = count_launches(calls[name], device)
        compared = Comparison.of(_alike(times, name), name.removesuffix(GRAPH), batch)
        figures[name] = compared.as_json() | {"launches": launches._asdict() if launches else None}
        rows.append([name, *compared.cells(), *launch_cells(launches)])
    empty = [None] * (len(COLUMNS) + len(LAUNCH_COLUMNS) - 1)
    return figures, rows + [[name, reason, *empty] for name, reason in failed.items()]


def _alike(times: Mapping[str, list[float]], name: str) -> dict[str, list[float]]:
    """The times that `name` is compared with: graphs with graphs; the published pipeline is no graph."""
    graph = name.endswith(GRAPH)
    return {
        other.removesuffix(GRAPH): spent
        for other, spent in times.items()
        if other.endswith(GRAPH) == graph or other == AS_PUBLISHED
    }


def _add_predictions(
    figures: dict[str, Any], rows: list[list], variants: Sequence[Variant], preset: Preset, inputs, text_tokens: int,
    dtype: torch.dtype, ceilings: Ceilings,
) -> None:  # fmt: skip
    """A last cell for every row: what `apet.cost` says of the tokens that each variant really kept."""
    predicted = {}
    for variant in variants:
        if variant.pipeline is not None:
            continue
        with variant.active():
            early = tower_stops_early(variant.model, lambda variant=variant: variant.prefill(inputs))
            visual = preset.visual_tokens(None)
            if variant.config is not None:
                visual = apet.last_result(variant.model).tokens_per_layer[0]
        cost = prefill_cost(
            preset.dims(),
            visual,
            text_tokens=text_tokens,
            batch=len(inputs["input_ids"]),
            dtype=dtype,
            early_exit=early,
            config=variant.config,
        )
        predicted[variant.name] = cost.seconds(ceilings) * 1e3
        figures[variant.name]["predicted_ms"] = predicted[variant.name]
    for row in rows:
        row.append(predicted.get(row[0]))


def _components(variants: Sequence[Variant], inputs: Mapping[str, Tensor], device, args) -> tuple[dict, list[list]]:
    measured = [variant for variant in variants if variant.pipeline is None]
    stages = next((variant.config.layer_list for variant in measured if variant.config is not None), ())
    spent: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in measured}
    begun = time.monotonic()
    for turn in range(args.repeats + 1):
        if args.seconds is not None and turn > FEWEST and time.monotonic() - begun > args.seconds:
            break
        for variant in measured:
            with variant.active(), marked(variant.model, device, stages) as marks:
                variant.prefill(inputs)
            if turn:
                spent[variant.name].append(marks.milliseconds())
    names = list(dict.fromkeys(part for rounds in spent.values() for part in rounds[0]))
    names = [name for name in names if name != TOTAL] + [TOTAL]
    medians = {
        name: {part: Timing.of([one[part] for one in rounds]) for part in rounds[0]} for name, rounds in spent.items()
    }
    rows = [[part, *(medians[name].get(part) for name in spent)] for part in names]
    shares = {}
    for name, parts in medians.items():
        selection = sum(timing.median for part, timing in parts.items() if part.startswith("selector"))
        shares[name] = selection / parts[TOTAL].median
    rows.append(["selectors' share of the total", *(percent(shares[name]) for name in spent)])
    figures = {name: timings_as_json(parts) | {"selector_share": shares[name]} for name, parts in medians.items()}
    return figures, rows
