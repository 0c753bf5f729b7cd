"""Inputs at the edge: tiny budgets, equal or collinear tokens, huge values, non-finite samples."""

import pytest
import torch

import apet
from core import brute_force, noise

SELECTIONS = ["fps", "dpc", "random"]
INSERTIONS = ["overwrite", "blend", "append", "none"]


def check_shape(result, tokens, keep: int, rows: int | None = None) -> None:
    """`keep` rows, finite, with positions that exist."""
    batch, n, dim = tokens.shape
    rows = rows or keep
    assert result.tokens.shape == (batch, rows, dim) and result.indices.shape == (batch, rows)
    assert result.errors.shape == (batch, n) and result.errors.dtype == torch.float32
    assert result.sources.shape == (batch, n)
    assert result.tokens.isfinite().all() and result.errors.isfinite().all()
    assert (0 <= result.indices[:, :keep]).all() and (result.indices < n).all()
    assert all(len(set(row)) == keep for row in result.indices[:, :keep].tolist())


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("keep", [25, 26, 1000])
def test_keeping_all_is_the_identity(keep, insertion):
    tokens = noise(2, 25, 6)
    result = apet.compress(tokens, keep, insertion=insertion)
    assert torch.equal(result.tokens, tokens)
    assert result.indices.tolist() == result.sources.tolist() == [list(range(25))] * 2
    assert result.errors.shape == (2, 25) and result.basis.shape == (2, 10)


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("keep", [1, 2, 5, 10, 24])
def test_any_budget_against_any_basis(keep, selection, insertion):
    tokens = noise(2, 25, 6)
    for basis in (0, 1, 10, 1000):
        result = apet.compress(tokens, keep, basis=basis, basis_selection=selection, insertion=insertion)
        extra = min(basis, 25) if insertion == "append" else 0
        check_shape(result, tokens, keep, keep + extra)


def test_one_kept_token_is_the_mean_of_all():
    tokens = noise(2, 25, 6)
    result = apet.compress(tokens, 1)
    torch.testing.assert_close(result.tokens, tokens.mean(1, keepdim=True))
    assert result.indices.squeeze(1).tolist() == tokens.norm(dim=-1).argmax(1).tolist()


def test_without_basis_the_error_is_the_norm():
    tokens = noise(2, 25, 6)
    result = apet.compress(tokens, 5, basis=0)
    torch.testing.assert_close(result.errors, tokens.norm(dim=-1))
    assert result.basis.shape == (2, 0)


