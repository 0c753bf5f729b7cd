"""The only evaluation loop: shards, batches, worker processes, resume, and a record of the run beside the answers.

Answers are appended as they come, one line each (`apet.eval.answers_file`), so a killed run loses at most the batch in
flight. A finished file is in the order of the questions; it is the same to the byte for every batch size, number of
workers or shards and after every interruption. While the model answers a batch, worker processes prepare the following
ones, a thread uploads the next, and another writes the last.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import shortuuid
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apet.eval.answerer import Answer, Answerer, Preparer, Uploader
from apet.eval.answers_file import AnswersFile, question_key, written_files
from apet.eval.batches import Batch, BatchSize, ahead, batches
from apet.eval.benchmarks import Benchmark, Question
from apet.eval.benchmarks.files import beside, refuse_inputs, write_text_atomic
from apet.eval.file_lock import FileLock
from apet.eval.images import ImageError, Pictures
from apet.eval.interrupts import Interrupted
from apet.eval.run_options import RunOptions
from apet.eval.run_record import RunRecord, unwritable


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
        ValueError: An image that cannot be read (with on_error="stop"), answers that nobody said to continue or to
            replace, or a resumed file of another run. Answers given so far stay in the file.
        OSError: The answers cannot be written, or another run is writing them.
        Interrupted: Ctrl-C, or SIGTERM where it raises `apet.eval.interrupts.Terminated`.
    """
    questions = numbered(questions)[: options.limit]
    shard = split_balanced(questions, options.num_chunks)[options.chunk_idx]
    with AnswersFile(options, benchmark.key_names) as answers:
        record = RunRecord.begin(options, answerer, len(shard))
        done = answers.begin(shard, record)
        todo = [index for index in range(len(shard)) if index not in done]
        try:
            _answer_all(benchmark, answerer, options, shard, todo, length, answers, record)
            answers.finish(shard)
        except KeyboardInterrupt as stop:
            answers.keep()
            raise Interrupted(answers.goes_on_with) from stop
        except BaseException as error:
            answers.keep()
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                raise _worker_ended(error, options, answers) from error
            raise
    return record


def _worker_ended(error: RuntimeError, options: RunOptions, answers: AnswersFile) -> ChildProcessError:
    return ChildProcessError(
        f"a process that prepares pictures was ended from outside, perhaps for want of memory ({error}); lower "
        f"--num_workers {options.num_workers} and go on with {answers.goes_on_with}"
    )


def check(benchmark: Benchmark, options: RunOptions, questions: list[Question]) -> None:
    """What `run` refuses about files and questions, before minutes go into loading a model.

    Raises:
        ValueError: As `run`.
        OSError: As `run`.
    """
    numbered(questions)
    with AnswersFile(options, benchmark.key_names):
        pass


def numbered(questions: Sequence[Question]) -> list[Question]:
    """The questions, each with how often its id stands before it.

    Raises:
        ValueError: One id is a number here and a text there; to the scorers they are the same.
    """
    seen: Counter[int | str] = Counter()
    spelled: dict[str, int | str] = {}
    found = []
    for question in questions:
        key = question.question_id
        first = spelled.setdefault(str(key), key)
        if type(first) is not type(key):
            raise ValueError(
                f"question_id {first!r} and question_id {key!r} are one id to the scorers; write all ids as numbers, "
                "or all as texts"
            )
        found.append(replace(question, occurrence=seen[key]))
        seen[key] += 1
    return found


def _answer_all(
    benchmark: Benchmark,
    answerer: Answerer,
    options: RunOptions,
    shard: Sequence[Question],
    todo: list[int],
    length: Callable[[Question], int],
    answers: AnswersFile,
    record: RunRecord,
) -> None:
    size = BatchSize(options.batch_size, answerer.device)
    load = answerer.load if isinstance(answerer, Uploader) else list
    prepared = _loader(shard, _sorted(shard, todo, length, size), answerer.preparer, options, size)
    writer = Writer(_write_batch(benchmark, answerer, shard, answers, record))
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


