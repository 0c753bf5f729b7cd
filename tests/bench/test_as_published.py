"""The formulas as written choose what `apet.compress` chooses, so that timing one against the other is fair."""

from pathlib import Path

import numpy as np
import pytest
import torch

import apet
from apet.bench.as_published import compress_as_published
from apet.bench.shapes import Shape, block

GOLDEN = Path(__file__).parents[1] / "golden" / "algorithm"


def assert_equal(ours, written):
    for name in ("indices", "basis", "sources"):
        torch.testing.assert_close(getattr(ours, name), getattr(written, name), msg=name)
    torch.testing.assert_close(ours.tokens, written.tokens, rtol=1e-4, atol=1e-4)
    rest = torch.ones_like(ours.errors, dtype=torch.bool).scatter(1, ours.basis, False)
    torch.testing.assert_close(ours.errors[rest], written.errors[rest], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", ["position", "error"])
@pytest.mark.parametrize("shape", ["1x576x64:96", "3x100x48:30", "2x75x16:11"])
def test_same_choices_as_compress(shape, slots):
    shape = Shape.parse(shape)
    tokens = block(shape, torch.device("cpu"), torch.float32)
    before = tokens.clone()
    written = compress_as_published(tokens, shape.keep, slots=slots)
    assert torch.equal(tokens, before)
    assert_equal(apet.compress(tokens, shape.keep, start=0, slots=slots), written)


@pytest.mark.parametrize("name", ["enc_b1_n576_d64_keep96_basis10", "enc_b1_n576_d1024_keep96_basis10"])
def test_same_choices_as_the_recorded_original(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    tokens = torch.from_numpy(golden["features"]).float()
    result = compress_as_published(tokens, int(golden["keep"]), start=int(np.ravel(golden["start"])[0]))
    np.testing.assert_array_equal(result.indices, np.atleast_2d(golden["kept_indices"]))
    np.testing.assert_array_equal(result.basis, np.atleast_2d(golden["basis_indices"]))
