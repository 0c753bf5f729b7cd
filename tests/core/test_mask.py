"""Padding is never chosen, never merged and takes no budget, wherever it sits and whatever it holds."""

import pytest
import torch

import apet
from core import noise

REAL, PADDED = 24, 33
PLACES = {
    "left": list(range(PADDED - REAL, PADDED)),
    "right": list(range(REAL)),
    "scattered": [i for i in range(PADDED) if i % 11 not in (0, 4, 7)],
}
FILLINGS = [0.0, 1e4, torch.nan]


def padded(tokens: torch.Tensor, place: str, filling: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens among padding (B, PADDED, D), their mask, and the padded position of every token."""
    position = torch.tensor(PLACES[place])
    wide = torch.full((len(tokens), PADDED, tokens.shape[-1]), filling)
    wide[:, position] = tokens
    mask = torch.zeros(len(tokens), PADDED, dtype=torch.bool)
    mask[:, position] = True
    return wide, mask, position


def moved(indices: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    return torch.where(indices < 0, -1, position[indices.clamp(min=0)])


@pytest.mark.parametrize("selection", ["fps", "dpc"])
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("place", PLACES)
def test_masked_equals_unmasked_on_the_real_tokens(place, filling, selection):
    tokens = noise(2, REAL, 16)
    wide, mask, position = padded(tokens, place, filling)
    for insertion in ("overwrite", "blend", "append", "none"):
        for slots, merge in (("position", True), ("error", True), ("error", False)):
            options = {"basis": 5, "basis_selection": selection, "insertion": insertion, "slots": slots, "merge": merge}
            plain, masked = apet.compress(tokens, 9, **options), apet.compress(wide, 9, mask=mask, **options)
            torch.testing.assert_close(masked.tokens, plain.tokens)
            assert torch.equal(masked.indices, moved(plain.indices, position))
            assert torch.equal(masked.basis, moved(plain.basis, position))
            torch.testing.assert_close(masked.errors[:, position], plain.errors)
            assert torch.equal(masked.sources[:, position], plain.sources)
            assert (masked.errors[~mask] == -torch.inf).all() and (masked.sources[~mask] == -1).all()


@pytest.mark.parametrize("selection", ["fps", "dpc", "random"])
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("keep", [4, REAL - 1, REAL, REAL + 3, PADDED, PADDED + 5])
def test_padding_is_never_chosen(keep, filling, selection):
    wide, mask, position = padded(noise(2, REAL, 16), "scattered", filling)
    result = apet.compress(wide, keep, basis=5, basis_selection=selection, mask=mask)
    real = set(position.tolist())
    for indices, basis in zip(result.indices.tolist(), result.basis.tolist(), strict=True):
        assert set(basis) - {-1} <= real
        assert [i for i in indices if i >= 0] == sorted(set(indices) & real)
        assert indices.count(-1) == max(0, min(keep, PADDED) - REAL)
    assert result.tokens.isfinite().all()


@pytest.mark.parametrize("insertion", ["overwrite", "blend", "none"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("keep", [REAL, REAL + 3, PADDED, PADDED + 5])
def test_a_sample_with_no_more_tokens_than_the_budget_keeps_all(keep, place, insertion):
    """Its tokens unchanged and in order, then zero rows with index -1."""
    tokens = noise(2, REAL, 16)
    wide, mask, position = padded(tokens, place, torch.nan)
    result = apet.compress(wide, keep, mask=mask, insertion=insertion)
    rows = min(keep, PADDED)
    assert torch.equal(result.tokens[:, :REAL], tokens)
    assert torch.equal(result.tokens[:, REAL:], torch.zeros(2, rows - REAL, 16))
    assert result.indices.tolist() == [position.tolist() + [-1] * (rows - REAL)] * 2
    assert result.sources[:, position].tolist() == [list(range(REAL))] * 2


def test_samples_of_different_length_in_one_batch():
    """Long, short, exact and single-token samples each get what they get alone."""
    lengths = [33, 20, 12, 5, 1]
    tokens = noise(5, 33, 16)
    mask = torch.arange(33) < torch.tensor(lengths).unsqueeze(1)
    result = apet.compress(tokens, 12, basis=4, mask=mask)
    for sample, length in enumerate(lengths):
        alone = apet.compress(tokens[sample : sample + 1, :length], 12, basis=4)
        rows = alone.tokens.shape[1]
        torch.testing.assert_close(result.tokens[sample, :rows], alone.tokens[0])
        assert result.indices[sample].tolist() == alone.indices[0].tolist() + [-1] * (12 - rows)
        assert result.sources[sample, :length].tolist() == alone.sources[0].tolist()


def test_a_full_mask_is_no_mask():
    tokens = noise(2, 30, 16)
    for keep in (1, 8, 30, 40):
        plain, masked = apet.compress(tokens, keep), apet.compress(tokens, keep, mask=torch.ones(2, 30).bool())
        assert all(torch.equal(a, b) for a, b in zip(plain[1:3] + plain[4:], masked[1:3] + masked[4:], strict=True))
        torch.testing.assert_close(masked.tokens, plain.tokens)


def test_a_start_on_padding_counts_as_none():
    wide, mask, _ = padded(noise(2, REAL, 16), "left", torch.nan)
    start = torch.tensor([0, 20])
    result = apet.compress(wide, 9, start=start, mask=mask)
    assert result.basis[0].tolist() == apet.compress(wide, 9, mask=mask).basis[0].tolist()
    assert result.basis[1].tolist() == apet.compress(wide, 9, start=20, mask=mask).basis[1].tolist()
    assert result.basis[1, 0] == 20


def test_validate_ignores_padding_and_names_a_sample_without_tokens():
    wide, mask, _ = padded(noise(3, REAL, 16), "left", torch.nan)
    apet.compress(wide, 9, mask=mask, validate=True)
    mask[1] = False
    with pytest.raises(ValueError, match="sample 1 has no real token"):
        apet.compress(wide, 9, mask=mask, validate=True)
    assert (apet.compress(wide, 9, mask=mask).indices[1] == -1).all()
