"""The Triton kernels against the torch definition: on a GPU compiled, elsewhere by Triton's interpreter."""

import pytest
import torch
from core import noise

import apet
from apet import compressor
from apet.core.rows import Rows, add_product, add_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")

from apet.kernels.triton_rows import TritonRows  # noqa: E402

SHAPES = [(1, 1, 1), (2, 5, 3), (3, 33, 16), (1, 70, 131), (2, 97, 40)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
on_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def pair(tokens):
    """The same tokens by torch and by Triton."""
    return Rows(tokens.float().cpu()), TritonRows(tokens.to(DEVICE))


@on_shapes
@on_dtypes
def test_products_and_distances(shape, dtype):
    reference, rows = pair(noise(*shape).to(dtype))
    torch.testing.assert_close(rows.squared_norms.cpu(), reference.squared_norms)
    torch.testing.assert_close(rows.mean().cpu(), reference.mean())
    vectors = noise(shape[0], 3, shape[2]).double()
    torch.testing.assert_close(rows.products(vectors.to(DEVICE)).cpu(), reference.products(vectors))
    pick = torch.arange(shape[0]).unsqueeze(-1) % shape[1]
    gap = noise(*shape[:2]).abs() * shape[2]
    products, gaps = rows.approach(pick.to(DEVICE), gap.to(DEVICE))
    expected_products, expected_gaps = reference.approach(pick, gap)
    torch.testing.assert_close(products.cpu(), expected_products)
    torch.testing.assert_close(gaps.cpu(), expected_gaps)


@on_shapes
@on_dtypes
def test_nearest(shape, dtype):
    batch, n, dim = shape
    reference, rows = pair(noise(*shape).to(dtype))
    donors = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(b)) for b in range(batch)])
    receivers = noise(batch, 7, dim).to(dtype).float()
    allowed = torch.arange(7).expand(batch, -1) != 2
    target = rows.nearest(donors.to(DEVICE), receivers.to(DEVICE), allowed.to(DEVICE)).cpu()
    assert torch.equal(target, reference.nearest(donors, receivers, allowed))


def test_the_first_of_equal_receivers_wins():
    _, rows = pair((4 * noise(1, 40, 20)).round())  # whole numbers: no rounding, in whatever order they are added
    receivers = (4 * noise(1, 1, 20)).round().expand(1, 150, 20)
    allowed = torch.arange(150).expand(1, -1) > 1
    donors = torch.arange(40).unsqueeze(0).to(DEVICE)
    assert (rows.nearest(donors, receivers.to(DEVICE), allowed.to(DEVICE)) == 2).all()


@on_shapes
@on_dtypes
def test_group_means(shape, dtype):
    batch, n, _ = shape
    tokens = noise(*shape).to(dtype)
    group = torch.arange(batch * n).view(batch, n) * 7 % 6 - 1
    tokens[group < 0] = torch.nan
    reference, rows = pair(tokens)
    means = rows.group_means(group.to(DEVICE), 5).cpu()
    torch.testing.assert_close(means, reference.group_means(group, 5).float(), atol=1e-6, rtol=1e-6)


def test_both_ways_of_adding_agree():
    """CPUs add rows, other devices without Triton multiply by the assignment."""
    tokens, group = noise(2, 30, 4).double(), torch.arange(60).view(2, 30) % 5
    tokens[group == 4] = torch.nan
    by_row, by_product = (noise(2, 5, 4).double() for _ in range(2))
    add_rows(by_row, tokens, group)
    add_product(by_product, tokens, group)
    torch.testing.assert_close(by_row[:, :4], by_product[:, :4])


@on_dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"insertion": "blend", "slots": "error", "ridge": 0.1},
        {"insertion": "append", "start": 3},
        {"masked": True},
        {"basis_selection": "random"},
    ],
    ids=str,
)
def test_compress(dtype, options, monkeypatch):
    options = dict(options)
    tokens = noise(3, 90, 48).to(dtype)
    if options.pop("masked", False):
        options["mask"] = noise(3, 90) > -0.7
    expected = apet.compress(tokens, 20, **options)
    monkeypatch.setattr(compressor, "rows_for", TritonRows)
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    result = apet.compress(tokens.to(DEVICE), 20, **moved)
    for name in ("indices", "basis", "sources"):
        assert torch.equal(getattr(result, name).cpu(), getattr(expected, name)), name
    torch.testing.assert_close(result.errors.cpu(), expected.errors)
    torch.testing.assert_close(result.tokens.cpu(), expected.tokens)
    alone = apet.compress(tokens[1:2].to(DEVICE), 20, **{k: v[1:2] if k == "mask" else v for k, v in moved.items()})
    assert torch.equal(alone.tokens[0], result.tokens[1]) and torch.equal(alone.errors[0], result.errors[1])
