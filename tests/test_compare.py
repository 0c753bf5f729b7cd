"""The comparison: planning, resuming, subsets, intervals against a brute force, ranks, table; and once with a model."""

import csv
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from apet.compare import __main__ as program
from apet.compare import bootstrap, cost, execute, plan, results, table, tasks
from apet.config import ApetConfig
from apet.eval import loader
from apet.eval.answerer import Answer
from apet.eval.metrics import BinaryCounts

GOLDEN = Path(__file__).resolve().parent / "golden" / "end_to_end"
ALL = ("--benchmarks", "gqa,mme,pope,textvqa")
SUFFIX = "\nAnswer the question using a single word or phrase."
PICTURES = [f"{name}.png" for name in "abcde"]
COUNTS = {"gqa": 20, "mme": 16, "pope": 24, "textvqa": 10}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gqa(root: Path, images: list[str]) -> None:
    rows, truth = [], {}
    for index in range(COUNTS["gqa"]):
        key, text = f"g{index}", f"What is number {index}?"
        rows.append({"question_id": key, "image": images[index % len(images)], "text": text + SUFFIX})
        types = {"structural": "query", "semantic": "attr"}
        truth[key] = {"question": text, "answer": f"w{index}", "isBalanced": True, "types": types, "semantic": [],
                      "groups": {"global": None}}  # fmt: skip
    write_lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", rows)
    (root / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(truth))


