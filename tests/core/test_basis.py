"""Which tokens become the basis: start rules, the random draw, cluster means."""

import pytest
import torch

import apet
from apet.core.basis import random_positions, select_basis
from apet.core.rows import Rows
from core import noise


def basis(tokens, **options) -> list[list[int]]:
    return apet.compress(tokens, 12, **options).basis.tolist()


def test_default_start_is_the_token_farthest_from_the_mean():
    tokens = noise(3, 40, 8) + 100
    expected = (tokens.double() - tokens.double().mean(1, keepdim=True)).norm(dim=-1).argmax(1)
    assert [picks[0] for picks in basis(tokens)] == expected.tolist()


def test_start_is_the_first_basis_token():
    tokens = noise(3, 40, 8)
    assert [picks[0] for picks in basis(tokens, start=39)] == [39] * 3
    for start in (torch.tensor([3, 0, 39]), torch.tensor([3, 0, 39], dtype=torch.int32)):
        each = basis(tokens, start=start)
        assert each == [basis(tokens[i : i + 1], start=int(start[i]))[0] for i in range(3)]
    for shared in (torch.tensor(7), torch.tensor([7])):
        assert basis(tokens, start=shared) == basis(tokens, start=7)


def test_farthest_points_are_translation_invariant():
    tokens = noise(2, 40, 8)
    assert basis(tokens + 100, start=0) == basis(tokens, start=0)


def test_random_is_reproducible_without_touching_the_global_generator():
    tokens = noise(3, 40, 8)
    state = torch.get_rng_state()
    first = basis(tokens, basis_selection="random")
    torch.manual_seed(99)
    torch.rand(5)
    assert basis(tokens, basis_selection="random") == first
    torch.set_rng_state(state)
    basis(tokens, basis_selection="random")
    assert torch.equal(torch.get_rng_state(), state)


def test_random_follows_its_generator():
    tokens = noise(3, 40, 8)
    generator = torch.Generator().manual_seed(5)
    draws = [basis(tokens, basis_selection="random", generator=generator) for _ in range(2)]
    generator.manual_seed(5)
    assert [basis(tokens, basis_selection="random", generator=generator) for _ in range(2)] == draws
    assert draws[0] != draws[1]
    assert draws[0][0] == draws[0][1] == draws[0][2]


@pytest.mark.parametrize("masked", [False, True])
def test_random_is_uniform_and_without_repetition(masked):
    mask = torch.tensor([[True, False] * 5]) if masked else None
    hits, trials, k = torch.zeros(10), 400, 3
    for seed in range(trials):
        picks, valid = random_positions(
            torch.zeros(1, 10, 1), k, mask=mask, generator=torch.Generator().manual_seed(seed)
        )
        assert valid.all() and len(set(picks[0].tolist())) == k
        hits[picks[0]] += 1
    share = trials * k / (5 if masked else 10)
    expected = share * (mask[0] if masked else torch.ones(10))
    assert ((hits - expected).abs() <= 4 * share**0.5 * (expected > 0)).all()


def test_density_peaks_find_the_clusters():
    """Three separated clouds: one centre in each, and the basis is their means."""
    label = torch.arange(30) % 3
    clouds = 6 * torch.eye(8)[:3]
    tokens = (clouds[label] + 0.5 * noise(30, 8)).unsqueeze(0)
    found = select_basis(Rows(tokens), 3, "dpc")
    centres = label[found.indices[0]].tolist()
    assert sorted(centres) == [0, 1, 2]
    means = torch.stack([tokens[0, label == centre].mean(0) for centre in centres])
    torch.testing.assert_close(found.features[0].float(), means)


@pytest.mark.parametrize("selection", ["fps", "dpc", "random"])
def test_valid_picks_come_first(selection):
    mask = torch.arange(20) < torch.tensor([[20], [4], [1]])
    found = select_basis(Rows(noise(3, 20, 8)), 6, selection, mask=mask)
    assert found.valid.sum(1).tolist() == [6, 4, 1]
    assert (found.valid[:, :-1] >= found.valid[:, 1:]).all()
    assert ((found.indices >= 0) == found.valid).all()
    assert (found.features[~found.valid] == 0).all()
