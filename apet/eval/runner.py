"""The only evaluation loop: shards, batches, worker processes, resume, and a record of the run beside the answers.

Answers are appended as they come, one flushed line each, so a killed run loses at most the batch in flight. A finished
file is in the order of the questions; order and content do not depend on batch size, workers or shards. While the model
answers a batch, worker processes prepare the following ones, a thread uploads the next, and another writes the last.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import shortuuid
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apet.eval.answerer import Answer, Answerer, Preparer, Uploader
from apet.eval.batches import Batch, BatchSize, ahead, batches
from apet.eval.benchmarks import Benchmark, Question
from apet.eval.benchmarks.files import write_text_atomic
from apet.eval.images import ImageError, Pictures
from apet.eval.run_options import RunOptions
from apet.eval.run_record import RunRecord


def split_balanced(items: Sequence, num_chunks: int) -> list[Sequence]:
    """Consecutive slices whose lengths differ by at most one; with fewer items than chunks some are empty."""
    size, extra = divmod(len(items), num_chunks)
    starts = [index * size + min(index, extra) for index in range(num_chunks + 1)]
    return [items[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def characters(question: Question) -> int:
    """Length of a prompt, as far as it is known without a tokenizer."""
    return len(question.prompt)


def run(
    benchmark: Benchmark,
    answerer: Answerer,
    options: RunOptions,
    questions: list[Question],
    length: Callable[[Question], int] = characters,
) -> RunRecord:
    """Answer the questions of this shard and write them to `options.answers_file`.

    Args:
        benchmark: Knows the answer line.
        answerer: Knows the model.
        options: How to run.
        questions: All questions of the file, as `benchmark.read` gives them.
        length: By what questions are sorted into batches, so that little is padded.

    Returns:
        The finished record, as written beside the answers (`X.jsonl` -> `X.run.json`).

    Raises:
        ValueError: An image that cannot be read (with on_error="stop"), or a resumed file of another run. Answers given
            so far stay in the file.
    """
    questions = questions[: options.limit]
    shard = split_balanced(questions, options.num_chunks)[options.chunk_idx]
    answers = AnswersFile(options.answers_file, benchmark.key_names)
    record = RunRecord.begin(options, answerer, len(shard))
    done = answers.open(shard, record, options.resume)
    todo = [index for index in range(len(shard)) if index not in done]
    try:
        _answer_all(benchmark, answerer, options, shard, todo, length, answers, record)
    finally:
        answers.close()
        record.save()
    answers.put_in_order(shard)
    record.finish()
    return record


def _answer_all(
    benchmark: Benchmark,
    answerer: Answerer,
    options: RunOptions,
    shard: Sequence[Question],
    todo: list[int],
    length: Callable[[Question], int],
    answers: "AnswersFile",
    record: RunRecord,
) -> None:
    size = BatchSize(options.batch_size, answerer.device)
    load = answerer.load if isinstance(answerer, Uploader) else list
    prepared = _loader(shard, _sorted(shard, todo, length, size), answerer.preparer, options, size)

    def write(batch: Batch, texts: list[Answer], seconds: float) -> None:
        for (index, _), answer in zip(batch.ready, texts, strict=True):
            answers.append(_line(benchmark, answerer, shard[index], answer))
        record.add(texts, seconds)
        record.save_sometimes()

    writer = Writer(write)
    try:
        with (
            closing(ahead(batches(prepared, size, load))) as coming,
            tqdm(total=len(shard), initial=len(shard) - len(todo), unit="q", desc=_label(options)) as bar,
        ):
            for batch in coming:
                for index, problem in batch.failures:
                    _report_failure(shard[index], problem, options, record)
                bar.update(len(batch.failures))
                waiting = [batch] if batch.ready else []
                while waiting:
                    part = waiting.pop(0)
                    start = time.perf_counter()
                    texts = _answer_if_it_fits(answerer, part.load(load))
                    if texts is None:
                        size.overflowed(len(part.ready))
                        waiting[:0] = part.halves()
                        continue
                    size.fitted(len(part.ready))
                    writer.put(part, texts, time.perf_counter() - start)
                    bar.update(len(part.ready))
    finally:
        writer.close()
        if size.auto:
            record.environment["batch_size"] = f"auto: {size.now}"


def _answer_if_it_fits(answerer: Answerer, batch: Batch) -> list[Answer] | None:
    """The answers, or None where the batch does not fit into the memory of the device."""
    try:
        return answerer.answer(batch.loaded) if batch.loaded is not None else None
    except torch.OutOfMemoryError:
        pass
    # Behind the except block, which holds on to the tensors of the failed call.
    torch.cuda.empty_cache()
    return None


class Writer:
    """Calls `write` in a thread, so that nobody waits for files. What goes wrong there is raised by the next call."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._entries: queue.Queue = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="apet-writer", daemon=True)
        self._thread.start()

    def put(self, *entry: Any) -> None:
        """Hand over the arguments of one call."""
        self._raise()
        self._entries.put(entry)

    def close(self) -> None:
        """Wait until everything is written."""
        self._entries.put(None)
        self._thread.join()
        self._raise()

    def _work(self) -> None:
        try:
            while (entry := self._entries.get()) is not None:
                self._write(*entry)
        except BaseException as error:
            self._error = error  # nothing is written behind it

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _line(benchmark: Benchmark, answerer: Answerer, question: Question, answer: Answer) -> dict[str, Any]:
    return benchmark.answer_line(question, answer.text, answer_id=shortuuid.uuid(), model_id=answerer.model_id)


