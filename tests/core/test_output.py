"""What a result says about itself: merging conserves, sources point home, gradients follow the averages."""

import pytest
import torch

import apet
from core import noise


def counts(result, rows: int) -> torch.Tensor:
    """How many tokens (B, rows) each output row stands for."""
    return torch.nn.functional.one_hot(result.sources, rows).sum(1)


@pytest.mark.parametrize("keep", [1, 7, 39])
def test_merging_conserves_the_sum(keep):
    tokens = noise(3, 40, 16)
    result = apet.compress(tokens, keep, insertion="none")
    size = counts(result, keep)
    assert size.sum(1).tolist() == [40] * 3 and (size >= 1).all()
    torch.testing.assert_close((size.unsqueeze(-1) * result.tokens).sum(1), tokens.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("insertion", ["overwrite", "blend", "append", "none"])
@pytest.mark.parametrize("merge", [True, False])
def test_rows_are_the_means_of_their_sources(insertion, merge):
    """Except for the slots, which hold the basis and stand for their own token only."""
    tokens = noise(2, 40, 16)
    result = apet.compress(tokens, 12, basis=5, insertion=insertion, merge=merge)
    for x, rows, indices, sources, errors, basis in zip(
        tokens, result.tokens, result.indices, result.sources, result.errors, result.basis, strict=True
    ):
        kept = indices[:12].tolist()
        slots = sorted(kept, key=lambda i: -errors[i])[7:] if insertion in ("overwrite", "blend") else []
        assert sources[kept].tolist() == list(range(12))
        assert set(sources.tolist()) == set(range(12)) | (set() if merge else {-1})
        for row, index in enumerate(kept):
            members = x[sources == row]
            if index in slots:
                incoming = x[basis[sorted(slots).index(index)]]
                assert len(members) == 1
                expected = incoming if insertion == "overwrite" else 0.5 * incoming + 0.5 * x[index]
            else:
                expected = members.mean(0)
            torch.testing.assert_close(rows[row], expected)
        if insertion == "append":
            assert torch.equal(rows[12:], x[basis]) and torch.equal(indices[12:], basis)


def test_append_is_ordered_by_falling_error_and_the_rest_by_position():
    tokens = noise(2, 40, 16)
    for errors, kept in zip(*apet.compress(tokens, 12, insertion="append")[2:0:-1], strict=True):
        assert (errors[kept[:12]].diff() <= 0).all()
    for insertion in ("overwrite", "blend", "none"):
        assert (apet.compress(tokens, 12, insertion=insertion).indices.diff() > 0).all()


def test_gradients_follow_the_averages():
    """A kept row spreads its gradient evenly over its sources; nothing flows through the choices."""
    tokens = noise(2, 40, 16).requires_grad_()
    result = apet.compress(tokens, 12, insertion="none")
    (gradient,) = torch.autograd.grad(result.tokens.sum(), tokens)
    expected = (1 / counts(result, 12)).gather(1, result.sources)
    torch.testing.assert_close(gradient, expected.unsqueeze(-1).expand_as(tokens).float())
    assert not result.indices.requires_grad and not result.sources.requires_grad


@pytest.mark.parametrize("selection", ["fps", "dpc", "random"])
def test_gradients_are_finite_and_absent_without_need(selection):
    tokens = noise(2, 40, 16)
    assert not any(field.requires_grad for field in apet.compress(tokens, 12, basis_selection=selection))
    with torch.inference_mode():
        inside = apet.compress(tokens, 12, basis_selection=selection)
    tokens.requires_grad_()
    result = apet.compress(tokens, 12, basis_selection=selection)
    assert torch.equal(result.tokens, inside.tokens)
    (gradient,) = torch.autograd.grad(result.tokens.square().sum(), tokens)
    assert gradient.isfinite().all() and gradient.any()