def write_pope(root: Path, images: list[str]) -> None:
    rows = []
    labels: dict[str, list[dict]] = {"random": [], "popular": [], "adversarial": []}
    for index in range(COUNTS["pope"]):
        split = list(labels)[index * 3 // COUNTS["pope"]]
        text, image = f"Is there a thing {index} in the image?", images[index % len(images)]
        rows.append({"question_id": index, "image": image, "text": text + SUFFIX, "category": split})
        labels[split].append({"image": image, "text": text, "label": "yes" if index % 2 else "no"})
    write_lines(root / "pope" / "llava_pope_test.jsonl", rows)
    for split, lines in labels.items():
        write_lines(root / "pope" / "coco" / f"coco_pope_{split}.json", lines)


def write_textvqa(root: Path, images: list[str]) -> None:
    rows, truth = [], []
    for index in range(COUNTS["textvqa"]):
        text, image = f"What is read at {index}?", images[index % len(images)]
        rows.append({"question_id": image, "image": image, "text": f"{text}\nReference OCR token: x{SUFFIX}"})
        answers = [f"t{index}"] * 2 + ["other"] * 8
        truth.append({"image_id": image, "question_id": index, "question": text, "answers": answers})
    write_lines(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", rows)
    (root / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": truth}))


def write_mme(root: Path) -> None:
    rows = []
    for index in range(COUNTS["mme"] // 2):
        category = ("existence", "code_reasoning", "OCR")[index % 3]
        release = root / "MME" / "MME_Benchmark_release_version" / category
        release.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(release / f"{index}.png")
        texts = [f"Is there a thing {2 * index + number} in the image?" for number in (0, 1)]
        labels = [
            f"{text} Please answer yes or no.\t{label}\n" for text, label in zip(texts, ("No", "Yes"), strict=True)
        ]
        (release / f"{index}.txt").write_text("".join(labels))
        key = f"{category}/{index}.png"
        rows += [{"question_id": key, "image": key, "text": text + SUFFIX} for text in texts]
    write_lines(root / "MME" / "llava_mme.jsonl", rows)


@pytest.fixture
def data(tmp_path) -> Path:
    """The benchmarks in the layout of data/README.md, most over five pictures."""
    root = tmp_path / "data"
    for folder in ("gqa/images", "pope/val2014", "textvqa/train_images"):
        (root / folder).mkdir(parents=True)
        for name in PICTURES:
            Image.new("RGB", (4, 4)).save(root / folder / name)
    for write in (write_gqa, write_pope, write_textvqa):
        write(root, PICTURES)
    write_mme(root)
    return root


class FakeAnswerer:
    """Knows every answer and gets some wrong: the more tokens and the better the method, the fewer."""

    device, preparer = "cpu", SimpleNamespace(prepare=lambda question, images: (list(images), question.prompt)[1])

    def __init__(self, model: "FakeModel", config: ApetConfig) -> None:
        self.model, self.config, self.model_id = model, config, model.model_id

    def answer(self, prepared):
        self.model.asked += len(prepared)
        if self.model.fail_after is not None and self.model.asked > self.model.fail_after:
            raise KeyboardInterrupt
        return [Answer(self._text(prompt), 2, self._tokens()) for prompt in prepared]

    def settings(self):
        return {"model_path": "fake", "model_id": self.model_id, "dtype": "float32", "sample_weights": "random",
                "compression": self.config.to_dict()}  # fmt: skip

    def _tokens(self) -> float:
        layers = np.full(FakeModel.layers, float(self.config.visual_token_num or 576))
        for layer, count in zip(self.config.layer_list, self.config.image_token_list, strict=True):
            layers[layer:] = count
        return float(layers.mean())

    def _text(self, prompt: str) -> str:
        number = int("".join(filter(str.isdigit, prompt.split("\n")[0])))
        share = {"none": 0.95, "apet": 0.8, "uniform": 0.8}.get(self.config.method, 0.6)
        right = random.Random(f"{prompt}{self.config.seed}").random() < share - 10 / (10 + self._tokens())
        if prompt.startswith("Is there"):
            return "Yes" if bool(number % 2) == right else "No"
        word = f"w{number}" if prompt.startswith("What is number") else f"t{number}"
        return word if right else "nothing"


class FakeModel:
    """A checkpoint of 576 tokens and 12 layers; refuses the methods in `refused`."""

    model_id, image_tokens, layers, grid = "fake", 576, 12, (24, 24)
    model = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, refused: tuple[str, ...] = (), fail_after: int | None = None) -> None:
        self.refused, self.fail_after, self.asked = refused, fail_after, 0

    def answerer(self, config: ApetConfig, share_tower: bool = False, new_tokens: int | None = None):
        if config.method in self.refused:
            raise ValueError(f"method {config.method!r} needs what is not there")
        return FakeAnswerer(self, config)

    def prompt_length(self, question) -> int:
        return len(question.prompt)


def compare(data: Path, model: FakeModel, *flags: str) -> Path:
    """Run the program with a fake model; returns its --out."""
    out = data.parent / "out"
    module = SimpleNamespace(add_flags=lambda parser: None, load=lambda args: model)
    words = ["--data", str(data), "--out", str(out), "--batch_size", "4", "--timed", "0", *flags]
    program.compare(program.parser(module).parse_args(words), module)
    return out


def read_csv(out: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(out / "table.csv") as file:
        return {(row["benchmark"], row["method"], row["budget"]): row for row in csv.DictReader(file)}


# --- planning ---


def test_cells_are_the_uncompressed_one_and_methods_by_budgets_by_seeds():
    cells, skips = plan.plan_cells(["apet", "random"], [576, 192, 64], 2, 576, 12)
    names = ["none", "apet-192", "apet-64", *(f"random-{tokens}-seed{seed}" for tokens in (192, 64) for seed in (0, 1))]
    assert [cell.name for cell in cells] == names and skips == []
    assert cells[1].config == ApetConfig(288, layer_list=(6,), image_token_list=(96,))
    assert cells[-1].config == ApetConfig(64, method="random", seed=1)


def test_further_settings_are_those_of_every_compressed_cell():
    further = {"tower_layer_list": (2,), "tower_token_list": (288,)}
    none, *others = plan.plan_cells(["apet", "random"], [64], 1, 576, 12, further)[0]
    assert none.config.tower_layer_list == ()
    assert [(cell.config.tower_layer_list, cell.config.tower_token_list) for cell in others] == [((2,), (288,))] * 2
    (skip,) = plan.plan_cells(["apet"], [64], 1, 576, 12, {"tower": 3})[1]
    assert "unknown ApetConfig field 'tower'" in skip.reason


def test_an_unreachable_budget_is_a_skip_with_its_reason():
    cells, (skip,) = plan.plan_cells(["fastv"], [192, 32], 1, 576, 12)
    assert [cell.name for cell in cells] == ["none", "fastv-192"]
    assert (skip.method, skip.tokens) == ("fastv", 32) and "cannot average 32" in skip.reason


def test_options_follow_a_colon_and_belong_to_the_method_before_them():
    text = "apet, apet_plus:quota=false,similarity_floor=none,random,apet_plus:rounds=8"
    methods = plan.parse_methods(text)
    assert methods == ["apet", "apet_plus:quota=false,similarity_floor=none", "random", "apet_plus:rounds=8"]
    cells, _ = plan.plan_cells(methods, [64], 1, 576, 12)
    options = {"quota": 0, "similarity_floor": None}
    assert cells[2].config.method == "apet_plus" and cells[2].config.method_options == options
    assert [cell.name for cell in cells[2:]] == [
        "apet_plus_quota=false_similarity_floor=none-64", "random-64-seed0", "apet_plus_rounds=8-64"
    ]  # fmt: skip
    assert ApetConfig.from_dict(cells[2].config.to_dict()) == cells[2].config


def test_all_is_every_method_but_the_uncompressed_one():
    assert {"apet", "random", "fastv"} < set(plan.parse_methods("all")) and "none" not in plan.parse_methods("all")
    assert plan.parse_methods("random, apet,random") == ["random", "apet"]
    assert plan.parse_budgets("64,192,64") == [192, 64]


@pytest.mark.parametrize(
    ("function", "text", "word"),
    [
        (plan.parse_methods, "apett", "'apet'"),
        (plan.parse_methods, "apet_plus:quote=0", "'quota'"),
        (plan.parse_budgets, "64,x", "--tokens"),
        (plan.parse_budgets, ",", "no"),
    ],
)
def test_wrong_lists_are_refused(function, text, word):
    with pytest.raises(ValueError, match=word):
        function(text)


# --- tasks ---


def test_a_limit_scores_exactly_the_first_questions(data, tmp_path):
    for name, limit in (("gqa", 7), ("mme", 6), ("pope", 12), ("textvqa", 5)):
        task = tasks.open_task(name, str(data), tmp_path / "out", limit)
        assert task.name == f"{name}-first{limit}" and len(task.questions) == limit
        whole = tasks.open_task(name, str(data), tmp_path / "out", None)
        assert task.questions == whole.questions[:limit] and len(whole.questions) == COUNTS[name]
        finished = run_cell(task, tmp_path / "out")
        assert finished.score["n_questions"] == limit
    assert len(tasks.open_task("mme", str(data), tmp_path, 5).questions) == 6  # both questions of a picture
    assert "not in the question file" in str(run_cell(tasks.open_task("pope", str(data), tmp_path, 8), tmp_path).score)


def run_cell(task: tasks.Task, out: Path, method: str = "none") -> execute.Finished:
    cells = [cell for cell in plan.plan_cells([method], [64], 1, 576, 12)[0] if cell.method == method]
    (finished,), _ = execute.execute(FakeModel(), cells, [task], execute.Place(out))
    return finished


def test_a_benchmark_that_cannot_be_compared_and_data_that_is_not_there_are_named(data, tmp_path):
    with pytest.raises(ValueError, match="'vizwiz'; available: gqa, mme, pope, textvqa"):
        tasks.open_task("vizwiz", str(data), tmp_path, None)
    with pytest.raises(ValueError, match="nowhere.*is not there"):
        tasks.open_task("gqa", str(tmp_path / "nowhere"), tmp_path, None)


@pytest.mark.parametrize("name", list(COUNTS))
def test_the_resampled_headline_is_the_scorers(data, tmp_path, name):
    finished = run_cell(tasks.open_task(name, str(data), tmp_path, None), tmp_path, "random")
    outcome = finished.task.outcome(finished.score["per_sample"], finished.answers)
    assert 0 < finished.score["value"] < outcome.maximum == (400 if name == "mme" else 100)
    assert outcome.score == pytest.approx(finished.score["value"], abs=1e-9)


# --- bootstrap ---


def brute_force(outcome: bootstrap.Outcome, counts: np.ndarray) -> float:
    """The headline of one resample, question by question."""
    drawn = [index for index, count in enumerate(counts) for _ in range(int(count))]
    if outcome.summed:
        parts = [[outcome.correct[index] for index in drawn if outcome.strata[index] == stratum]
                 for stratum in sorted(set(outcome.strata.tolist()))]  # fmt: skip
        return 100 * sum(sum(part) / len(part) for part in parts)
    if outcome.truth is None:
        return 100 * sum(outcome.correct[index] for index in drawn) / len(drawn)
    f1 = []
    for stratum in sorted(set(outcome.strata.tolist())):
        members = [index for index in drawn if outcome.strata[index] == stratum]
        truth = [bool(outcome.truth[index]) for index in members]
        given = [bool(outcome.truth[index]) == bool(outcome.correct[index]) for index in members]
        f1.append(BinaryCounts.of(given, truth).f1)
    return 100 * sum(f1) / len(f1)


def outcomes(kind: str, runs: int = 3, n: int = 30) -> list[bootstrap.Outcome]:
    draw = np.random.default_rng(7)
    ids, strata, truth = tuple(map(str, range(n))), np.arange(n) % 3, draw.random(n) < 0.5
    extra = {"f1": (truth, strata), "sum": (None, strata, True), "mean": ()}[kind]
    return [bootstrap.Outcome(ids, (draw.random(n) < 0.6).astype(float), *extra) for _ in range(runs)]


@pytest.mark.parametrize("kind", ["mean", "f1", "sum"])
def test_resampled_scores_equal_a_brute_force(kind, monkeypatch):
    runs = outcomes(kind)
    seen = []
    draw = bootstrap.resampled_counts
    monkeypatch.setattr(bootstrap, "resampled_counts", lambda *args: seen.append(draw(*args)) or seen[-1])
    values = bootstrap.resampled_scores("gqa", runs, 130)
    counts = np.concatenate(seen)
    assert counts.shape == (130, 30) and (counts.sum(1) == 30).all()
    expected = [[brute_force(run, row) for row in counts] for run in runs]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    if kind != "mean":
        assert (counts[:, runs[0].strata == 1].sum(1) == 10).all()


def test_resamples_are_paired_reproducible_and_differ_between_benchmarks():
    runs = outcomes("mean")
    values = bootstrap.resampled_scores("gqa", [*runs, runs[0]], 200)
    np.testing.assert_array_equal(values[0], values[-1])
    np.testing.assert_array_equal(values[:3], bootstrap.resampled_scores("gqa", runs, 200))
    assert (values[0] != bootstrap.resampled_scores("pope", runs, 200)[0]).any()


def test_the_interval_of_a_mean_is_the_textbook_one():
    correct = (np.arange(400) % 4 < 3).astype(float)
    values = bootstrap.resampled_scores("gqa", [bootstrap.Outcome(tuple(map(str, range(400))), correct)])
    low, high = bootstrap.interval(values[0])
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(75 - half, abs=0.5) and high == pytest.approx(75 + half, abs=0.5)


def test_questions_about_a_picture_are_drawn_together_and_widen_the_interval():
    """100 pictures with five questions each, all right or all wrong: as wide as that of 100 questions."""
    correct = np.repeat((np.arange(100) % 4 < 3).astype(float), 5)
    ids, pictures = tuple(map(str, range(500))), tuple(str(index // 5) for index in range(500))
    by_picture = bootstrap.resampled_scores("gqa", [bootstrap.Outcome(ids, correct, pictures=pictures)])[0]
    by_question = bootstrap.resampled_scores("gqa", [bootstrap.Outcome(ids, correct)])[0]
    assert by_picture.std() == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 100), rel=0.05)
    assert by_question.std() == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 500), rel=0.05)


def test_a_picture_in_several_strata_is_drawn_once_for_all_of_them():
    strata, pictures = np.arange(24) % 3, tuple("abcdefgh"[index // 3] for index in range(24))
    outcome = bootstrap.Outcome(tuple(map(str, range(24))), np.ones(24), np.ones(24, bool), strata, pictures=pictures)
    counts = bootstrap.resampled_counts(outcome.clusters, 50, np.random.default_rng(0))
    assert (counts.reshape(50, 8, 3) == counts.reshape(50, 8, 3)[:, :, :1]).all() and (counts.sum(1) == 24).all()
    # A picture of one stratum only is drawn among its like: no stratum runs empty.
    alone = replace(outcome, strata=np.where(np.arange(24) < 3, 3, strata))
    counts = bootstrap.resampled_counts(alone.clusters, 50, np.random.default_rng(0))
    assert (counts[:, :3] == 1).all() and (counts.sum(1) == 24).all()


@pytest.mark.parametrize("name", list(COUNTS))
def test_every_benchmark_is_resampled_by_picture(data, tmp_path, name):
    task = tasks.open_task(name, str(data), tmp_path, None)
    finished = run_cell(task, tmp_path, "random")
    outcome = task.outcome(finished.score["per_sample"], finished.answers)
    clusters = [questions for group in outcome.clusters for questions in group]
    scored = [one.image for one in task.questions if name != "mme" or not one.image.startswith("code")]
    assert len(clusters) == len(set(scored)) < len(scored)
    if name != "mme":  # whose points are those of pictures already
        assert sorted(map(len, clusters)) == sorted(scored.count(image) for image in set(scored))


@pytest.mark.parametrize("kind", ["f1", "sum"])
def test_runs_in_another_order_are_aligned_and_other_questions_refused(kind):
    one, two, _ = outcomes(kind)
    order = np.random.default_rng(0).permutation(30)
    ids = tuple(two.ids[index] for index in order)
    truth = None if two.truth is None else two.truth[order]
    turned = replace(two, ids=ids, correct=two.correct[order], truth=truth, strata=two.strata[order])
    straight = bootstrap.resampled_scores("x", [one, two], 20)
    np.testing.assert_array_equal(straight, bootstrap.resampled_scores("x", [one, turned], 20))
    with pytest.raises(ValueError, match="different questions"):
        bootstrap.resampled_scores("x", [one, replace(two, ids=(*two.ids[:-1], "new"))], 20)


# --- the whole of it, without a model ---


def test_everything_is_answered_scored_and_written(data, capsys):
    model = FakeModel(refused=("tome",))
    out = compare(data, model, "--methods", "apet,uniform,random,fastv,tome", "--tokens", "576,192,32", *ALL)
    printed = capsys.readouterr().out
    assert printed == (out / "table.md").read_text()
    for word in ("**fake**: dtype float32", "device cpu", "batch size 4", "random weights; its scores mean nothing"):
        assert word in printed
    assert "- fastv at 32: method 'fastv' cannot average 32" in printed
    assert "- tome at 192, 32: method 'tome' needs what is not there" in printed
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    folder = out / "gqa" / "random-32-seed2"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"gqa-random-32-seed2.{suffix}" for suffix in ("jsonl", "run.json", "score.json")
    ]
    rows = read_csv(out)
    assert {key[0] for key in rows} == {"average", *COUNTS}
    assert rows["gqa", "random", "32"]["seeds"] == "3" and rows["gqa", "apet", "32"]["seeds"] == "1"
    assert ("gqa", "fastv", "192") in rows and ("gqa", "fastv", "32") not in rows
    none = rows["average", "none", ""]
    assert (none["tokens"], none["percent"], none["rank"]) == ("576.0", "100.0", "")
    check_numbers(out, rows)


def test_the_summary_has_a_line_per_method_and_a_column_per_budget(data):
    out = compare(data, FakeModel(), "--methods", "random,apet,fastv", "--tokens", "192,32", "--no_png", *ALL)
    rows = read_csv(out)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in (out / "summary.md").read_text().splitlines() if line.startswith("|")]  # fmt: skip
    assert lines[0] == ["method", "192 tokens", "32 tokens"]
    assert [line[0] for line in lines[2:]] == ["apet", "random", "fastv"] and lines[-1][2] == ""  # out of reach
    for line in lines[2:]:
        for budget, cell in zip(("192", "32"), line[1:], strict=True):
            if cell:
                row = {name: float(rows["average", line[0], budget][name])
                       for name in ("percent", "percent_low", "percent_high")}  # fmt: skip
                assert cell == "{percent:.1f} ({percent_low:.1f} .. {percent_high:.1f})".format(**row)


def check_numbers(out: Path, rows: dict) -> None:
    """Score, percent, rank and pooling of the CSV, computed again from the score files."""

    def value(benchmark: str, cell: str) -> float:
        return json.loads((out / benchmark / cell / f"{benchmark}-{cell}.score.json").read_text())["value"]

    for benchmark in COUNTS:
        seeds = [value(benchmark, f"random-32-seed{seed}") for seed in range(3)]
        row = rows[benchmark, "random", "32"]
        assert float(row["score"]) == pytest.approx(np.mean(seeds))
        assert float(row["spread"]) == pytest.approx(np.std(seeds, ddof=1))
        apet = rows[benchmark, "apet", "32"]
        percent = 100 * value(benchmark, "apet-32") / value(benchmark, "none")
        assert float(apet["percent"]) == pytest.approx(percent)
        assert float(apet["percent_low"]) <= percent <= float(apet["percent_high"])
        assert float(apet["difference"]) == pytest.approx(value(benchmark, "apet-32") - np.mean(seeds))
        at_32 = {key[1]: row for key, row in rows.items() if key[0] == benchmark and key[2] == "32"}
        for row in at_32.values():
            better = sum(float(other["score"]) > float(row["score"]) + 1e-6 for other in at_32.values())
            assert int(row["rank"]) == 1 + better
    percents = [float(rows[benchmark, "apet", "32"]["percent"]) for benchmark in COUNTS]
    assert float(rows["average", "apet", "32"]["percent"]) == pytest.approx(np.mean(percents))


def test_percent_intervals_equal_a_brute_force(data, monkeypatch):
    seen = []
    draw = bootstrap.resampled_counts
    monkeypatch.setattr(bootstrap, "resampled_counts", lambda *args: seen.append(draw(*args)) or seen[-1])
    out = compare(data, FakeModel(), "--methods", "random", "--tokens", "64", "--benchmarks", "gqa", "--no_png")
    correct = {}
    for cell in ("none", *(f"random-64-seed{seed}" for seed in range(3))):
        score = json.loads((out / "gqa" / cell / f"gqa-{cell}.score.json").read_text())
        correct[cell] = np.array(list(score["per_sample"].values()))
    full = correct.pop("none")
    percents = [
        100 * np.mean([np.repeat(one, row).mean() for one in correct.values()]) / np.repeat(full, row).mean()
        for row in np.concatenate(seen).astype(int)
    ]
    row = read_csv(out)["gqa", "random", "64"]
    expected = np.percentile(percents, [2.5, 97.5])
    np.testing.assert_allclose([float(row["percent_low"]), float(row["percent_high"])], expected)


def test_equal_scores_share_the_better_rank():
    def row(method: str, score: float) -> results.Row:
        return results.Row("gqa", "accuracy", method, 64, score, 64.0, 10, 5, 1)

    full = replace(row("none", 90.0), budget=None)
    ranked = results._ranked([full, row("a", 50.0), row("b", 70.0), row("c", 50.0), row("d", 40.0)])
    assert [one.rank for one in ranked] == [None, 2, 1, 2, 4]


def test_finished_runs_are_not_run_again_and_interrupted_ones_go_on(data):
    flags = ("--methods", "apet,random", "--tokens", "64", "--seeds", "2", "--no_png", *ALL)
    everything = FakeModel()
    out = compare(data, everything, *flags)
    expected = {path.relative_to(out): path.read_text() for path in out.rglob("*.score.json")}
    total = sum(COUNTS.values()) * 4
    assert everything.asked == total

    again = FakeModel()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}
    compare(data, again, *flags)
    assert again.asked == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())

    more = FakeModel()
    compare(data, more, *flags[:1], "apet,random,uniform", *flags[2:])
    assert more.asked == sum(COUNTS.values())

    fresh = data.parent / "fresh"
    killed = FakeModel(fail_after=90)
    with pytest.raises(KeyboardInterrupt):
        compare(data, killed, *flags, "--out", str(fresh))
    rest = FakeModel()
    compare(data, rest, *flags, "--out", str(fresh))
    assert 90 - 4 <= killed.asked and rest.asked <= total - 84
    assert {path.relative_to(fresh): path.read_text() for path in fresh.rglob("*.score.json")} == expected


