"""The fingerprint of weights: what changes it and what must not."""

import pytest
import torch
from torch import nn

from llava.eval.weights import weights_fingerprint


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(50, 30), nn.LayerNorm(30), nn.Linear(30, 3, bias=False))


def test_equal_weights_have_equal_fingerprints():
    assert weights_fingerprint(model()) == weights_fingerprint(model())
    assert len(weights_fingerprint(model())) == 16


def test_reading_leaves_the_weights_alone():
    one = model()
    before = [parameter.clone() for parameter in one.parameters()]
    weights_fingerprint(one)
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters(), strict=True))


@pytest.mark.parametrize("change", ["seed", "scale", "one tensor", "shape", "dtype", "frozen"])
def test_what_changes_it(change):
    other = model(seed=1 if change == "seed" else 0)
    with torch.no_grad():
        if change == "scale":
            for parameter in other.parameters():
                parameter.mul_(1.001)
        elif change == "one tensor":
            other[2].weight.add_(1e-6)
        elif change == "shape":
            other[2].weight = nn.Parameter(other[2].weight.reshape(30, 3))
        elif change == "dtype":
            other.to(torch.bfloat16)
        elif change == "frozen":
            other.requires_grad_(False)
    same = weights_fingerprint(other) == weights_fingerprint(model())
    assert same == (change == "frozen")


def test_weights_that_are_not_in_memory_count_by_shape():
    placed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    first = weights_fingerprint(placed)
    placed[1] = nn.Linear(4, 5, device="meta")
    assert weights_fingerprint(placed) != first


def test_transposed_and_empty_parameters():
    holder = nn.Module()
    holder.transposed = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    holder.empty = nn.Parameter(torch.empty(0, 3))
    copy = nn.Module()
    copy.transposed = nn.Parameter(holder.transposed.detach().contiguous())
    copy.empty = nn.Parameter(torch.empty(0, 3))
    assert weights_fingerprint(holder) == weights_fingerprint(copy)
