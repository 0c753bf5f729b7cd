"""The same sample gives the same bits: alone, in any batch, in any memory layout, at every call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apet
from apet.core.similarity import nearest_units, unit_rows
from core import noise

SELECTIONS = ["fps", "dpc", "random"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def sample(result, index) -> list[torch.Tensor]:
    return [field[index] for field in result]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.tuples(st.integers(2, 6), st.sampled_from([5, 9, 25, 33, 96, 144]), st.sampled_from([3, 8, 48, 64, 130])),
    seed=st.integers(0, 99),
    selection=st.sampled_from(SELECTIONS),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    insertion=st.sampled_from(["overwrite", "append"]),
)
def test_a_sample_alone_equals_itself_in_a_batch(shape, seed, selection, dtype, masked, insertion):
    tokens = noise(*shape, seed=seed).to(dtype)
    mask = noise(*shape[:2], seed=seed + 1) > -1 if masked else None
    options = {"basis_selection": selection, "insertion": insertion}
    whole = apet.compress(tokens, shape[1] // 3, mask=mask, **options)
    for index in range(shape[0]):
        one = slice(index, index + 1)
        alone = apet.compress(tokens[one], shape[1] // 3, mask=None if mask is None else mask[one], **options)
        assert same(alone, sample(whole, one))


@pytest.mark.parametrize("shape", [(5, 576, 64, 96), (2, 576, 1024, 96), (3, 96, 4096, 32), (8, 32, 64, 9)])
def test_true_sizes_alone_and_in_a_batch(shape):
    tokens, keep = noise(*shape[:3]), shape[3]
    whole = apet.compress(tokens, keep, slots="error")
    for index in range(shape[0]):
        assert same(apet.compress(tokens[index : index + 1], keep, slots="error"), sample(whole, [index]))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_neighbours_do_not_matter(selection):
    tokens, order = noise(5, 40, 24), [3, 0, 4, 1, 2]
    start = torch.tensor([0, 7, 39, 7, 20])
    whole = apet.compress(tokens, 12, basis_selection=selection, start=start)
    assert same(apet.compress(tokens[order], 12, basis_selection=selection, start=start[order]), sample(whole, order))


@pytest.mark.parametrize("seed", range(6))
def test_tokens_in_the_span_of_the_basis_are_ordered_by_position(seed):
    """With a basis as large as the width every error is rounding noise, which must not decide anything."""
    tokens = noise(4, 40, 6, seed=seed)
    result = apet.compress(tokens, 12, ridge=0.0)
    assert (result.errors == 0).all() and result.indices.tolist() == [list(range(12))] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_kept_and_computation_is_float32(dtype):
    tokens = noise(2, 30, 16).half().to(dtype)
    result = apet.compress(tokens, 8)
    assert result.tokens.dtype == dtype and result.errors.dtype == torch.float32
    full = apet.compress(tokens.float(), 8)
    assert torch.equal(result.indices, full.indices)
    if dtype != torch.float64:
        assert same(result, [full.tokens.to(dtype), *full[1:]])


def test_float64_is_computed_in_float64():
    tokens = noise(2, 30, 16).double() + 1e-9 * noise(2, 30, 16, seed=1).double()
    result = apet.compress(tokens, 8, insertion="none")
    for x, rows, sources in zip(tokens, result.tokens, result.sources, strict=True):
        means = torch.stack([x[sources == row].mean(0) for row in range(8)])
        torch.testing.assert_close(rows, means, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_layout_does_not_matter_and_input_is_never_modified(dtype):
    base = noise(3, 30, 16).to(dtype)
    layouts = {
        "contiguous": base.clone(),
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": base.transpose(1, 2).contiguous().transpose(1, 2),
        "slice": torch.cat([base, base], -1)[..., :16],
    }
    expected = apet.compress(base, 8)
    for name, tokens in layouts.items():
        for options in ({}, {"keep": 30}, {"insertion": "append"}, {"basis_selection": "dpc"}):
            apet.compress(tokens, **{"keep": 8} | options)
        assert tokens._version == 0 or name == "contiguous"
        assert torch.equal(tokens, base), name
        assert same(apet.compress(tokens, 8), expected), name


def test_expanded_tokens():
    row = noise(1, 30, 16)
    one, three = apet.compress(row, 8), apet.compress(row.expand(3, -1, -1), 8)
    assert all(same(one, sample(three, [index])) for index in range(3))
    assert apet.compress(row[:, :1].expand(2, 30, 16), 8).basis[:, 1:].eq(-1).all()


@pytest.mark.parametrize("shape", [(33, 5), (64, 48), (100, 7), (97, 128)])
def test_equal_tokens_keep_the_lower_index(shape):
    """Every token three times: of equal errors the lower position is kept, of equal hosts the first is chosen."""
    n, dim = shape
    tokens = noise(1, n, dim, seed=n).repeat(1, 3, 1)
    result = apet.compress(tokens, n, basis=2, insertion="none", slots="error")
    assert torch.equal(result.errors[:, :n], result.errors[:, n : 2 * n])
    for position in result.indices[0].tolist():
        assert position < n or position - n in result.indices[0].tolist()
    # Copies share one direction, so whatever joins one of them joins the first of them.
    hosts = result.indices[0][result.sources[0]]
    dropped = [i for i in range(3 * n) if i not in result.indices[0].tolist()]
    assert all(hosts[i] < n for i in dropped)
    assert all(hosts[i] == i % n for i in dropped if i % n in result.indices[0].tolist())


@pytest.mark.parametrize("dim", [24, 64, 1024])
@pytest.mark.parametrize("count", [1, 9])
def test_of_equal_hosts_the_first_is_chosen(count, dim):
    """Whatever tile of the matrix product they fall into."""
    for rows in range(3, 100, 2):
        donors, hosts = noise(1, count, dim, seed=rows), noise(1, rows, dim, seed=rows + 100)
        first, second = sorted((rows // 3, rows - 1 - rows % 7 % (rows // 3)))
        hosts[0, [first, second]] = donors[0, 0]
        assert first != second and nearest_units(donors, unit_rows(hosts), torch.ones(1, rows).bool())[0, 0] == first


def test_autocast_changes_nothing():
    tokens = noise(2, 40, 32)
    for selection in SELECTIONS:
        expected = apet.compress(tokens, 10, basis_selection=selection)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert same(apet.compress(tokens, 10, basis_selection=selection), expected)


def test_deterministic_algorithms_are_enough():
    tokens = noise(2, 40, 32)
    expected = [apet.compress(tokens, 10, basis_selection=selection) for selection in SELECTIONS]
    torch.use_deterministic_algorithms(True)
    try:
        for selection, result in zip(SELECTIONS, expected, strict=True):
            assert same(apet.compress(tokens, 10, basis_selection=selection), result)
    finally:
        torch.use_deterministic_algorithms(False)


def test_thread_count_does_not_matter():
    tokens, threads = noise(3, 144, 64), torch.get_num_threads()
    expected = apet.compress(tokens, 40)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same(apet.compress(tokens, 40), expected)
    finally:
        torch.set_num_threads(threads)