def test_a_score_that_was_lost_or_is_older_than_its_answers_is_made_again(data):
    flags = ("--methods", "apet", "--tokens", "64", "--benchmarks", "gqa", "--no_png")
    out = compare(data, FakeModel(), *flags)
    score = out / "gqa" / "apet-64" / "gqa-apet-64.score.json"
    before = score.read_text()
    score.unlink()
    model = FakeModel()
    compare(data, model, *flags)
    assert model.asked == 0 and score.read_text() == before


def test_runs_of_other_settings_are_refused(data):
    flags = ("--methods", "apet", "--tokens", "64", "--benchmarks", "gqa", "--no_png")
    compare(data, FakeModel(), *flags)
    other = FakeModel()
    other.model_id = "another"
    with pytest.raises(ValueError, match="another.*give another --out"):
        compare(data, other, *flags)


def test_an_image_that_cannot_be_read_stops_at_the_uncompressed_model(data):
    (data / "gqa" / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png does not exist"):
        compare(data, FakeModel(), "--methods", "apet", "--benchmarks", "gqa", "--no_png")


def test_an_uncompressed_score_of_zero_has_no_percentage(data, monkeypatch):
    monkeypatch.setattr(FakeAnswerer, "_text", lambda self, prompt: "wrong")
    out = compare(data, FakeModel(), "--methods", "apet", "--benchmarks", "gqa,textvqa")
    assert read_csv(out)["gqa", "apet", "64"]["percent"] == "" == read_csv(out)["average", "apet", "64"]["percent"]


def test_questions_that_average_pooling_answers_are_reported_apart(data, capsys):
    out = compare(data, FakeModel(), "--methods", "apet,random", "--benchmarks", "gqa", "--difficulty", "--no_png")
    assert "### gqa, by difficulty" in capsys.readouterr().out

    def right(cell: str) -> dict[str, float]:
        return json.loads((out / "gqa" / cell / f"gqa-{cell}.score.json").read_text())["per_sample"]

    full, cheap = right("none"), right("avg_pool-64")
    hard = [key for key in full if full[key] and not cheap[key]]
    easy = [key for key in full if full[key] and cheap[key]]
    assert hard and easy
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:-1]]
             for line in (out / "table.md").read_text().partition("by difficulty")[2].splitlines()
             if "| 64 " in line}  # fmt: skip
    assert set(cells) == {"apet", "random"}
    for method, names in (("apet", ["apet-64"]), ("random", [f"random-64-seed{seed}" for seed in range(3)])):
        shares = [100 * np.mean([right(name)[key] for name in names for key in keys]) for keys in (hard, easy)]
        expected = [f"{shares[0]:.1f}", str(len(hard)), f"{shares[1]:.1f}", str(len(easy))]
        assert cells[method] == expected


