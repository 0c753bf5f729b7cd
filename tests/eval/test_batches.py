"""Batches made ahead of the model: sizes that fit, order, errors of the threads, uploads."""

import json
import threading
import time

import pytest
import torch
from eval.test_runner import ShapeAnswerer, answer, data, read  # noqa: F401 - data is a fixture

from apet.eval.batches import CPU_BATCH_SIZE, Batch, BatchSize, ahead, batches
from apet.eval.cli import add_runner_flags
from apet.eval.images import ImageError
from apet.eval.runner import Writer
from apet.eval.scoring_cli import Parser


class SmallDevice(ShapeAnswerer):
    """Runs out of memory with more than `limit` questions; uploads in the thread it is asked in."""

    def __init__(self, limit: int, device: str = "cuda", upload_limit: int = 99) -> None:
        super().__init__()
        self.limit, self.device, self.upload_limit = limit, device, upload_limit
        self.threads, self.failed = [], []

    def load(self, prepared):
        self.threads.append(threading.current_thread().name)
        if len(prepared) > self.upload_limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ("uploaded", prepared)

    def answer(self, loaded):
        state, prepared = loaded
        assert state == "uploaded"
        if len(prepared) > self.limit:
            self.failed.append(len(prepared))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().answer(prepared)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 8, 100])
def test_auto_halves_until_it_fits_and_loses_nothing(data, limit):  # noqa: F811
    expected = answer(data, name="expected.jsonl")
    answerer = SmallDevice(limit)
    assert answer(data, answerer, batch_size="auto") == expected
    assert sum(answerer.batches) == 10
    assert max(answerer.batches) <= limit
    assert max(answerer.batches) > min(limit, 8) / 2
    size = json.loads((data / "answers.run.json").read_text())["environment"]["batch_size"]
    assert size == f"auto: {16 if limit >= 8 else 2 ** (limit.bit_length() - 1)}"


def test_an_upload_that_does_not_fit_is_tried_again(data):  # noqa: F811
    expected = answer(data, name="expected.jsonl")
    answerer = SmallDevice(100, upload_limit=2)
    assert answer(data, answerer, batch_size="auto") == expected
    assert max(answerer.batches) == 2


def test_the_next_batch_is_uploaded_by_a_thread(data):  # noqa: F811
    answerer = SmallDevice(100)
    answer(data, answerer, batch_size=3)
    assert answerer.threads == ["apet-batches_0"] * 4


def test_auto_on_a_cpu_is_a_stated_number(data):  # noqa: F811
    answerer = ShapeAnswerer()
    answer(data, answerer, batch_size="auto")
    assert answerer.batches == [CPU_BATCH_SIZE, 10 - CPU_BATCH_SIZE]


def test_a_size_that_the_user_chose_is_not_changed(data):  # noqa: F811
    with pytest.raises(ValueError, match="a batch of 5 does not fit .*--batch_size auto"):
        answer(data, SmallDevice(3), batch_size=5)


def test_what_was_answered_stays_when_nothing_fits_any_more(data):  # noqa: F811
    class Shrinking(SmallDevice):
        def answer(self, loaded):
            texts = super().answer(loaded)
            self.limit = 0
            return texts

    with pytest.raises(ValueError, match="a single question does not fit"):
        answer(data, Shrinking(8), batch_size="auto")
    assert len(read(data / "answers.jsonl")) == 8
    assert json.loads((data / "answers.run.json").read_text())["status"] == "running"


def test_sizes_grow_while_they_fit():
    size = BatchSize("auto", "cuda:1")
    seen = []
    for _ in range(7):
        seen.append(size.now)
        size.fitted(size.now)
    assert seen == [8, 16, 32, 64, 128, 256, 256]
    size.overflowed(100)
    size.fitted(50)
    assert size.now == 50  # never again as many as did not fit


def test_batches_keep_order_and_failures():
    broken = ImageError("broken")
    made = list(batches([(3, "a"), (1, broken), (2, "b"), (0, "c")], BatchSize(3, "cpu"), len))
    assert made == [Batch([(3, "a"), (2, "b")], [(1, broken)], 2), Batch([(0, "c")], [], 1)]


def test_ahead_makes_two_items_more_than_were_asked_for():
    made = []

    def work():
        for item in range(10):
            made.append(item)
            yield item

    items = ahead(work())
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]  # two wait
    items.close()
    assert not any(thread.name.startswith("apet-batches") for thread in threading.enumerate())


def test_an_error_ahead_comes_in_its_turn():
    def work():
        yield 1
        raise OSError("disk")

    items = ahead(work())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk"):
        next(items)


def test_an_error_of_the_writer_is_raised_and_nothing_is_written_behind_it():
    written = []

    def write(item):
        if item == 1:
            raise OSError("disk full")
        written.append(item)

    writer = Writer(write)
    with pytest.raises(OSError, match="disk full"):
        for item in range(3):
            writer.put(item)
        writer.close()
    writer.close()
    assert written == [0]


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("16", 16)])
def test_the_flag(word, value):
    parser = Parser()
    add_runner_flags(parser)
    assert parser.parse_args(["--batch_size", word]).batch_size == value


@pytest.mark.parametrize("size", ["many", 0, "0"])
def test_sizes_that_cannot_be(data, size):  # noqa: F811
    with pytest.raises(ValueError, match="at least 1, or auto"):
        answer(data, batch_size=size)
