"""Split a layer-averaged budget over stages: the arithmetic behind `Method.plan`."""

from collections.abc import Sequence
from typing import Any


def vision_and_middle(average: float, tokens: int, layers: int) -> dict[str, Any]:
    """Three times as many tokens before the decoder's middle as after it: (288, 96) for 192 on average, 32 layers."""
    if average >= tokens:
        return {}
    middle = layers // 2
    first = min(tokens, max(1, round(1.5 * average)))
    second = max(1, round((layers * average - middle * first) / (layers - middle)))
    return {"visual_token_num": first, "layer_list": (middle,), "image_token_list": (min(first, second),)}


def single_stop(name: str, average: float, tokens: int, layers: int, stop: int) -> dict[str, Any]:
    """One cut after `stop` layers: n = (L average - K N) / (L - K).

    Raises:
        ValueError: Even one token behind the stop leaves more than the average.
    """
    if average >= tokens:
        return {}
    check_reachable(name, average, [stop], [tokens, 1], layers)
    count = round((layers * average - stop * tokens) / (layers - stop))
    return {"layer_list": (stop,), "image_token_list": (max(1, count),)}


def layer_average(stops: Sequence[int], counts: Sequence[float], layers: int) -> float:
    """Mean tokens per layer with ``counts[0]`` tokens before the first stop and ``counts[i + 1]`` after stop i."""
    spans = [end - start for start, end in zip([0, *stops], [*stops, layers], strict=True)]
    return sum(count * span for count, span in zip(counts, spans, strict=True)) / layers


def scaled_stops(shares: Sequence[float], layers: int) -> list[int]:
    """Stops at these shares of the decoder's depth, at least 1 and strictly increasing."""
    stops: list[int] = []
    for share in shares:
        stops.append(max(int(share * layers), stops[-1] + 1 if stops else 1))
    return stops


def check_reachable(name: str, average: float, stops: Sequence[int], least: Sequence[float], layers: int) -> None:
    """Raise ValueError where the fewest tokens possible still exceed the average, or a stop lies outside the model."""
    if stops[-1] >= layers:
        raise ValueError(f"method {name!r} needs stops after layers {list(stops)}; the model has only {layers} layers")
    floor = layer_average(stops, least, layers)
    if average < floor:
        raise ValueError(
            f"method {name!r} cannot average {average:g} tokens per layer: with all tokens before its first stop "
            f"(after layer {stops[0]} of {layers}) the least is {floor:.1f}"
        )
