"""A process that runs the question-file program again and again, each time in a fork of its own that may be killed.

Everything is real but the model: flags, runner, worker processes, files, signals. Reads one JSON request per line from
stdin, answers with one JSON line. Forking a process that has imported everything takes milliseconds, so many ends of a
run can be tried. Fields of a request:

    argv     flags of llava.eval.model_vqa_loader
    kill     [signal, questions asked before it is sent, seconds after that, "process" or "group"]
    line     the process ends as by SIGKILL before the so-manieth line of the modules that write files; 0: it does not,
             and the reply says how many "lines" it passed
    half     the process ends as by SIGKILL when the so-manieth line of a file is half written
    most     bytes a file may have, after which the system refuses to write
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import llava.eval.program as program
from apet.eval import journal, run_record
from apet.eval.answerer import Answer
from llava.eval import model_vqa_loader

READING = ("iterate_jsonl", "read_jsonl", "require_keys")  # of the questions: nothing is written yet
WRITING = ("answers_file.py", "journal.py", "run_record.py", "file_lock.py", "files.py")
STILL_THERE = os.WEXITED | os.WNOHANG | os.WNOWAIT
SECONDS_PER_QUESTION = 0.005


class Preparer:
    """Opens the picture in a worker process; one that is called fatal.png ends its process."""

    videos = False

    def prepare(self, question, images):
        if question.image.endswith("fatal.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return question.prompt, images[0].size


class StandIn:
    """Answers with the picture's size, and notes in the file ASKED that it was asked; takes its time if it is given."""

    model_id, device = "stand-in", "cpu"

    def __init__(self, asked: str, words: int, seconds: float) -> None:
        self.preparer, self._asked, self._words, self._seconds = Preparer(), asked, words, seconds

    def answer(self, prepared):
        with open(self._asked, "a") as file:
            file.write("." * len(prepared))
        time.sleep(self._seconds * len(prepared))
        filling = " and more" * self._words
        return [Answer(f"{text} {size}{filling}", len(text), float(size[0])) for text, size in prepared]

    def settings(self):
        return {"model_path": "stand-in", "words": self._words}


def end_at(line: int, passed: list[int]) -> None:
    """End this process before the so-manieth line of the modules that write files; counts the lines in `passed`."""

    def local(frame, kind, _):
        if kind == "line":
            passed[0] += 1
            if passed[0] == line:
                os._exit(9)
        return local

    def watch(frame, *_):
        code = frame.f_code
        return local if os.path.basename(code.co_filename) in WRITING and code.co_name not in READING else None

    threading.settrace(watch)
    sys.settrace(watch)


class HalfFile:
    """A file of which one line is written half before the process ends."""

    left = 0

    def __init__(self, file) -> None:
        self._file = file

    def write(self, line) -> int:
        HalfFile.left -= 1
        if HalfFile.left == 0:
            self._file.write(line[: len(line) // 2])
            os._exit(9)
        return self._file.write(line)

    def __getattr__(self, name):
        return getattr(self._file, name)


def write_half(line: int) -> None:
    HalfFile.left, plain = line, journal.LineFile.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        self._file = HalfFile(self._file)

    journal.LineFile.__init__ = init


def child(request: dict) -> None:
    """Run the program; never returns."""
    with open(request["log"], "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # Only a run that is to be met by a signal has to last.
    seconds = SECONDS_PER_QUESTION if "kill" in request else 0
    program._local_answerer = lambda args: StandIn(request["asked"], request.get("words", 0), seconds)
    if "most" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["most"], request["most"]))
    if "half" in request:
        write_half(request["half"])
    passed = [0]
    if "line" in request:
        end_at(request["line"], passed)
    parser = model_vqa_loader.parser()
    os.write(request["ready"], b".")
    status = program.main(parser, request["argv"])
    sys.settrace(None)
    sys.stderr.flush()
    os.write(request["ready"], json.dumps(passed[0]).encode())
    os._exit(status)


def serve(request: dict) -> dict:
    """Fork, perhaps kill, wait."""
    ready, request["ready"] = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        try:
            child(request)
        except BaseException as error:  # what the program let through: a traceback for its user
            os.write(2, f"Traceback: {error!r}\n".encode())
            os._exit(99)
    os.read(ready, 1)
    if "kill" in request:
        number, asked, seconds, target = request["kill"]
        while os.path.getsize(request["asked"]) < asked and os.waitid(os.P_PID, process, STILL_THERE) is None:
            time.sleep(0.001)
        time.sleep(seconds)
        try:
            (os.kill if target == "process" else os.killpg)(process, number)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(process, 0)
    os.close(request["ready"])
    lines = int(os.read(ready, 20) or 0)
    os.close(ready)
    log = Path(request["log"]).read_text(errors="replace")
    return {"status": os.waitstatus_to_exitcode(status), "log": log, "lines": lines}


if __name__ == "__main__":
    run_record.machine("cpu")  # looks up versions, once for all forks
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