def test_a_missing_matplotlib_is_said_before_anything_is_loaded(data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        compare(data, None)


def test_time_and_memory_are_measured_in_turns_once_and_for_all_methods_together(data, capsys):
    flags = ("--methods", "apet,random", "--tokens", "64", "--timed", "3", "--benchmarks", "gqa,pope")
    first = FakeModel()
    out = compare(data, first, *flags)
    assert (out / "accuracy_time.png").read_bytes()[:4] == b"\x89PNG"
    assert "| TTFT, ms" in capsys.readouterr().out
    content = json.loads((out / "cost.json").read_text())
    assert list(content["measured"]) == ["none", "apet-64", "random-64-seed0"]
    assert [row[:2] for row in content["subject"]["questions"]] == [["gqa", "g0"], ["gqa", "g10"], ["pope", "0"]]
    row = read_csv(out)["average", "apet", "64"]
    singles = {name: one["first_token_ms"] for name, one in content["measured"].items()}
    assert float(row["first_token_ms"]) == pytest.approx(np.median(singles["apet-64"]))
    for other, column in (("none", "first_token_none"), ("random-64-seed0", "first_token_random")):
        expected = np.median(np.array(singles[other]) / singles["apet-64"])
        assert float(row[column]) == pytest.approx(expected)
    batches = np.array(content["measured"]["apet-64"]["batch_ms"])
    assert float(row["questions_per_second"]) == pytest.approx(np.median(3e3 / batches))
    assert read_csv(out)["gqa", "none", ""]["rate_none"] == "1.0"

    again, more = FakeModel(), FakeModel()
    compare(data, again, *flags)
    assert again.asked == 0 and json.loads((out / "cost.json").read_text()) == content
    compare(data, more, *flags[:1], "apet,random,uniform", *flags[2:])
    after = json.loads((out / "cost.json").read_text())["measured"]
    assert len(after) == 4 and after["none"]["batch_ms"] != content["measured"]["none"]["batch_ms"]


def test_timed_questions_are_spread_over_benchmarks_and_each_taken_once(data, tmp_path):
    opened = [tasks.open_task(name, str(data), tmp_path, None) for name in ("gqa", "textvqa")]
    chosen = [(task.name, index) for task, index in cost.spread(opened, 5)]
    assert chosen == [("gqa", 0), ("gqa", 6), ("gqa", 13), ("textvqa", 0), ("textvqa", 5)]
    assert len(cost.spread(opened, 1000)) == 30


def test_the_peak_of_a_call_is_what_torch_allocates_beyond_the_start():
    def call():
        first = torch.zeros(1 << 18)  # 1 MiB each
        second = first + 1
        del first
        return torch.cat([second, second]).sum()

    torch.zeros(1 << 20)
    assert cost.peak_bytes(call, torch.device("cpu")) == pytest.approx(3 * 2**20, rel=0.01)


def test_runs_on_other_hardware_are_noted(data, tmp_path):
    finished = run_cell(tasks.open_task("gqa", str(data), tmp_path, None), tmp_path)
    record = json.loads(json.dumps(finished.record))
    record["environment"]["device"] = "cuda:0"
    assert not any("devices" in note for note in table.notes([finished]))
    other = replace(finished, record=record)
    assert any("different devices (cpu, cuda:0)" in note for note in table.notes([finished, other]))


def test_the_loader_is_found_or_named():
    assert loader.find_loader([]).__name__ == "llava.eval.apet_loader"
    with pytest.raises(ValueError, match="--loader 'no.such'"):
        loader.find_loader(["--loader", "no.such"])


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--seeds", "0"], "--seeds"), (["--timed", "-1"], "--timed"), (["--methods", "x"], "Available")],
)
def test_what_the_user_can_mend_is_one_line(capsys, flags, word):
    assert program.main(["--model-path", "none", *flags]) == 1
    assert word in capsys.readouterr().err.strip().splitlines()[-1]


