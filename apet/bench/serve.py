"""Requests/s, time to the first token and tokens/s of a server with ApET, beside the same server without.

Every concurrency is measured twice: with a new picture in every request, and with a few pictures that come back with
other questions, which a server answers from its encoder and prefix caches. Pictures are made and encoded before the
clock starts; answers have a fixed length (vLLM's `ignore_eos`). The first token counts from sending the request.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from apet.bench.output import table
from apet.eval.benchmarks.files import user_path
from apet.eval.endpoint import Completion, Endpoint, Message
from apet.eval.server import conversation, picture_url, server_settings

DISTINCT, REPEATED = "distinct", "repeated"
_GRAIN = 16  # pixels per value of a picture's noise: compresses to the size of a photograph


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        images: "distinct" or "repeated".
        concurrency: Requests under way at a time.
        requests: Requests timed.
        requests_per_second: Finished requests over the wall time.
        first_token_ms: Median time to the first token.
        first_token_ms_p99: Its 99th percentile.
        tokens_per_second: Generated tokens of all requests over the wall time.
        prompt_tokens: Mean length of the prompts, as the server counts.
        cached: Share of the prompt tokens that the server took from its prefix cache; None if it does not say.
    """

    images: str
    concurrency: int
    requests: int
    requests_per_second: float
    first_token_ms: float
    first_token_ms_p99: float
    tokens_per_second: float
    prompt_tokens: float
    cached: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("--server", required=True, metavar="URL", help="server with ApET (scripts/serve.sh)")
    parser.add_argument(
        "--baseline", metavar="URL|FILE", help="the same server without ApET, or the --json file of its own measurement"
    )
    parser.add_argument("--model", help="id of the model, if a server has several")
    parser.add_argument("--concurrency", default="1,4,16,64", help="requests under way at a time, separated by commas")
    parser.add_argument("--requests", type=int, help="requests per measurement (4 times the concurrency, at least 16)")
    parser.add_argument("--max_tokens", type=int, default=32, help="length of every answer")
    parser.add_argument("--size", default="640x480", help="width and height of the pictures")
    parser.add_argument("--pictures", type=int, default=4, help="pictures that come back in the repeated case")
    parser.add_argument("--seed", type=int, help="of the pictures; a new one each time, so that no cache knows them")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return a table with the figures it was made of.

    Raises:
        ValueError: A flag that cannot be, a server that fails, or a baseline measured otherwise.
    """
    levels = _numbers("--concurrency", args.concurrency.split(","))
    width, height = _numbers("--size", args.size.split("x"), 2)
    for name in ("requests", "max_tokens", "pictures"):
        if getattr(args, name) is not None:
            _numbers(f"--{name}", [getattr(args, name)])
    work = {"concurrency": levels, "requests": args.requests, "max_tokens": args.max_tokens, "size": [width, height]}
    work["pictures"] = args.pictures
    earlier = _earlier(args.baseline, work) if args.baseline and "://" not in args.baseline else None
    addresses = [args.server, *([args.baseline] if args.baseline and earlier is None else [])]
    servers = [Server.open(address, args.model, args.max_tokens) for address in addresses]
    pictures = Pictures(width, height, time.time_ns() % 2**32 if args.seed is None else args.seed)

    figures: list[list[Figure]] = [[] for _ in servers]
    for images in (DISTINCT, REPEATED):
        for concurrency in levels:
            number = args.requests or max(16, 4 * concurrency)
            for server, found in zip(servers, figures, strict=True):
                found.append(server.measure(images, concurrency, number, pictures, args.pictures))
    results = [
        {"settings": server.settings, "figures": [asdict(one) for one in found]}
        for server, found in zip(servers, figures, strict=True)
    ]
    if earlier is not None:
        results.append(earlier)
    title = f"serving {servers[0].model}, pictures of {args.size}, answers of {args.max_tokens} tokens"
    return {"work": work, "servers": results, "tables": [_table(title, results)]}


class Pictures:
    """Pictures of coloured noise, each from a number of its own, none twice.

    Args:
        width: Pixels.
        height: Pixels.
        seed: Sets of pictures with different seeds share none.
    """

    def __init__(self, width: int, height: int, seed: int) -> None:
        self._width, self._height, self._seed, self._made = width, height, seed, 0

    def new(self) -> str:
        """The next picture, as a data URL."""
        self._made += 1
        generator = np.random.default_rng([self._seed, self._made])
        coarse = generator.integers(0, 256, (self._height // _GRAIN + 1, self._width // _GRAIN + 1, 3), dtype=np.uint8)
        return picture_url(Image.fromarray(coarse).resize((self._width, self._height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Server:
    """A server under test.

    Attributes:
        endpoint: Its address; a failed request ends the measurement.
        model: Id of the model.
        settings: What it says about its compression; None if it says nothing.
        max_tokens: Length of the answers.
    """

    endpoint: Endpoint
    model: str
    settings: Mapping[str, Any] | None
    max_tokens: int

    @classmethod
    def open(cls, address: str, model: str | None, max_tokens: int) -> "Server":
        """Connect.

        Raises:
            EndpointError: No server there, or another model.
        """
        endpoint = Endpoint(address, attempts=1)
        return cls(endpoint, endpoint.model_id(model), server_settings(endpoint), max_tokens)

    def measure(self, images: str, concurrency: int, number: int, pictures: Pictures, repeated: int) -> Figure:
        """Time `number` requests; before, as many as run at a time do not count, nor each picture's first."""
        again = [pictures.new() for _ in range(repeated)] if images == REPEATED else None
        warm = max(concurrency, repeated) if again else concurrency
        urls = (again[index % repeated] if again else pictures.new() for index in range(warm + number))
        asked = [conversation(f"{index}: what do you see?", [url]) for index, url in enumerate(urls)]
        list(self._answers(asked[:warm], concurrency))
        start = time.perf_counter()
        answers = list(self._answers(asked[warm:], concurrency))
        return _figure(images, concurrency, answers, time.perf_counter() - start)

    def _answers(self, asked: Sequence[Sequence[Message]], concurrency: int) -> Iterator[Completion]:
        endpoint = replace(self.endpoint, concurrency=concurrency)
        options = {"max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}
        # Past its end a model writes special tokens, and tokens without text have no first one to time.
        options["skip_special_tokens"] = False
        return endpoint.complete_all(asked, model=self.model, stream=True, **options)


def _figure(images: str, concurrency: int, answers: Sequence[Completion], seconds: float) -> Figure:
    """Summary of timed answers.

    Raises:
        ValueError: An answer without text or without counts.
    """
    for one in answers:
        if one.first_token_seconds is None or not one.completion_tokens or not one.prompt_tokens:
            raise ValueError(
                f"an answer came without text or token counts ({one.usage or 'no usage'}); the server must stream text "
                "and honour stream_options.include_usage"
            )
    first = [1000 * one.first_token_seconds for one in answers]
    prompt = sum(one.prompt_tokens for one in answers)
    details = [one.usage.get("prompt_tokens_details") for one in answers]
    known = all(isinstance(one, Mapping) and one.get("cached_tokens") is not None for one in details)
    return Figure(
        images,
        concurrency,
        len(answers),
        len(answers) / seconds,
        statistics.median(first),
        float(np.percentile(first, 99)),
        sum(one.completion_tokens for one in answers) / seconds,
        prompt / len(answers),
        sum(one["cached_tokens"] for one in details) / prompt if known else None,
    )


def _table(title: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row per case; with a baseline its figures stand behind a slash, and the gains in columns of their own."""
    names = [
        "requests_per_second",
        "first_token_ms",
        "first_token_ms_p99",
        "tokens_per_second",
        "prompt_tokens",
        "cached",
    ]
    columns = ["pictures", "at a time", "requests/s", "first token ms, median", "p99", "tokens/s", "prompt tokens"]
    columns += ["from prefix cache"]
    both = len(results) == 2
    if both:
        columns += ["requests/s gain", "first token gain"]
    rows = []
    for cases in zip(*(one["figures"] for one in results), strict=True):
        row = [cases[0]["images"], cases[0]["concurrency"]]
        row += [" / ".join(_short(name, case[name]) for case in cases) for name in names]
        if both:
            ours, base = cases
            row.append(ours["requests_per_second"] / base["requests_per_second"])
            row.append(base["first_token_ms"] / ours["first_token_ms"])
        rows.append(row)
    return table(title + (" (with ApET / without)" if both else ""), columns, rows)


def _short(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.0%}" if name == "cached" else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _earlier(path: str, work: Mapping[str, Any]) -> dict[str, Any]:
    """The measurement in a --json file of this command.

    Raises:
        ValueError: Another file, or one of another amount of work.
    """
    try:
        content = json.loads(user_path(path).read_text(encoding="utf-8"))
        found, (server, *_) = content["work"], content["servers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--baseline {path} is no file of `apet.bench serve --json`: {error!r}") from None
    for name, value in work.items():
        if found.get(name) != value:
            raise ValueError(f"--baseline {path} was measured with {name} {found.get(name)}, this run has {value}")
    return server


def _numbers(name: str, words: Sequence[Any], count: int | None = None) -> list[int]:
    """Positive integers.

    Raises:
        ValueError: Something else, or not `count` of them.
    """
    try:
        values = [int(word) for word in words]
    except ValueError:
        values = []
    if not values or min(values) < 1 or (count is not None and len(values) != count):
        raise ValueError(f"{name} {','.join(map(str, words))} must be positive whole numbers")
    return values