def _write_batch(
    benchmark: Benchmark, answerer: Answerer, shard: Sequence[Question], answers: AnswersFile, record: RunRecord
) -> Callable[[Batch, list[Answer], float], None]:
    """What writes a batch, its answers and the seconds they took."""
    run_digest = record.digest

    def write(batch: Batch, texts: list[Answer], seconds: float) -> None:
        for (index, _), answer in zip(batch.ready, texts, strict=True):
            question = shard[index]
            # Drawn from what is answered and how, so that the same run gives the same file to the byte.
            answer_id = shortuuid.uuid(name=json.dumps([run_digest, question_key(question)]))
            line = benchmark.answer_line(question, answer.text, answer_id=answer_id, model_id=answerer.model_id)
            answers.append(question, line, answer, seconds / len(texts))
        record.save_sometimes()

    return write


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
        self._pool = ThreadPoolExecutor(1, "apet-writer")
        self._failed, self._error = False, None

    def put(self, *entry: Any) -> None:
        """Hand over the arguments of one call."""
        self._raise()
        self._pool.submit(self._call, *entry)

    def close(self) -> None:
        """Wait until everything is written, also when Ctrl-C comes while waiting."""
        try:
            self._pool.shutdown()
        finally:
            self._pool.shutdown()
        self._raise()

    def _call(self, *entry: Any) -> None:
        if self._failed:
            return  # nothing is written behind an error
        try:
            self._write(*entry)
        except BaseException as error:
            self._failed, self._error = True, error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


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


def merge_chunks(paths: Sequence[str | Path], target: str | Path, *, overwrite: bool = False) -> None:
    """Join the answers and run records of all chunks of one run, in the order of the chunks, into one file.

    Args:
        paths: Answers files of the chunks, in any order.
        target: Where the joined answers go. An earlier join of the same settings is replaced.
        overwrite: Replace any other answers that are there, too.

    Raises:
        ValueError: A chunk that is missing, not finished, there twice or of another run; or answers that would be lost.
        OSError: The target cannot be written, or another run is writing it.
    """
    refuse_inputs(written_files(target), [name for path in paths for name in (path, RunRecord.path_for(path))])
    chunks = sorted(((RunRecord.read_finished(path), Path(path)) for path in paths), key=lambda one: one[0].chunk)
    record = RunRecord.joined([one for one, _ in chunks], target)
    text = "".join(_whole_chunk(path, chunk) for chunk, path in chunks)
    path = Path(os.path.realpath(Path(target).expanduser()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            if not overwrite and path.is_file() and path.stat().st_size > 0:
                _refuse_other_answers(target, record)
            write_text_atomic(path, text)
            record.save()
    except BlockingIOError:
        raise
    except OSError as error:
        raise unwritable(Path(target), error) from error


def _whole_chunk(path: Path, record: RunRecord) -> str:
    """The answers of a chunk, as many as its record has questions that did not fail."""
    text = path.expanduser().read_text(encoding="utf-8")
    answers, failures = text.count("\n"), len(record.failures)
    if answers + failures != record.questions or (text and not text.endswith("\n")):
        raise ValueError(
            f"{path} has {answers} answers and {failures} failures for {record.questions} questions; run its chunk "
            "with --resume"
        )
    return text


def _refuse_other_answers(target: str | Path, joined: RunRecord) -> None:
    path = RunRecord.path_for(target)
    if not path.is_file() or RunRecord.read(target).digest != joined.digest:
        raise ValueError(
            f"{target} holds answers of another run; replace them with --overwrite, or give another --answers-file"
        )


def rank_options(options: RunOptions, chunks_given: bool) -> RunOptions:
    """Use the ranks of `torchrun` or `accelerate launch` as shards when no chunk flags were given."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if chunks_given or world == 1:
        return options
    rank = int(os.environ["RANK"])
    return replace(
        options, num_chunks=world, chunk_idx=rank, answers_file=_rank_file(options.answers_file, world, rank)
    )


def _rank_file(answers_file: str, world: int, rank: int) -> str:
    return str(beside(answers_file, f".{world}_{rank}.jsonl"))


def merge_ranks(options: RunOptions, answers_file: str) -> None:
    """After a run over ranks: wait for all, then let the first join the shards into the file that was asked for."""
    if options.answers_file == answers_file:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if options.chunk_idx == 0:
        world = options.num_chunks
        parts = [_rank_file(answers_file, world, rank) for rank in range(world)]
        merge_chunks(parts, answers_file, overwrite=options.overwrite)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