def _label(options: RunOptions) -> str:
    name = Path(options.answers_file).stem
    return name if options.num_chunks == 1 else f"{name} ({options.chunk_idx + 1}/{options.num_chunks})"


def _report_failure(question: Question, problem: ImageError, options: RunOptions, record: RunRecord) -> None:
    if options.on_error == "stop":
        raise ValueError(
            f"question {question.question_id!r}: {problem}. Mend the file and continue with --resume, or leave such "
            "questions out with --on_error skip"
        )
    shown = {"image": question.image} if question.video is None else {"video": question.video}
    record.failures.append({"question_id": question.question_id, **shown, "error": str(problem)})


def _sorted(
    shard: Sequence[Question], todo: list[int], length: Callable[[Question], int], size: BatchSize
) -> list[int]:
    """Prompts of similar length together; an image is longer than any text.

    The longest come first: whether batches fit into memory shows at once.
    """
    if not size.auto and size.now == 1:
        return todo

    def place(index: int) -> tuple[bool, int]:
        question = shard[index]
        shown = (question.image, question.image_base64, question.video)
        return any(one is not None for one in shown), length(question)

    return sorted(todo, key=place, reverse=True)


def _loader(
    shard: Sequence[Question], order: list[int], preparer: Preparer, options: RunOptions, size: BatchSize
) -> DataLoader:
    """(index, prepared question or ImageError), one by one."""
    workers = min(options.num_workers, len(order))
    # Enough in flight to fill the next batch while one is answered.
    each = max(2, -(-2 * size.now // workers)) if workers else None
    return DataLoader(
        _Prepared(shard, preparer, options.image_folder), batch_size=None, sampler=order, collate_fn=_as_it_is,
        num_workers=workers, prefetch_factor=each,
    )  # fmt: skip


def _as_it_is(item: Any) -> Any:
    return item


class _Prepared(Dataset):
    """Prepared questions by index; what goes wrong with an image is returned, not raised, so that workers live on."""

    def __init__(self, questions: Sequence[Question], preparer: Preparer, image_folder: str) -> None:
        self._questions, self._preparer, self._folder = questions, preparer, image_folder

    def __getitem__(self, index: int) -> tuple[int, Any]:
        question = self._questions[index]
        try:
            return index, self._preparer.prepare(question, Pictures(question, self._folder))
        except ImageError as error:
            return index, error


def _question_key(question: Question) -> str:
    return json.dumps([question.question_id, question.text, question.fields.get("round_id")])


class AnswersFile:
    """A JSON-lines file of answers that can be continued.

    Args:
        path: The file.
        key_names: Where a line has the question's id and its text.
    """

    def __init__(self, path: str, key_names: tuple[str, str]) -> None:
        self.path = Path(path).expanduser()
        self._id_name, self._text_name = key_names
        self._file = None

    def open(self, questions: Sequence[Question], record: RunRecord, resume: bool) -> set[int]:
        """Start or continue the file; returns the indices of questions that already have an answer.

        A last line that a killed run left half-written is cut off.

        Raises:
            ValueError: With `resume`, the file belongs to other settings or to other questions.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done: set[int] = set()
        if resume and self.path.is_file() and self.path.stat().st_size > 0:
            record.continue_from(self.path)
            done = self._repair(questions)
        self._file = self.path.open("a" if done else "w", encoding="utf-8")
        record.save()
        return done

    def append(self, row: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system, so that a killed process loses nothing written."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Write everything out to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def put_in_order(self, questions: Sequence[Question]) -> None:
        """Sort the finished file into question order."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        place = {_question_key(question): index for index, question in enumerate(questions)}
        order = [place[self._key(json.loads(line))] for line in lines]
        if order != sorted(order):
            write_text_atomic(self.path, "".join(line for _, line in sorted(zip(order, lines, strict=True))))

    def _key(self, row: dict[str, Any]) -> str:
        """What identifies an answer: id, prompt and (MMBench) round. Question ids alone repeat in TextVQA."""
        return json.dumps([row.get(self._id_name), row.get(self._text_name), row.get("round_id")])

    def _repair(self, questions: Sequence[Question]) -> set[int]:
        place = {_question_key(question): index for index, question in enumerate(questions)}
        kept, done = [], set()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                whole = line.endswith("\n")
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.path} line {number} is not JSON: {error}; remove the line and resume"
                ) from None
            if not whole:
                break
            index = place.get(self._key(row))
            if index is None:
                raise ValueError(
                    f"{self.path} line {number} answers question {row.get(self._id_name)!r}, which is not among the "
                    "questions of this run; give another --answers-file, or leave out --resume to start anew"
                )
            if index not in done:
                kept.append(line)
                done.add(index)
        write_text_atomic(self.path, "".join(kept))
        return done


