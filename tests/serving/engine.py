"""A small vLLM engine in this process, and `vllm serve` through scripts/serve.sh."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 4}
CACHE = 128 << 20  # bytes of KV cache
START_SECONDS = 300

# Set before vLLM is imported: functions may be sent to the model, nothing is fetched, and the scheduler of an engine
# runs in the process of the test, which saves a start of Python.
os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "HF_HUB_OFFLINE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@contextmanager
def engine(folder: Path, settings: dict | None = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM`, shut down at the end."""
    from vllm import LLM

    extra = {} if settings is None else {"additional_config": {"apet": settings}}
    llm = LLM(str(folder), kv_cache_memory_bytes=CACHE, **SMALL, **extra, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def in_model(llm: Any, function: Callable, **arguments: Any) -> Any:
    """`function(model, **arguments)` inside the worker; the result must be of plain types."""
    (result,) = llm.apply_model(functools.partial(function, **arguments))
    return result


def start(*flags: str, **environment: str) -> subprocess.Popen:
    """Start scripts/serve.sh with the interpreter of this process, in a process group of its own."""
    command = ["bash", str(ROOT / "scripts/serve.sh"), "--kv-cache-memory-bytes", str(CACHE), "--dtype", "float32"]
    # Blocks of the prefix cache shorter than a pruned prompt; the CPU default is 128 tokens.
    command += ["--block-size", "32", "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager", *flags]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"APET_VENV": "none", "PYTHON": sys.executable, "PATH": path, **environment}
    return subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@contextmanager
def server(log: Path, *flags: str, **environment: str) -> Iterator[str]:
    """The address of a server that answers; its output goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = start("--port", str(port), *flags, **environment)
    with log.open("w") as file:
        copy = subprocess.Popen(["cat"], stdin=process.stdout, stdout=file)
        try:
            _wait(address, process, log)
            yield address
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            copy.wait(60)


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                raise AssertionError(f"the server stopped: {log.read_text()[-3000:]}") from None
            time.sleep(0.5)
    raise AssertionError(f"no answer after {START_SECONDS} s: {log.read_text()[-3000:]}")


def get(address: str, path: str) -> tuple[int, str]:
    """Status and text of an address of the server."""
    with urllib.request.urlopen(f"{address}{path}", timeout=60) as response:
        return response.status, response.read().decode()


def metric(address: str, name: str) -> float:
    """A counter of the server's /metrics, summed over its labels."""
    lines = get(address, "/metrics")[1].splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
    assert values, f"no metric {name}"
    return sum(values)
