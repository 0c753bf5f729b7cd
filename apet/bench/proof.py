"""Everything that a GPU has to show, in one run of minutes: ``bash scripts/gpu_proof.sh``.

Parts run in the order of their worth until the time is used up; what is left out is recorded with the reason. Behind
each part one JSON file and one Markdown page are written anew, so that a run cut short gives what it has. A part that
fails is recorded with its traceback, the others go on, and the exit status is 1. ``--dry_run`` runs the same parts on
a CPU with small models and blocks.
"""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from apet.bench.__main__ import module_of, parser
from apet.bench.as_published import compress_as_published
from apet.bench.ceilings import described, measure_ceilings
from apet.bench.device import check_device, context_lost, default_dtype
from apet.bench.output import environment, markdown, table
from apet.bench.prefill import GRAPH
from apet.bench.presets import Preset, get_preset
from apet.bench.shapes import AS_PUBLISHED, Shape, block
from apet.compressor import compress
from apet.eval.benchmarks.files import write_json_atomic, write_text_atomic

_ROOT = Path(__file__).resolve().parents[2]
# A part starts only with this much time left: loading and warming up takes as long.
_LEAST_SECONDS = 12
# A table's own share of its part: two loops of measurements, the rest is loading, warming up and counting launches.
_LOOP_SHARE = 0.3
_WORD = "(PASSED|FAILED|ERROR|SKIPPED)"
# Lines of ``pytest -v`` in one process, and of several.
_ALONE = re.compile(rf"(?P<name>tests/\S+::.+?) (?P<word>{_WORD})( \(.*\))? +\[ *\d+%\]$")
_BESIDE = re.compile(rf"\[gw\d+\] \[ *\d+%\] (?P<word>{_WORD}) (?P<name>tests/\S+::.+?) *$")


@dataclass
class Session:
    """One run.

    Attributes:
        out: Folder of the JSON file, the page and the log of the tests.
        seconds: Time for all parts.
        device: What is measured.
        dry: Small models and blocks on a CPU.
        begun: `time.monotonic()` at the start.
        ceilings: Flags that hand the measured ceilings to every command.
        lost: A part left the CUDA context of this process unusable.
    """

    out: Path
    seconds: float
    device: torch.device
    dry: bool
    begun: float = field(default_factory=time.monotonic)
    ceilings: list[str] = field(default_factory=list)
    lost: bool = False
    _built: dict[str, tuple[Preset, nn.Module]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.begun)

    def bench(self, command: str, limit: float, *words: str) -> dict[str, Any]:
        """Run a command of `apet.bench` with these flags for about `limit` seconds."""
        common = ["--device", str(self.device), "--seconds", str(_LOOP_SHARE * limit)]
        if self.dry:
            common += ["--repeats", "1", "--warmup", "1"]
        args = parser(command).parse_args([*words, *common])
        if command == "compress":
            return module_of(command).run(args)
        preset, model = self.model(args.preset)
        return module_of(command).measure(preset, model, args)

    def model(self, name: str) -> tuple[Preset, nn.Module]:
        """A preset and its model; the one before makes room."""
        if name not in self._built:
            self.release()
            preset = get_preset(name).shrunk() if self.dry else get_preset(name)
            self._built[name] = preset, preset.build(self.device, default_dtype(self.device))
        return self._built[name]

    def release(self) -> None:
        """Forget the model; notice a lost context, which can free nothing."""
        self._built.clear()
        gc.collect()
        self.lost = context_lost(self.device)
        if self.device.type == "cuda" and not self.lost:
            torch.cuda.empty_cache()


class Target(NamedTuple):
    """What a figure of a part has to reach.

    Attributes:
        what: In words.
        part: Name of the part.
        path: Keys that lead to the figure.
        least: Smallest value that will do, None for no bound.
        most: Largest value that will do, None for no bound.
        beyond: Keys that lead to a figure that is taken off, such as the same of the model as it is.
    """

    what: str
    part: str
    path: tuple[str | int, ...]
    least: float | None = None
    most: float | None = None
    beyond: tuple[str | int, ...] | None = None

    def row(self, parts: Mapping[str, Any]) -> list[Any]:
        """What, goal, figure and whether it will do; empty where the part did not get that far."""
        value = _figure(parts.get(self.part), self.path)
        if value is not None and self.beyond is not None:
            value -= _figure(parts[self.part], self.beyond)
        goal = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        if value is None:
            return [self.what, goal, None, "not measured"]
        reached = value >= self.least if self.least is not None else value <= self.most
        return [self.what, goal, float(value), "yes" if reached else "no"]


