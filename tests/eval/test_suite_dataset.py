"""`apet eval --dataset`: what is refused before anything is written, and that the rest of the run is the usual one."""

import pytest

from apet.eval import hub, suite


def test_a_benchmark_that_no_data_set_is_known_for(tmp_path, capsys):
    assert suite.main(["video_llava", "msvd", "--dataset", "a/b", "--data", str(tmp_path)]) == 1
    assert "'msvd' is not read from data sets; known: gqa" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert suite.main(["llava1_5", "pope", "--dataset", "a/b", "--data", str(tmp_path)]) == 1
    assert "pip install 'apet[hub]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_data_is_written_before_the_run_is_planned_and_not_by_a_dry_run(words, tmp_path, monkeypatch):
    written = []

    def write(benchmark: str, root: str, dataset: str) -> None:
        written.append((benchmark, root, dataset))
        raise ValueError("enough")

    monkeypatch.setattr(suite, "write_benchmark", write)
    status = suite.main(["llava1_5", "pope", "--dataset", "a/b", "--data", str(tmp_path), *words])
    assert (status, written) == ((0, []) if words else (1, [("pope", str(tmp_path), "a/b")]))