@pytest.mark.parametrize("ridge", [1e-5, 0.0])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("value", [0.0, 1.0, 20.0, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_tokens(value, selection, ridge, dtype):
    """A blank picture. Norm^2 12800 raised in the original (20^2 * 32)."""
    tokens = torch.full((2, 40, 32), value, dtype=dtype)
    result = apet.compress(tokens, 12, basis_selection=selection, ridge=ridge)
    check_shape(result, tokens, 12)
    torch.testing.assert_close(result.tokens, tokens[:, :12], rtol=1e-3, atol=0)
    if selection != "random":
        assert result.basis.tolist() == [[0] + [-1] * 9] * 2
    assert (result.errors <= 1e-3 * tokens[0, 0].float().norm()).all()


@pytest.mark.parametrize("selection", ["fps", "dpc"])
def test_fewer_distinct_tokens_than_the_basis(selection):
    """Three distinct tokens, each many times: a basis of three, and nothing but these three comes out."""
    distinct = 50 * noise(3, 16)
    tokens = distinct[torch.arange(40) % 3].unsqueeze(0)
    result = apet.compress(tokens, 12, basis_selection=selection)
    assert result.basis[0, 3:].tolist() == [-1] * 7
    assert {pick % 3 for pick in result.basis[0, :3].tolist()} == {0, 1, 2}
    check_shape(result, tokens, 12)
    assert (torch.cdist(result.tokens[0], distinct).amin(1) < 1e-4).all()


def test_two_distinct_tokens_are_both_basis_tokens():
    tokens = torch.ones(1, 30, 8)
    tokens[0, 17] = 2
    assert apet.compress(tokens, 6).basis[0, :3].tolist() == [17, 0, -1]


@pytest.mark.parametrize(("norm", "ridge"), [(1.0, 0.0), (100.0, 0.0), (100.0, 1e-5), (6e4, 0.0), (6e4, 1e-5)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_dependent_tokens_have_no_error_and_others_have_theirs(rank, norm, ridge):
    """50 tokens of low rank make a singular basis; 10 tokens outside their span keep their distance to it."""
    tokens = noise(1, 60, rank) @ noise(1, rank, 32, seed=1)
    tokens *= norm / tokens.norm(dim=-1).amax()
    span = torch.linalg.qr(tokens[0, :rank].T.double()).Q
    tokens[0, 50:] += 0.1 * norm * noise(10, 32, seed=2) / 32**0.5
    result = apet.compress(tokens, 20, basis=8, basis_selection="random", ridge=ridge)
    outside = [pick for pick in result.basis[0].tolist() if pick >= 50]
    span = torch.linalg.qr(torch.cat([span, tokens[0, outside].T.double()], 1)).Q
    expected = (tokens[0].T.double() - span @ (span.T @ tokens[0].T.double())).norm(dim=0)
    torch.testing.assert_close(result.errors[0].double(), expected, rtol=1e-3, atol=1e-4 * norm)


def test_squared_distances_beyond_float16():
    """Distances of 60000 have squares far beyond float16; the far tokens are found in order of their distance."""
    tokens = noise(1, 40, 4).half()
    tokens[0, [0, 5, 11, 23], 0] = torch.tensor([1.0, 60000.0, -60000.0, 30000.0]).half()
    result = apet.compress(tokens, 10, basis=4, start=0)
    assert result.basis[0, 1:].tolist() == [11, 5, 23]
    check_shape(result, tokens, 10)


@pytest.mark.parametrize("scale", [1.0, 2.0**6, 2.0**12])
def test_densities_of_large_tokens_do_not_underflow(scale):
    tokens = noise(1, 30, 4) * scale
    picks, _, margin = brute_force.density_peaks(tokens[0].double().numpy(), 3)
    assert margin > 1e-5 and picks != [0, 1, 2]
    assert apet.compress(tokens, 8, basis=3, basis_selection="dpc").basis[0].tolist() == picks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mean_of_a_large_group_does_not_overflow(dtype):
    tokens = torch.full((1, 600, 8), 6e4, dtype=dtype)
    tokens[0, 3] = -6e4
    result = apet.compress(tokens, 2, basis=0)
    assert sorted(result.tokens[0, :, 0].sign().tolist()) in ([-1, 1], [1, 1]) and result.tokens.isfinite().all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("insertion", ["overwrite", "append"])
def test_a_bad_sample_touches_no_other(value, selection, insertion):
    clean = noise(3, 40, 16)
    bad = clean.clone()
    bad[1, 7] = value
    bad[1, 9, 3] = value
    options = {"basis_selection": selection, "insertion": insertion}
    for field, other in zip(apet.compress(bad, 12, **options), apet.compress(clean, 12, **options), strict=True):
        assert field.shape == other.shape
        assert torch.equal(field[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("keep", [4, 25])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_validate_names_the_bad_sample(value, keep):
    tokens = noise(3, 20, 4)
    apet.compress(tokens, keep, validate=True)
    tokens[2, 5, 1] = value
    with pytest.raises(ValueError, match="sample 2.*NaN or infinite"):
        apet.compress(tokens, keep, validate=True)


def test_an_empty_batch():
    result = apet.compress(torch.zeros(0, 20, 4), 5)
    assert result.tokens.shape == (0, 5, 4) and result.sources.shape == (0, 20)
