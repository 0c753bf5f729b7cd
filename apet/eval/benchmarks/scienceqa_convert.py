"""ScienceQA problems to a LLaVA conversation file, in one of the published prompt formats.

The test file in LLaVA's eval.zip is *not* made this way (it writes options as `A. x` lines and puts `<image>` first):
score with that file; this one is for training-style data.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from apet.eval.benchmarks.files import PathLike, user_path, write_json_atomic
from apet.eval.benchmarks.scienceqa import OPTIONS, read_split

DEFAULT_FORMAT = "QCM-LEA"
# The answer, before or after its reasons. "AL" gives the solution and "AE" the lecture: published so.
_OUTPUTS = {
    "A": "The answer is {answer}.",
    "AL": "The answer is {answer}. BECAUSE: {solution}",
    "AE": "The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "The answer is {answer}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {answer}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {answer}.",
    "EA": "{solution} The answer is {answer}.",
    "LEA": "{lecture} {solution} The answer is {answer}.",
    "ELA": "{solution} {lecture} The answer is {answer}.",
    "LEPA": "LECTURE: {lecture}\nSOLUTION: {solution}\n###\nANSWER: {answer}.",
}


def convert(base_dir: PathLike, split: str, prompt_format: str = DEFAULT_FORMAT) -> Path:
    """Write `llava_{split}_{prompt_format}.json` into `base_dir`; returns its path.

    Args:
        base_dir: Folder with `problems.json` and `pid_splits.json`.
        split: A key of `pid_splits.json`.
        prompt_format: Order of the input's parts (Q, C, M once each; L, E at will), a dash, the output's form.
    """
    parts, _, form = prompt_format.partition("-")
    if form not in _OUTPUTS or sorted(parts.replace("L", "").replace("E", "")) != ["C", "M", "Q"]:
        raise ValueError(
            f"prompt format {prompt_format!r}: expected the letters Q, C, M once each (L, E at will), a dash, and one "
            f"of {', '.join(_OUTPUTS)}, such as {DEFAULT_FORMAT}"
        )
    rows = [_conversation(key, row, parts, form) for key, row in read_split(base_dir, split).items()]
    target = user_path(base_dir) / f"llava_{split}_{prompt_format}.json"
    write_json_atomic(target, rows, indent=2)
    return target


def _conversation(key: str, problem: Mapping[str, Any], parts: str, form: str) -> dict[str, Any]:
    asked = _input(problem, parts)
    reasons = {name: problem.get(name, "") for name in ("lecture", "solution")}
    told = _tidy(_OUTPUTS[form].format(answer=OPTIONS[problem["answer"]], **reasons))
    picture = problem.get("image")
    turns = [{"from": "human", "value": asked + ("\n<image>" if picture else "")}, {"from": "gpt", "value": told}]
    return {"id": key, **({"image": f"{key}/{picture}"} if picture else {}), "conversations": turns}


def _input(problem: Mapping[str, Any], parts: str) -> str:
    choices = " ".join(f"({letter}) {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False))
    sections = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {problem['hint'].strip() or 'N/A'}",
        "M": f"Options: {choices}",
        "L": problem.get("lecture", ""),
        "E": problem.get("solution", ""),
    }
    lines: list[str] = []
    for reasons, letters in groupby(parts, key=lambda letter: letter in "LE"):
        texts = [sections[letter] for letter in letters]
        lines += [f"BECAUSE: {' '.join(texts)}"] if reasons else texts
    return _tidy("\n".join(lines)).removeprefix("Question: ")


def _tidy(text: str) -> str:
    """Double spaces collapsed once, no dangling BECAUSE, as published."""
    return text.replace("  ", " ").strip().removesuffix("BECAUSE:").strip()
