"""Answers files: what is refused, what is replaced, who holds the lock, what is joined, what the record says."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from eval import test_runner
from eval.test_runner import ROOT, ShapeAnswerer, answer, options, read

from apet.eval import file_lock, merge, run_record
from apet.eval.benchmarks import get_benchmark
from apet.eval.benchmarks.files import record_path
from apet.eval.file_lock import FileLock
from apet.eval.interrupts import Interrupted
from apet.eval.journal import Journal
from apet.eval.run_record import RunRecord
from apet.eval.runner import check, merge_chunks, run
from llava.eval import eval_science_qa

data = test_runner.data  # a fixture


def record_of(data: Path, name: str = "answers") -> dict:
    return json.loads((data / f"{name}.run.json").read_text())


class TestAnswersThatAreThere:
    def test_are_left_alone_without_a_word_about_them(self, data):
        answer(data)
        before = (data / "answers.jsonl").read_bytes(), record_of(data)
        with pytest.raises(ValueError, match=r"answers\.jsonl holds answers already.*--resume.*--overwrite"):
            answer(data)
        assert ((data / "answers.jsonl").read_bytes(), record_of(data)) == before

    def test_stay_until_a_new_answer_is_there(self, data):
        answer(data)
        before = (data / "answers.jsonl").read_bytes(), record_of(data)
        (data / "images" / "0.png").unlink()
        with pytest.raises(ValueError, match=r"0\.png does not exist"):
            answer(data, ShapeAnswerer(temperature=1), overwrite=True)
        assert ((data / "answers.jsonl").read_bytes(), record_of(data)) == before

    def test_stay_where_no_question_can_be_answered(self, data):
        answer(data)
        before = (data / "answers.jsonl").read_bytes(), record_of(data)
        shutil.rmtree(data / "images")
        with pytest.raises(ValueError, match=r"no answer, so .*keeps those it has; the first failure: .*0\.png"):
            answer(data, overwrite=True, on_error="skip")
        assert ((data / "answers.jsonl").read_bytes(), record_of(data)) == before

    def test_are_replaced_by_others(self, data):
        first = answer(data)
        second = answer(data, ShapeAnswerer(temperature=1), overwrite=True, limit=3)
        assert second == first[:3] and record_of(data)["settings"]["temperature"] == 1
        assert record_of(data)["counts"]["answers"] == 3 and "replaces" not in record_of(data)

    def test_are_never_mixed_with_those_that_replace_them(self, data, monkeypatch):
        """Killed when the record was already the new one, and the answers still the old ones."""
        answer(data)
        before = (data / "answers.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(Interrupted) as stop:
                answer(data, ShapeAnswerer(temperature=1), overwrite=True)
        assert stop.value.flag == "--overwrite"
        assert (data / "answers.jsonl").read_bytes() == before and record_of(data)["settings"]["temperature"] == 1
        with pytest.raises(ValueError, match="other settings"):
            answer(data, resume=True)
        answerer = ShapeAnswerer(temperature=1)
        answer(data, answerer, resume=True)
        assert sum(answerer.batches) == 10 and record_of(data)["counts"]["answers"] == 10
        assert not set((data / "answers.jsonl").read_bytes().splitlines()) & set(before.splitlines())

    def test_no_other_file_is_taken_for_answers(self, data):
        path = data / "notes.jsonl"
        for content in (b"my notes\n", b"\x89PNG", b'{"a": 1}\n', b"[1]\n"):
            path.write_bytes(content)
            for flags in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(ValueError, match="holds answers already|has no record|is no answers file"):
                    answer(data, name="notes.jsonl", **flags)
            assert path.read_bytes() == content

    def test_both_ways_at_once_are_refused(self, data):
        with pytest.raises(ValueError, match="give one"):
            options(data, resume=True, overwrite=True)

    def test_a_link_is_written_through(self, data):
        (data / "far").mkdir()
        (data / "answers.jsonl").symlink_to(data / "far" / "real.jsonl")
        expected = answer(data, name="plain.jsonl")
        assert answer(data) == expected
        assert (data / "answers.jsonl").is_symlink() and read(data / "far" / "real.jsonl") == expected


class TestInputs:
    SPELLINGS = ("questions.jsonl", "images/../questions.jsonl", "link.jsonl", "hard.jsonl")

    @pytest.mark.parametrize("name", SPELLINGS)
    @pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
    def test_questions_are_no_place_for_answers(self, data, name, flags):
        (data / "link.jsonl").symlink_to(data / "questions.jsonl")
        os.link(data / "questions.jsonl", data / "hard.jsonl")
        before = (data / "questions.jsonl").read_bytes()
        with pytest.raises(ValueError, match="would be written, but it is an input"):
            answer(data, name=name, **flags)
        assert (data / "questions.jsonl").read_bytes() == before

    def test_nor_for_the_record(self, data):
        questions = data / "answers.run.json"
        (data / "questions.jsonl").rename(questions)
        chosen = replace(options(data), question_file=str(questions))
        with pytest.raises(ValueError, match=r"answers\.run\.json would be written, but it is an input"):
            run(get_benchmark("vqa"), ShapeAnswerer(), chosen, get_benchmark("vqa").read(questions))

    def test_nor_are_files_that_are_read_beside_them(self, data):
        (data / "key.json").write_text("[]")
        with pytest.raises(ValueError, match="is an input"):
            answer(data, name="key.json", inputs=(str(data / "key.json"),))

    @pytest.mark.parametrize("target", ["2_0.jsonl", "2_1.run.json"])
    def test_chunks_are_no_place_for_what_joins_them(self, data, target):
        paths = chunks(data, 2)
        before = [path.read_bytes() for path in paths]
        with pytest.raises(ValueError, match="is an input"):
            merge_chunks(paths, data / target, overwrite=True)
        assert [path.read_bytes() for path in paths] == before

    def test_nor_are_answers_for_their_score_or_their_upload(self, save, script, command):
        rows = [{"question_id": 1, "text": "yes"}]
        path = save("merge.jsonl", rows)
        before = path.read_bytes()
        (path.parent / "link.json").symlink_to(path)
        for target in (path, path.parent / "link.json"):
            status, _, error = command(script("convert_gqa_for_eval"), "--src", path, "--dst", target)
            assert status == 1 and "would be written, but it is an input" in error and error.count("\n") == 1
            status, _, error = command(
                eval_science_qa.main, "--base-dir", path.parent, "--result-file", path, "--output-json", target
            )
            assert status == 1 and "would be written, but it is an input" in error
        assert path.read_bytes() == before

    def test_ids_that_scorers_take_for_one_are_refused(self, data):
        rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
        rows[4]["question_id"] = "1"
        (data / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match="question_id 1 and question_id '1' are one id to the scorers"):
            answer(data)
        assert not (data / "answers.jsonl").exists()


HOLDER = """
import sys
from pathlib import Path
from apet.eval.file_lock import FileLock
with FileLock(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


class TestLock:
    @pytest.fixture
    def holder(self, data):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(data / "answers.jsonl")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        process.stdout.readline()
        yield process
        process.kill()
        process.communicate()

    @pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
    def test_one_process_writes_a_file_and_a_kill_lets_go(self, data, holder, flags):
        (data / "other.jsonl").symlink_to(data / "answers.jsonl")
        for name in ("answers.jsonl", "other.jsonl"):
            with pytest.raises(BlockingIOError, match=f"another run is writing .*process {holder.pid} on .*end it"):
                answer(data, name=name, **flags)
        assert not (data / "answers.jsonl").exists()
        assert len(answer(data, name="2_0.jsonl", num_chunks=2, chunk_idx=0)) == 5  # another chunk
        with pytest.raises(BlockingIOError, match=f"process {holder.pid}"):
            merge_chunks(chunks(data, 1), data / "answers.jsonl")
        holder.kill()
        holder.wait()
        assert len(answer(data, **flags)) == 10
        assert not list(data.glob(".*.lock"))

    def test_it_is_refused_before_a_model_is_loaded(self, data, holder):
        benchmark, chosen = get_benchmark("vqa"), options(data)
        with pytest.raises(BlockingIOError, match="another run is writing"):
            check(benchmark, chosen, benchmark.read(chosen.question_file))

    def test_one_process_does_not_write_a_file_twice(self, data):
        with FileLock(data / "answers.jsonl"):
            with pytest.raises(BlockingIOError, match="already being written by this process"):
                answer(data)
        assert len(answer(data)) == 10

    def test_worker_processes_of_a_killed_run_do_not_keep_it(self, data):
        pid = os.fork()
        if pid == 0:
            FileLock(data / "answers.jsonl").__enter__()
            if os.fork() == 0:  # as a worker that has not yet noticed
                os.execlp("sleep", "sleep", "20")
            os._exit(9)
        os.waitpid(pid, 0)
        assert len(answer(data)) == 10

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
    def test_a_file_system_without_locks_is_said(self, data, monkeypatch, caplog, number):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(file_lock.fcntl, "lockf", refuse)
        assert len(answer(data)) == 10
        (message,) = {record.getMessage() for record in caplog.records}
        assert "has no locks" in message and os.strerror(number) in message and "answers.jsonl" in message


def chunks(data: Path, count: int, **changes) -> list[Path]:
    """Finished chunks."""
    paths = [data / f"{count}_{index}.jsonl" for index in range(count)]
    for index, path in enumerate(paths):
        answer(data, name=path.name, num_chunks=count, chunk_idx=index, overwrite=path.exists(), **changes)
    return paths


class TestMerge:
    @pytest.mark.parametrize(
        ("order", "words"),
        [
            ((0, 0, 1), "chunks 0, 0, 1; give 0..2, each once"),
            ((2, 0), "is a chunk of 3, but 2 are to be joined"),
            ((0, 1, 2, 2), "is a chunk of 3, but 4"),
            ((1,), "is a chunk of 3, but 1"),
        ],
    )
    def test_other_chunks_than_all_are_refused(self, data, order, words, command):
        paths = chunks(data, 3)
        given = [paths[index] for index in order]
        status, _, error = command(
            lambda argv: merge.run(merge.parser(), merge._merge, argv), "--answers-file", data / "merge.jsonl", *given
        )
        assert status == 1 and words in error and error.count("\n") == 1
        assert not (data / "merge.jsonl").exists()

    def test_the_order_of_the_names_does_not_matter(self, data):
        expected = answer(data)
        merge_chunks(chunks(data, 3)[::-1], data / "merge.jsonl")
        assert read(data / "merge.jsonl") == expected
        assert record_of(data, "merge")["environment"]["chunk"] == [0, 1]

    def test_a_join_is_the_same_file_as_a_run_in_one_piece(self, data):
        answer(data)
        merge_chunks(chunks(data, 3), data / "merge.jsonl")
        assert (data / "merge.jsonl").read_bytes() == (data / "answers.jsonl").read_bytes()

    def test_a_join_is_no_chunk(self, data):
        paths = chunks(data, 2)
        merge_chunks(paths, data / "merge.jsonl")
        with pytest.raises(ValueError, match=r"merge\.run\.json is a chunk of 1, but 2"):
            merge_chunks([data / "merge.jsonl", paths[1]], data / "again.jsonl")

    def test_chunks_of_another_question_file_are_refused(self, data):
        paths = chunks(data, 2)
        (data / "questions.jsonl").write_text((data / "questions.jsonl").read_text().replace("Picture 9", "Photo 9"))
        answer(data, name="2_1.jsonl", num_chunks=2, chunk_idx=1, overwrite=True)
        with pytest.raises(ValueError, match="different settings .*question_file_sha256"):
            merge_chunks(paths, data / "merge.jsonl")

    def test_chunks_of_other_parts_of_the_file_are_refused(self, data):
        paths = chunks(data, 2)
        answer(data, name="2_0.jsonl", num_chunks=2, chunk_idx=0, overwrite=True, limit=4)
        with pytest.raises(ValueError, match="was run with --limit 4"):
            merge_chunks(paths, data / "merge.jsonl")

    def test_a_chunk_that_lost_lines_is_refused(self, data):
        paths = chunks(data, 2)
        paths[1].write_text("".join(paths[1].read_text().splitlines(keepends=True)[:3]))
        with pytest.raises(ValueError, match=r"2_1\.jsonl has 3 answers and 0 failures for 5 questions"):
            merge_chunks(paths, data / "merge.jsonl")

    def test_answers_of_another_run_are_not_replaced_unasked(self, data):
        answer(data, ShapeAnswerer(temperature=1), name="merge.jsonl")
        before = (data / "merge.jsonl").read_bytes()
        paths = chunks(data, 2)
        with pytest.raises(ValueError, match="holds answers of another run; replace them with --overwrite"):
            merge_chunks(paths, data / "merge.jsonl")
        assert (data / "merge.jsonl").read_bytes() == before
        merge_chunks(paths, data / "merge.jsonl", overwrite=True)
        merge_chunks(paths, data / "merge.jsonl")  # an earlier join of the same run
        assert record_of(data, "merge")["settings"] == record_of(data, "2_0")["settings"]


class TestRecords:
    @pytest.mark.parametrize(
        ("name", "record"),
        [
            ("merge.jsonl", "merge.run.json"),
            ("merge.json", "merge.run.json"),
            ("llava-v1.5", "llava-v1.5.run.json"),
            ("a.b.jsonl", "a.b.run.json"),
        ],
    )
    def test_its_name(self, name, record):
        assert record_path(f"out/{name}") == RunRecord.path_for(f"out/{name}") == Path("out") / record

    def test_two_files_have_two_records(self, data):
        first, second = ShapeAnswerer(version=5), ShapeAnswerer(version=6)
        answer(data, first, name="llava-v1.5")
        answer(data, second, name="llava-v1.6")
        assert [record_of(data, f"llava-v1.{version}")["settings"]["version"] for version in (5, 6)] == [5, 6]

    def test_two_formats_do_not_share_one(self, data):
        answer(data, name="answers.json")
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"answers\.run\.json is the record of .*answers\.json"):
                answer(data, **flags)
        assert record_of(data)["answers_file"] == "answers.json"

    @pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 1}', "", "null"])
    def test_something_else_in_its_place_is_one_sentence(self, data, content):
        answer(data)
        (data / "answers.run.json").write_text(content)
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"answers\.run\.json is (no run record|not JSON)"):
                answer(data, **flags)
        assert len(read(data / "answers.jsonl")) == 10

    def test_counts_are_those_of_the_answers_that_are_there(self, data):
        """Killed after the answers were written and before the record was: what a record says is not believed."""
        answer(data, limit=4)
        stale = record_of(data) | {
            "counts": {"answers": 0, "new_tokens": 0, "visual_tokens": 0.0, "with_visual": 0, "seconds": 0.0}
        }
        (data / "answers.run.json").write_text(json.dumps(stale | {"status": "running"}))
        answer(data, resume=True)
        assert record_of(data)["counts"]["answers"] == 10

    def test_a_continued_run_keeps_what_was_measured_before(self, data):
        answer(data, limit=4)
        answer(data, resume=True)
        counts = record_of(data)["counts"]
        assert (counts["answers"], counts["measured"], counts["new_tokens"]) == (10, 10, 30)
        lines = (data / "answers.jsonl").read_text().splitlines(keepends=True)
        (data / "answers.jsonl").write_text("".join(lines[:6]))
        answer(data, resume=True)
        counts = record_of(data)["counts"]
        assert counts["answers"] == 10 and record_of(data)["layer_averaged_tokens"] == 64.0
        assert record_of(data)["samples_per_second"] == counts["measured"] / counts["seconds"]

    def test_the_commit_is_that_of_apets_own_tree(self, tmp_path, monkeypatch):
        """An ApET below somebody's repository, as a virtual environment in it has it, is not at that one's commit."""
        home = tmp_path / "project"
        package = home / ".venv/lib/python3/site-packages/apet/eval"
        package.mkdir(parents=True)
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "init", "-q", home], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], cwd=home, check=True)
        monkeypatch.setattr(run_record, "__file__", str(package / "run_record.py"))
        assert run_record._commit() is None
        own = home / "apet/eval"
        own.mkdir(parents=True)
        monkeypatch.setattr(run_record, "__file__", str(own / "run_record.py"))
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, check=True, capture_output=True, text=True).stdout
        assert run_record._commit() == head.strip()
        monkeypatch.setenv("GIT_DIR", str(tmp_path))  # inside a git hook
        assert run_record._commit() == head.strip()
