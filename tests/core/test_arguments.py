"""Refused arguments: the message names the argument, the value and what is allowed."""

import pytest
import torch

import apet

TOKENS = torch.zeros(3, 20, 4)

REFUSED = [
    ({"tokens": torch.zeros(20, 4)}, ValueError, ["tokens", r"\(20, 4\)", r"\(B, N, D\)"]),
    ({"tokens": torch.zeros(2, 0, 4)}, ValueError, ["tokens", r"\(2, 0, 4\)", "N >= 1"]),
    ({"tokens": torch.zeros(2, 20, 4, dtype=torch.int64)}, TypeError, ["tokens", "torch.int64", "floating point"]),
    ({"tokens": [[[1.0]]]}, TypeError, ["tokens", "list", "floating point tensor"]),
    ({"keep": 0}, ValueError, ["keep=0", "at least 1"]),
    ({"keep": -3}, ValueError, ["keep=-3", "at least 1"]),
    ({"keep": 7.5}, TypeError, ["keep", "int", "7.5"]),
    ({"keep": True}, TypeError, ["keep", "int", "True"]),
    ({"keep": "7"}, TypeError, ["keep", "int", "'7'"]),
    ({"basis": -1}, ValueError, ["basis=-1", "at least 0"]),
    ({"basis": None}, TypeError, ["basis", "int", "None"]),
    ({"basis_selection": "kmeans"}, ValueError, ["basis_selection='kmeans'", "fps, dpc, random"]),
    ({"slots": "rank"}, ValueError, ["slots='rank'", "position, error"]),
    ({"insertion": "replace"}, ValueError, ["insertion='replace'", "overwrite, blend, append, none"]),
    ({"ridge": -1e-5}, ValueError, ["ridge=-1e-05", "at least 0"]),
    ({"ridge": float("nan")}, ValueError, ["ridge=nan", "at least 0"]),
    ({"ridge": float("inf")}, ValueError, ["ridge=inf", "finite"]),
    ({"ridge": "small"}, ValueError, ["ridge='small'", "number"]),
    ({"start": -1}, ValueError, ["start=-1", "20 tokens", r"0\.\.19"]),
    ({"start": 20}, ValueError, ["start=20", "20 tokens", r"0\.\.19"]),
    ({"start": 1.5}, TypeError, ["start", "1.5", "int"]),
    ({"start": "farthest"}, TypeError, ["start", "'farthest'", "None, an int"]),
    ({"start": torch.zeros(3)}, TypeError, ["start", "tensor", "ints"]),
    ({"start": torch.zeros(2, dtype=torch.int64)}, ValueError, ["start", r"\(2,\)", r"\(3,\)"]),
    ({"start": torch.tensor([0, 5, 20]), "validate": True}, ValueError, ["start", "sample 2", r"0\.\.19"]),
    ({"start": torch.tensor([0, -1, 20]), "validate": True}, ValueError, ["start", "sample 1", r"0\.\.19"]),
    ({"start": torch.tensor(20), "validate": True}, ValueError, ["start", "sample 0", r"0\.\.19"]),
    ({"mask": torch.ones(3, 20)}, ValueError, ["mask", "bool", "torch.float32", r"\(3, 20\)"]),
    ({"mask": torch.ones(3, 19).bool()}, ValueError, ["mask", r"\(3, 20\)", r"\(3, 19\)"]),
    ({"mask": [[True] * 20] * 3}, ValueError, ["mask", "bool tensor", "list"]),
]


@pytest.mark.parametrize(("changed", "error", "said"), REFUSED)
def test_refused(changed, error, said):
    arguments = {"tokens": TOKENS, "keep": 5} | changed
    for part in said:
        with pytest.raises(error, match=part):
            apet.compress(arguments["tokens"], **{k: v for k, v in arguments.items() if k != "tokens"})


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        apet.compress(TOKENS, 5, 10)
