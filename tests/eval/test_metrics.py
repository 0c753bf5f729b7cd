"""Answer text -> right or wrong: golden tables of the published tools, and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apet.eval import metrics
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator


def test_pope_yes_no(golden):
    for text, label in golden("pope")["answer_text_to_label"]:
        assert metrics.pope_yes_no(text) == label, text


def test_mme_yes_no(golden):
    for text, label in golden("mme")["answer_to_label"]:
        assert metrics.mme_yes_no(text) == label, text


def test_normal_form(golden):
    table = golden("textvqa")["normaliser"]
    assert len(table) == 45
    for text, normal in table:
        assert metrics.vqa_normalize(text) == normal, text


def test_normal_form_step_by_step(golden):
    processor = EvalAIAnswerProcessor()
    steps = golden("textvqa")["normaliser_steps_[input,word_tokenize,process_punctuation,process_digit_article]"]
    for text, *expected in steps:
        got = [
            processor.word_tokenize(text),
            processor.process_punctuation(text),
            processor.process_digit_article(text),
        ]
        assert got == expected, text


@pytest.mark.parametrize(
    ("bare", "repaired"), [("youd've", "you'd've"), ("you'dve", "you'd've"), ("oclock", "o'clock"), ("hell", "hell")]
)
def test_contractions_miss_exactly_one_apostrophe(bare, repaired):
    assert metrics.vqa_process_digit_article(bare) == repaired


def test_letters(golden):
    for text, letter in golden("mmbench")["can_infer_option"]:
        assert metrics.mmbench_letter(text) == letter, text
    run = golden("scienceqa")["runs"][0]
    for key, parsed in run["parsed"].items():
        assert (metrics.scienceqa_letter(run["result_json"]["outputs"][key]) or "FAILED") == parsed


def test_a_lone_a_is_an_article_in_sentences_of_four_words_and_more():
    assert metrics.mmbench_letter("A is it") == "A"
    assert metrics.mmbench_letter("A cat sits here") is None
    assert metrics.mmbench_letter("B cat sits here") == "B"


def test_mmbench_letter_falls_back_on_a_unique_option_text():
    options = {"A": "Cat", "B": "dog", "C": "cat food"}
    assert metrics.mmbench_letter("a dog", options) == "B"
    assert metrics.mmbench_letter("Cat food", options) is None  # "Cat" is in it too
    assert metrics.mmbench_letter("bird", options) is None


def test_binary_counts_without_positive_predictions_are_defined():
    counts = metrics.BinaryCounts.of([False, False, False], [True, False, True])
    assert (counts.tp, counts.fp, counts.tn, counts.fn) == (0, 0, 1, 2)
    assert (counts.precision, counts.recall, counts.f1, counts.yes_ratio) == (0, 0, 0, 0)
    with pytest.raises(ValueError):
        metrics.BinaryCounts.of([True], [])


@given(st.lists(st.booleans(), min_size=1).flatmap(lambda a: st.tuples(st.just(a), st.permutations(a))))
def test_binary_counts_sum_up(pair):
    predictions, labels = pair
    counts = metrics.BinaryCounts.of(predictions, labels)
    assert counts.total == len(labels)
    assert counts.tp + counts.fn == sum(labels)
    assert counts.accuracy == sum(p == q for p, q in zip(predictions, labels, strict=True)) / len(labels)
    assert min(counts.precision, counts.recall) - 1e-12 <= counts.f1 <= max(counts.precision, counts.recall) + 1e-12


@given(st.integers(0, 10))
def test_soft_accuracy_of_n_matches(n):
    # 10-choose-9: a matching annotator sees n - 1 others, the rest see n
    expected = (n * min(1, (n - 1) / 3) + (10 - n) * min(1, n / 3)) / 10
    assert metrics.soft_accuracy("x", ["x"] * n + ["y"] * (10 - n)) == pytest.approx(max(expected, 0))


def test_soft_accuracy_needs_ground_truth():
    with pytest.raises(ValueError, match="at least one"):
        metrics.soft_accuracy("x", [])


@given(st.text(alphabet="aAnthe .,'s?!-/10\n\t", max_size=30))
def test_normal_form_has_no_articles_and_single_spaces(text):
    words = metrics.vqa_normalize(text).split(" ")
    assert not {"a", "an", "the"} & set(words)
    assert words == [""] or "" not in words


def test_evaluator_scores_and_checks(golden):
    case = golden("textvqa")["cases"][0]
    rows = case["files"]["TextVQA_0.5.1_val.json"]["data"]
    answers = case["files"]["llava-toy.jsonl"]
    predictions = [
        {"pred_answer": answer["text"], "gt_answers": row["answers"]} for answer, row in zip(answers, rows, strict=True)
    ]
    evaluator = TextVQAAccuracyEvaluator()
    assert evaluator.eval_pred_list(predictions) == case["accuracy"]
    with pytest.raises(ValueError, match="entry 1 .* 3 gt_answers, expected 10"):
        evaluator.eval_pred_list([{"pred_answer": "x", "gt_answers": ["x"] * 3}])
    with pytest.raises(ValueError, match="empty"):
        evaluator.eval_pred_list([])