def _figure(found: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        inside = isinstance(found, Mapping) and key in found
        found = found[key] if inside or (isinstance(found, Sequence) and len(found) > key) else None
    return found


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        seconds: What it may take.
        run: (session, seconds) -> figures, with "tables" for the page.
        own_process: It runs elsewhere and needs no CUDA context of this process.
    """

    seconds: float
    run: Callable[[Session, float], dict[str, Any]]
    own_process: bool = False


def _machine(session: Session, limit: float) -> dict[str, Any]:
    """The ceilings of the device, which the predictions of the other parts use."""
    found = measure_ceilings(session.device, default_dtype(session.device))
    session.ceilings = ["--tflops", str(found.flops / 1e12), "--gbytes", str(found.bandwidth / 1e9)]
    rows = [[described(found)]]
    return {"tables": [table("machine", ["measured"], rows)], **asdict(found)}


def _compress(dtype: str) -> Callable[[Session, float], dict[str, Any]]:
    def run(session: Session, limit: float) -> dict[str, Any]:
        shapes = ("1x576x1024:96", "1x96x4096:32", "4x576x1024:96", "16x576x1024:96")
        if session.dry:
            shapes = ("1x64x32:16", "2x64x32:16")
        found = session.bench(
            "compress", limit / len(shapes), "--shapes", ",".join(shapes), "--dtype", dtype, "--repeats", "20"
        )
        # Single samples: the formulas as published take long on a CPU.
        agreement = [_agreement(Shape.parse(shape), getattr(torch, dtype), session.device) for shape in shapes[:2]]
        columns = ["shape", "kept as on the CPU", "merged as on the CPU", "kept as published, float32"]
        rows = [list(one.values()) for one in agreement]
        return found | {"agreement": agreement, "tables": [*found["tables"], table(f"choices, {dtype}", columns, rows)]}

    return run


@torch.inference_mode()
def _agreement(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Shares of the tokens that are chosen as by the definition on the CPU and by the published formulas."""
    tokens = block(shape, device, dtype)
    here, there = compress(tokens, shape.keep, start=0), compress(tokens.cpu(), shape.keep, start=0)
    published = compress_as_published(tokens.cpu().float(), shape.keep)

    def same(first: torch.Tensor, second: torch.Tensor) -> float:
        return (first.cpu() == second.cpu()).float().mean().item()

    return {
        "shape": str(shape),
        "indices": same(here.indices, there.indices),
        "sources": same(here.sources, there.sources),
        AS_PUBLISHED: same(here.indices, published.indices),
    }


def _model(command: str, preset: str, batch: int, *words: str) -> Callable[[Session, float], dict[str, Any]]:
    """A part that runs a command on the model of a preset."""

    def run(session: Session, limit: float) -> dict[str, Any]:
        flags = ["--preset", preset, "--batch", "1" if session.dry else str(batch)]
        if command == "generate":
            flags += ["--repeats", "7", "--warmup", "1", "--new_tokens", "2,16"]
        else:
            graphs = session.device.type == "cuda" and preset == "llava-1.5-7b"
            flags += ["--repeats", "15", *session.ceilings, *["--cuda_graphs"] * graphs]
        return session.bench(command, limit, *flags, *words)

    return run


def _tests(session: Session, limit: float) -> dict[str, Any]:
    """The tests that need a GPU and those of the Triton kernels, in a process of their own that is ended at the limit.

    Raises:
        RuntimeError: A test failed, or none ran.
    """
    words = ["tests/test_patch_cuda.py", "tests/core", "tests/kernels", "-k", "cuda or triton"]
    if session.dry:
        words = ["tests/kernels", "-k", "first_of_equal"]
    if importlib.util.find_spec("xdist") is not None and not session.dry:
        words += ["-n", str(min(8, os.cpu_count() or 1))]
    log = session.out / "gpu_proof_tests.log"
    command = [sys.executable, "-m", "pytest", *words, "-v", "--color=no", "--tb=short", "-p", "no:cacheprovider"]
    with log.open("w", encoding="utf-8") as file:
        ran = subprocess.Popen(command, cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ended = ran.wait(limit)
        except subprocess.TimeoutExpired:
            ended = None
            os.killpg(ran.pid, signal.SIGKILL)
            ran.wait()
    results = read_results(log.read_text(encoding="utf-8"))
    counts = {word: list(results.values()).count(word) for word in sorted(set(results.values()))}
    rows = [[word, count] for word, count in counts.items()]
    failed = [name for name, word in results.items() if word in ("FAILED", "ERROR")]
    rows += [[f"failed: {name}", None] for name in failed]
    title = "tests on this device" + (f", ended after {limit:.0f} s" if ended is None else "")
    figures = {"tables": [table(title, ["outcome", "tests"], rows)], "exit_status": ended, "results": results}
    if failed or not counts.get("PASSED") or ended not in (0, None):
        raise PartFailed(f"{len(failed)} tests failed, pytest ended with {ended}; the log is {log.name}", figures)
    return figures


class PartFailed(RuntimeError):
    """A part that failed and has figures all the same."""

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message)
        self.figures = figures


def read_results(log: str) -> dict[str, str]:
    """Outcome of every test by name, from what ``pytest -v`` printed, in one process or several."""
    lines = (_ALONE.match(line) or _BESIDE.match(line) for line in log.splitlines())
    return {match["name"]: match["word"] for match in lines if match}


# By name, in the order of their worth.
PARTS: Mapping[str, Part] = {
    "machine": Part(10, _machine),
    "compress-bf16": Part(40, _compress("bfloat16")),
    "prefill-b1": Part(45, _model("prefill", "llava-1.5-7b", 1)),
    "prefill-b16": Part(45, _model("prefill", "llava-1.5-7b", 16, "--repeats", "10")),
    "generate-b1": Part(30, _model("generate", "llava-1.5-7b", 1)),
    "tests": Part(60, _tests, own_process=True),
    "next-b4": Part(45, _model("prefill", "llava-next-7b", 4, "--repeats", "8")),
    "qwen-b1": Part(35, _model("prefill", "qwen2.5-vl-7b", 1)),
    "prefill-b4": Part(40, _model("prefill", "llava-1.5-7b", 4)),
    "generate-b16": Part(40, _model("generate", "llava-1.5-7b", 16, "--no_published")),
    "compress-fp32": Part(40, _compress("float32")),
    "qwen-b4": Part(35, _model("prefill", "qwen2.5-vl-7b", 4)),
}


_APET, _GRAPHED = ("batches", 0, "calls", "apet"), ("batches", 0, "calls", "apet" + GRAPH)
_SHARE = ("batches", 0, "components", "apet", "selector_share")
TARGETS = (
    Target("selectors' share of the compressed prefill, batch 1", "prefill-b1", _SHARE, most=0.03),
    Target("the same, batch 16", "prefill-b16", _SHARE, most=0.01),
    Target("times `compress` waits for the GPU", "compress-bf16",
           ("shapes", 0, "calls", "apet", "launches", "syncs"), most=0),
    Target("times a compressed prefill waits for the GPU beyond none", "prefill-b1", (*_APET, "launches", "syncs"),
           most=0, beyond=("batches", 0, "calls", "none", "launches", "syncs")),
    Target("the same, CUDA graphs", "prefill-b1", (*_GRAPHED, "launches", "syncs"), most=0),
    Target("time to first token over none, batch 1, CUDA graphs", "prefill-b1",
           (*_GRAPHED, "speedup", "median"), least=1.8),
    Target("the same, batch 16, without graphs", "prefill-b16", (*_APET, "speedup", "median"), least=3),
    Target("answers of 2 tokens over none, batch 1", "generate-b1",
           ("batches", 0, "calls", 0, "apet", "speedup", "median"), least=1.46),
    Target("LLaVA-NeXT, time to first token over none, batch 4", "next-b4", (*_APET, "speedup", "median"), least=4),
    Target("time to first token over the published pipeline, batch 1", "prefill-b1",
           (*_APET, "over_published", "median"), least=3),
    Target("the same, batch 16", "prefill-b16", (*_APET, "over_published", "median"), least=8),
)  # fmt: skip


def run_parts(session: Session, names: Sequence[str]) -> dict[str, Any]:
    """Run parts in turn and write what is known behind each; returns it."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    parts = {name: {"status": "not started"} for name in names}
    report = {"date": started, "seconds": session.seconds, "dry_run": session.dry, "environment": _environment(),
              "parts": parts}  # fmt: skip
    for name in names:
        left = session.left
        if left < _LEAST_SECONDS:
            parts[name] = {"status": "skipped", "reason": f"{left:.0f} s were left of {session.seconds:.0f} s"}
        elif session.lost and not PARTS[name].own_process:
            parts[name] = {"status": "skipped", "reason": "the CUDA context is lost since a part before failed"}
        else:
            parts[name] = {"status": "running"}
            _write(session, report)
            parts[name] = _run_part(session, PARTS[name], min(PARTS[name].seconds, left))
        _write(session, report)
        print(f"[apet] {name}: {_outcome(parts[name])}", file=sys.stderr, flush=True)
    return report


def _run_part(session: Session, part: Part, limit: float) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        found = {"status": "done", **part.run(session, limit)}
    except Exception as error:  # whatever it is: recorded, and the parts behind it are worth having
        figures = error.figures if isinstance(error, PartFailed) else {}
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", **figures}
        found["traceback"] = traceback.format_exc()
        session.release()
    return found | {"took": round(time.monotonic() - begun, 1)}


def _outcome(part: Mapping[str, Any]) -> str:
    took = f", {part['took']} s" if "took" in part else ""
    reason = f": {part['reason'].splitlines()[0]}" if "reason" in part else ""
    return f"{part['status']}{took}{reason}"


def _environment() -> dict[str, Any]:
    """Versions and hardware; the driver's from its own tool."""
    found = environment()
    for name in ("triton", "accelerate"):
        spec = importlib.util.find_spec(name)
        found[name] = importlib.metadata.version(name) if spec is not None else None
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None
        found["GPU memory GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    found["system"] = platform.system()
    return found


def _write(session: Session, report: Mapping[str, Any]) -> None:
    write_json_atomic(session.out / "gpu_proof.json", report, indent=1)
    write_text_atomic(session.out / "gpu_proof.md", page(report))


def page(report: Mapping[str, Any]) -> str:
    """The run as a Markdown page."""
    parts = report["parts"]
    rows = [
        [name, part["status"], part.get("took"), part.get("reason", "").split("\n")[0]] for name, part in parts.items()
    ]
    targets = [target.row(parts) for target in TARGETS]
    tables = [
        table("targets", ["", "goal", "measured", "reached"], targets),
        table("parts", ["", "status", "seconds", "why"], rows),
    ]
    head = f"# Proof on a GPU\n\nWritten by `bash scripts/gpu_proof.sh` on {report['date']}"
    head += ", a dry run with small models" if report["dry_run"] else ""
    text = [head + "; `docs/performance.md` says what is measured and how.\n", markdown(tables, report["environment"])]
    for name, part in parts.items():
        if part.get("tables"):
            text.append(f"## {name}\n\n" + markdown(part["tables"], {}).lstrip())
    return "\n".join(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    flags = argparse.ArgumentParser(prog="python -m apet.bench.proof", description=__doc__.splitlines()[0])
    flags.add_argument("--out", default="runs/gpu_proof", help="folder of gpu_proof.json and gpu_proof.md")
    flags.add_argument("--seconds", type=float, default=480, help="time for all parts")
    flags.add_argument("--parts", default=",".join(PARTS), help="which, in this order, separated by commas")
    flags.add_argument("--dry_run", action="store_true", help="small models on a CPU")
    args = flags.parse_args(argv)
    args.parts = args.parts.replace(",", " ").split()
    for name in args.parts:
        if name not in PARTS:
            flags.error(f"unknown part {name!r}; choose from {', '.join(PARTS)}")
    if not args.seconds > 0:
        flags.error(f"--seconds {args.seconds} must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 if a part failed, 2 for what the user can mend."""
    args = parse_args(argv)
    try:
        device = check_device("cpu" if args.dry_run else "cuda")
    except ValueError as error:
        print(f"python -m apet.bench.proof: error: {error}, or --dry_run", file=sys.stderr)
        return 2
    out = Path(args.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    session = Session(out, args.seconds, device, args.dry_run)
    report = run_parts(session, args.parts)
    print(page({**report, "parts": {name: part | {"tables": ()} for name, part in report["parts"].items()}}))
    print(json.dumps({name: part["status"] for name, part in report["parts"].items()}))
    return int(any(part["status"] == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