def merge_chunks(paths: Sequence[str | Path], target: str | Path) -> None:
    """Join the answers and run records of all shards, in shard order, into one file.

    Raises:
        ValueError: A shard that is missing or not finished.
    """
    records = [RunRecord.read_finished(path) for path in paths]
    text = "".join(Path(path).read_text(encoding="utf-8") for path in paths)
    write_text_atomic(target, text)
    RunRecord.joined(records, target).save()


def rank_options(options: RunOptions, chunks_given: bool) -> RunOptions:
    """Use the ranks of `torchrun` or `accelerate launch` as shards when no chunk flags were given."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if chunks_given or world == 1:
        return options
    rank = int(os.environ["RANK"])
    path = Path(options.answers_file)
    return replace(
        options, num_chunks=world, chunk_idx=rank, answers_file=str(path.with_name(f"{path.stem}.{world}_{rank}.jsonl"))
    )


def merge_ranks(options: RunOptions, answers_file: str) -> None:
    """After a run over ranks: wait for all, then let the first join the shards into the file that was asked for."""
    if options.answers_file == answers_file:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if options.chunk_idx == 0:
        stem = Path(answers_file)
        world = options.num_chunks
        merge_chunks([stem.with_name(f"{stem.stem}.{world}_{rank}.jsonl") for rank in range(world)], answers_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