# --- with a model ---


def test_a_tiny_checkpoint_from_the_command_line(tmp_path, capsys):
    root = tmp_path / "data"
    (root / "gqa").mkdir(parents=True)
    write_gqa(root, ["image_a.png", "image_b.png"])
    (root / "gqa" / "images").symlink_to(GOLDEN / "images")
    arguments = ["--model-path", str(GOLDEN / "llava-v1.5-tiny"), "--data", str(root), "--benchmarks", "gqa"]
    arguments += [
        "--methods",
        "apet,apet_plus:quota=0,random,cdpruner",
        "--tokens",
        "64",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--limit", "3", "--batch_size", "3", "--timed", "1", "--max_new_tokens", "4", "--device", "cpu"]
    assert program.main(arguments) == 0
    rows = read_csv(tmp_path / "out")
    full = rows["gqa-first3", "none", ""]
    assert float(full["tokens"]) == 576 and float(full["peak_bytes"]) > 0 and float(full["first_token_none"]) == 1
    assert (
        float(rows["gqa-first3", "apet", "64"]["tokens"]) == 64 == float(rows["gqa-first3", "random", "64"]["tokens"])
    )
    assert float(rows["gqa-first3", "apet_plus:quota=0", "64"]["tokens"]) == 64
    printed = capsys.readouterr().out
    assert "only the first questions were answered and scored (gqa-first3)" in printed
    assert "**llava-v1.5-tiny**: dtype float32" in printed


def test_the_documented_ablation_names_variants_that_exist():
    page = (Path(__file__).resolve().parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    (text,) = re.findall(r'--methods \\\n\s*"(.*?)"', page, re.DOTALL)
    names = re.search(r"P=(\S+); O=(\S+)", page)
    methods = plan.parse_methods(re.sub(r"\\\n\s*", "", text).replace("$P", names[1]).replace("$O", names[2]))
    assert len(methods) > 12 and {"apet", "random", "apet_plus"} < set(methods)
