"""Score open answers by asking a language model, one question at a time, whether the prediction means the answer.

The numbers are those of the published evaluation: the share of "yes", and the mean of a mark from 0 to 5. The prompt is
not: it is this file's, and scores of different prompts or judges do not compare. So the score names both.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.base import Score
from apet.eval.benchmarks.files import PathLike, read_json, user_path, write_json_atomic
from apet.eval.benchmarks.video_qa import read_predictions, unanswered_line
from apet.eval.endpoint import Endpoint, EndpointError, Message

PROMPT_VERSION = "1"
_SYSTEM = (
    "You grade short answers to questions about videos. You see a question, the reference answer and a candidate "
    "answer. Decide whether the candidate says the same as the reference: other words, more detail or a full sentence "
    "are fine, another fact is not. Answer with one JSON object and nothing else."
)
_USER = (
    "Question: {question}\nReference answer: {answer}\nCandidate answer: {pred}\n\n"
    'Reply as {{"pred": "yes" or "no", "score": whole number from 0 (unrelated) to 5 (same meaning)}}.'
)
# Judges that do not reply in the form asked for are asked again so often.
_TRIES = 3
_NEW_TOKENS = 64
# Refusals of one request (filtered, too long): the next one may pass. Any other refusal would meet all requests.
_OF_ONE_REQUEST = (400, 413, 422)


def judge(name: str, pred_path: PathLike, folder: PathLike, endpoint: Endpoint, model: str) -> Score:
    """Let `model` judge every prediction that has no judgement yet, and score.

    Args:
        name: The benchmark.
        pred_path: Answer lines with id, question, answer and pred.
        folder: One file per judgement, `<id>.json`: [judgement, {"q", "a", "pred"}]. Judgements of the same judge,
            prompt and prediction are kept.
        endpoint: Where the judge is; its `concurrency` is the number of requests under way.
        model: Which model it is.

    Returns:
        Accuracy in percent: yes / (yes + no). `details` has the mean mark, the judge and what could not be judged.

    Raises:
        EndpointError: The server refuses every request (key, model) or stays away. Judgements so far are kept.
        ValueError: Broken answers, or not one usable judgement.
    """
    rows, failures = read_predictions(pred_path)
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    judged = {key: _kept(_file(folder, key), row, model) for key, row in rows.items()}
    missing = [key for key, one in judged.items() if one is None]
    stopped = threading.Event()

    def ask(key: str) -> tuple[str, dict[str, Any]]:
        if stopped.is_set():
            raise EndpointError("not asked")
        try:
            verdict = _ask(endpoint, model, rows[key])
        except EndpointError as error:
            if error.status not in _OF_ONE_REQUEST:
                stopped.set()  # the others would fail as slowly
                raise
            verdict = {"pred": None, "score": None, "reply": None, "refused": str(error), **_source(model)}
        write_json_atomic(_file(folder, key), [verdict, _pair(rows[key])])
        return key, verdict

    with ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge") as pool:
        judged |= dict(pool.map(ask, missing))
    return _score(name, judged, failures, model)


def _ask(endpoint: Endpoint, model: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A judgement; one whose reply cannot be used has "pred" None and the reply."""
    text = ""
    for _ in range(_TRIES):
        reply = endpoint.complete(messages(row), model=model, temperature=0, max_tokens=_NEW_TOKENS)
        text = reply.text
        verdict = parse_verdict(text)
        if verdict is not None:
            return {**verdict, **_source(model), "served_model": reply.model}
    return {"pred": None, "score": None, "reply": text, **_source(model)}


def messages(row: Mapping[str, Any]) -> list[Message]:
    """The conversation about one answer line."""
    asked = _USER.format(question=row["question"], answer=row["answer"], pred=row["pred"])
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]


def parse_verdict(text: str) -> dict[str, Any] | None:
    """{"pred": "yes" or "no", "score": 0..5} of a reply, a JSON object that other words may surround; None without."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return None
    try:
        said = json.loads(text[start : end + 1])
        pred, mark = str(said["pred"]).strip().lower(), int(float(said["score"]))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return {"pred": pred, "score": mark} if pred in ("yes", "no") and 0 <= mark <= 5 else None


def _source(model: str) -> dict[str, str]:
    return {"judge": model, "prompt_version": PROMPT_VERSION}


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"q": row["question"], "a": row["answer"], "pred": row["pred"]}


def _file(folder: Path, key: str) -> Path:
    """Where a judgement is; ids that are no file names get a digest."""
    plain = key.replace("-", "").replace("_", "").isalnum() and len(key) < 200
    return folder / f"{key if plain else hashlib.sha256(key.encode()).hexdigest()}.json"


def _kept(path: Path, row: Mapping[str, Any], model: str) -> dict[str, Any] | None:
    """A judgement of an earlier run, if it is about this prediction, by this judge, and usable."""
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, list) or len(content) != 2 or content[1] != _pair(row):
        return None
    same = all(content[0].get(name) == value for name, value in _source(model).items())
    return content[0] if same and content[0].get("pred") in ("yes", "no") else None


def _score(name: str, judged: Mapping[str, dict[str, Any]], failures: int, model: str) -> Score:
    usable = {key: one for key, one in judged.items() if one["pred"] is not None}
    if not usable:
        refused = [one["refused"] for one in judged.values() if "refused" in one]
        reason = f"; the first refusal: {refused[0]}" if refused else "; is it a chat model?"
        raise ValueError(f"judge {model} gave no usable judgement of {len(judged)}{reason}")
    yes = sum(one["pred"] == "yes" for one in usable.values())
    no = len(usable) - yes
    mark = sum(one["score"] for one in usable.values()) / len(usable)
    value = 100 * yes / len(usable)
    unusable = [key for key in judged if key not in usable]
    served = sorted({one["served_model"] for one in usable.values() if one.get("served_model")})
    details = {
        "yes": yes, "no": no, "average_score": mark, "judge": model, "served_models": served,
        "prompt_version": PROMPT_VERSION, "without_judgement": unusable, "unanswered": failures,
    }  # fmt: skip
    report = (
        f"Judge: {model} (prompt {PROMPT_VERSION})\nYes count: {yes}\nNo count: {no}\nAccuracy: {value:.2f}%\n"
        f"Average score: {mark:.3f}\n{unanswered_line(failures)}"
    )
    if unusable:
        refused = sum("refused" in judged[key] for key in unusable)
        report += f"Not counted: {len(unusable) - refused} replies that are no judgement"
        report += f", {refused} refused requests\n" if refused else "\n"
    correct = {key: float(one["pred"] == "yes") for key, one in usable.items()}
    return Score(name, f"accuracy by judge {model}", value, len(usable), details, correct, report)
