"""An interpreter that forks programs of ours from a process which has imported what they need.

A program that answers spends its first seconds on importing torch and transformers, longer than on a few questions to a
tiny model. `forking_python()` starts one process that imports them once, and gives an interpreter that hands it the
command lines of those programs: each runs in a process of its own, in the caller's folder and environment and on its
terminal. To a program it is `sys.executable`, so the programs that one starts are forked too. All other command lines
run as they are. Signals do not reach the fork, so a test of them takes `sys.executable` (or has the fork send them to
its own children, as the driver of the fault tests does), and so does one of how a program starts.
"""

import atexit
import functools
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# How their command lines begin.
TESTS = Path(__file__).parent
PROGRAMS = ("-m apet", "-m apet.bench.proof", "-m llava.eval.model_vqa_loader",
            "-u -m llava.eval.model_vqa_loader", "-m llava.eval.model_vqa_mmbench", "-m llava.eval.model_vqa_science",
            "-m llava.eval.video_qa", "-m pytest", "-m torch.distributed.run", str(TESTS / "eval" / "fault_driver.py"),
            str(TESTS.parent / "scripts" / "host_tests.py"))  # fmt: skip


@functools.cache
def forking_python() -> Path:
    """The interpreter, one per test process, which ends with it."""
    folder = tempfile.TemporaryDirectory()
    address, python = Path(folder.name, "socket"), Path(folder.name, "python")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(address))
    listening.listen()
    real = shlex.quote(sys.executable)
    # Without `site`: the client needs nothing of it, and starts at once.
    client = f"{real} -S -E {shlex.quote(__file__)} {address}"
    known = " | ".join(f'"{beginning} "*' for beginning in PROGRAMS)
    python.write_text(f'#!/bin/sh\ncase "$* " in {known}) exec {client} "$@" ;; *) exec {real} "$@" ;; esac\n')
    python.chmod(0o755)
    root = str(Path(__file__).resolve().parents[1])
    server = subprocess.Popen(
        [sys.executable, __file__, str(listening.fileno())], stdin=subprocess.PIPE, pass_fds=[listening.fileno()],
        cwd=root, env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    listening.close()

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return python


def ask(address: str, words: list[str]) -> int:
    """Have a command line run; its exit status, 1 where it was killed."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
        request = json.dumps(request | {"python": str(Path(address).with_name("python"))}).encode()
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(request)
        return int(server.recv(16) or 1)


def serve(listening: socket.socket) -> None:
    """Fork for every request, until the test process closes its end of stdin."""
    import llava.eval.program  # noqa: F401  imports what the programs need

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: they say themselves how they ended
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            client.sendall(str(run(client)).encode())
            os._exit(0)
        client.close()


def run(client: socket.socket) -> int:
    """Become the program that was asked for; its exit status."""
    size, terminal, *_ = socket.recv_fds(client, 4, 3)
    request = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    for number, file in enumerate(terminal):
        os.dup2(file, number)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["python"]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    program, *sys.argv[1:] = [word for word in request["words"] if word != "-u"]
    try:
        if program == "-m":
            runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
