"""ApET+ and the greedy volume it rests on: every part against a plain implementation, and every switch."""

import numpy as np
import pytest
import torch

from apet.core import similarity
from apet.methods import get_method, token_sizes
from apet.methods._features import error_space, outlierness, sink_positions
from apet.methods._select import cosine
from apet.methods._volume import Quota, greedy_volume
from methods import brute_force as brute
from methods.synthetic import Inputs, noise, run

# The bare selection: no quota, no noise, no sinks, no weights, largest norm first, nothing merged.
BARE = {
    "normalise": "raw",
    "quota": 0.0,
    "ridge": 0.0,
    "sinks": "keep",
    "start": "norm",
    "merge": False,
    "outlier": 0.0,
}


def gram(x):
    return x @ x.transpose(1, 2)


def test_volume_is_the_determinant_greedy():
    tokens = noise(2, 12, 9)
    picks = greedy_volume(gram(tokens), 5).picks
    for b in range(2):
        x = tokens[b].double().numpy()
        assert picks[b].tolist() == brute.log_det_greedy(x @ x.T, 5)


@pytest.mark.parametrize(("n", "dim", "keep"), [(12, 9, 5), (40, 20, 15), (33, 6, 6)])
def test_volume_is_the_gram_schmidt_order(n, dim, keep):
    tokens = noise(2, n, dim)
    volume = greedy_volume(gram(tokens), keep)
    result = run("apet_plus", tokens, keep, **BARE)
    for b in range(2):
        picks, errors = brute.gram_schmidt_greedy(tokens[b].double().numpy(), keep)
        assert volume.picks[b].tolist() == result.basis[b].tolist() == picks
        assert result.indices[b].tolist() == sorted(picks)
        torch.testing.assert_close(result.errors[b].double(), torch.tensor(errors), atol=3e-3, rtol=1e-3)
        for t in range(1, keep + 1):
            left = (brute.gram_schmidt_greedy(tokens[b].double().numpy(), t)[1] ** 2).sum()
            torch.testing.assert_close(volume.energy[b, t - 1].item(), left, atol=1e-3, rtol=1e-4)


def test_volume_starts_where_it_is_told():
    tokens = noise(2, 20, 9)
    picks = greedy_volume(gram(tokens), 6, first=torch.tensor([3, 7])).picks
    for b, first in enumerate((3, 7)):
        assert picks[b].tolist() == brute.gram_schmidt_greedy(tokens[b].double().numpy(), 6, first)[0]


@pytest.mark.parametrize("rounds", [1, 2, 3, 7])
def test_rounds_pick_several_between_updates(rounds):
    """Every round takes the largest residuals, and the next one sees the projection onto all of them removed."""
    tokens, keep = noise(1, 30, 12), 7
    volume = greedy_volume(gram(tokens), keep, rounds=rounds)
    x = tokens[0].double().numpy()
    chosen, rest = [], x
    for size in [len(part) for part in np.array_split(range(keep), rounds)]:
        energy = (rest**2).sum(1)
        energy[chosen] = -1
        chosen += brute.ranked(energy)[:size]
        basis = np.linalg.qr(x[chosen].T)[0]
        rest = x - x @ basis @ basis.T
    assert volume.picks[0].tolist() == chosen
    torch.testing.assert_close(volume.residual[0].double(), torch.tensor((rest**2).sum(1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rounds", [0, 4])
def test_dependent_tokens_leave_nothing_and_are_taken_in_order(rounds):
    tokens = noise(1, 3, 8)[:, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]
    volume = greedy_volume(gram(tokens), 7, rounds=rounds)
    assert len(set(volume.picks[0].tolist())) == 7 and volume.residual.isfinite().all()
    if not rounds:
        assert sorted(volume.picks[0, :3].tolist()) == [0, 1, 2] and volume.picks[0, 3:].tolist() == [3, 4, 5, 6]
        assert volume.residual.max() == 0


def test_weights_and_barred_tokens():
    tokens = noise(1, 20, 9)
    weight = torch.rand(1, 20, generator=torch.Generator().manual_seed(1))
    barred = torch.arange(20).unsqueeze(0) % 3 == 0
    picks = greedy_volume(gram(tokens), 5, weight=weight, barred=barred).picks[0].tolist()
    rest, chosen = tokens[0].double().numpy(), []
    for _ in range(5):
        score = (rest**2).sum(1) * weight[0].double().numpy()
        score[[i for i in range(20) if i % 3 == 0 or i in chosen]] = -1
        chosen.append(int(score.argmax()))
        axis = rest[chosen[-1]] / np.linalg.norm(rest[chosen[-1]])
        rest = rest - np.outer(rest @ axis, axis)
    assert picks == chosen


@pytest.mark.parametrize("rounds", [0, 1, 5])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_quota_guarantees_every_window_its_share_of_the_error(rounds, share):
    tokens = noise(3, 48, 30)
    # Louder tokens in the first window: without quota they are all taken.
    tokens[:, :12] *= 1.6
    groups = torch.arange(48) // 12
    quota = Quota(groups, 4, share, 0)
    keep = 20
    picks = greedy_volume(gram(tokens), keep, rounds=rounds, quota=quota).picks
    norms = tokens.norm(dim=-1).unflatten(1, (4, 12)).sum(-1)
    floors = (share * keep * norms / norms.sum(-1, keepdim=True)).floor().clamp(max=12)
    counts = torch.stack([(picks // 12 == w).sum(-1) for w in range(4)], 1)
    free = greedy_volume(gram(tokens), keep, rounds=rounds).picks
    assert (counts >= floors).all() and (counts.sum(-1) == keep).all()
    assert all(len(set(row)) == keep for row in picks.tolist())
    if share == 1.0:
        before = torch.stack([(free // 12 == w).sum(-1) for w in range(4)], 1)
        assert (before < floors).any()


def test_a_quota_that_is_met_anyway_changes_nothing():
    tokens = noise(2, 48, 60)
    quota = Quota(torch.arange(48) // 12, 4, 0.2, 2)
    assert torch.equal(greedy_volume(gram(tokens), 24, quota=quota).picks, greedy_volume(gram(tokens), 24).picks)


@pytest.mark.parametrize("options", [{}, {"rank": 5}, {"quota": 0.0}, {"quota": 0.6}, {"quota": 1.0}, {"spoilt": True}])
@pytest.mark.parametrize("keep", [1, 17, 40])
def test_looking_at_values_changes_nothing(options, keep, monkeypatch):
    """One pick at a time on the CPU, and all samples at once as where a look at a value is a wait: the same picks."""
    tokens, options = noise(3, 48, 30), dict(options)
    tokens[:, :12] *= 1.6
    tokens[2, 20:30] = tokens[2, 10:20]
    if options.pop("spoilt", False):
        tokens[1, 4] = torch.nan
    if "quota" in options:
        options["quota"] = Quota(torch.arange(48) // 12, 4, options["quota"], keep // 4)
    options["weight"] = torch.rand(3, 48, generator=torch.Generator().manual_seed(1))
    options |= {"first": torch.tensor([5, 40, 7]), "barred": torch.arange(48).expand(3, -1) % 12 == 6}
    looked = greedy_volume(gram(tokens.double()), keep, **options)
    monkeypatch.setattr(similarity, "MAY_LOOK", ())
    together = greedy_volume(gram(tokens.double()), keep, **options)
    assert torch.equal(looked.picks, together.picks)
    torch.testing.assert_close(looked.residual, together.residual, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(looked.energy, together.energy, rtol=1e-9, atol=1e-9)


def test_error_spaces():
    x = noise(2, 30, 5) + 3
    torch.testing.assert_close(error_space(x, "raw", 0.0), x)
    torch.testing.assert_close(error_space(x, "unit", 0.1).norm(dim=-1), torch.ones(2, 30))
    torch.testing.assert_close(error_space(x, "centre", 0.0).mean(1), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        error_space(x, "centre_unit", 0.0), torch.nn.functional.normalize(x - x.mean(1, True), dim=-1)
    )
    clipped = error_space(x, "raw", 0.1)
    limit = x.norm(dim=-1).sort(descending=True).values[:, 3]
    torch.testing.assert_close(clipped.norm(dim=-1), torch.minimum(x.norm(dim=-1), limit.unsqueeze(1)))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(clipped, x, dim=-1), torch.ones(2, 30))


def test_sinks_become_one_kept_token():
    tokens = noise(2, 40, 8)
    tokens[:, [5, 17, 30]] *= torch.tensor([30.0, 20.0, 25.0]).view(1, 3, 1)
    assert sink_positions(tokens, 0.07, 6).tolist() == tokens.norm(dim=-1).topk(3).indices.tolist()
    result = run("apet_plus", tokens, 6, sinks="merge", sink_share=0.07, similarity_floor=1.0)
    for b in range(2):
        largest = tokens[b].norm(dim=-1).argmax().item()
        assert set(result.indices[b].tolist()) & {5, 17, 30} == {largest}
        row = result.indices[b].tolist().index(largest)
        torch.testing.assert_close(result.tokens[b, row], tokens[b, [5, 17, 30]].mean(0))
    # A budget of all but one token leaves at most two tokens to put together.
    assert sink_positions(tokens, 0.5, 39).shape == (2, 2)
    assert run("apet_plus", tokens, 39, sinks="merge", sink_share=0.5).tokens.shape == (2, 39, 8)


@pytest.mark.parametrize("floor", [None, 0.2, 0.5])
def test_merging(floor):
    tokens = noise(2, 40, 8)
    sizes = torch.randint(1, 5, (2, 40), generator=torch.Generator().manual_seed(0)).float()
    kept = run("apet_plus", tokens, 9, merge=False)
    for weighted in (True, False):
        options = {"similarity_floor": floor, "size_weighted": weighted}
        result = run("apet_plus", tokens, 9, sizes=sizes, **options)
        assert torch.equal(result.indices, kept.indices)
        for b in range(2):
            weight = sizes[b].double().numpy() if weighted else None
            rows = brute.merged(tokens[b].double().numpy(), kept.indices[b].tolist(), floor, weight)
            wanted = torch.tensor(np.array([rows[i] for i in sorted(rows)])).float()
            torch.testing.assert_close(result.tokens[b], wanted, atol=1e-5, rtol=1e-5)
        total = token_sizes(result, sizes).sum(-1)
        assert torch.equal(total, sizes.sum(-1)) if floor is None else (total <= sizes.sum(-1)).all()


def test_error_target_stops_where_enough_is_explained():
    tokens = noise(3, 40, 20)
    tokens[1, 6:] = tokens[1, :6].repeat(6, 1)[:34]  # six distinct tokens
    tokens[2] = tokens[2, 0]
    options = BARE | {"error_target": 0.3, "merge": True, "similarity_floor": None}
    full = run("apet_plus", tokens, 25, **(options | {"error_target": None}))
    result = run("apet_plus", tokens, 25, **options)
    counts = (result.indices >= 0).sum(-1).tolist()
    for b in range(3):
        x = tokens[b].double().numpy()
        left = [(brute.gram_schmidt_greedy(x, t)[1] ** 2).sum() / (x**2).sum() for t in range(1, counts[b] + 1)]
        assert left[-1] <= 0.3 and all(share > 0.3 for share in left[:-1])
        assert result.indices[b, : counts[b]].tolist() == sorted(full.basis[b, : counts[b]].tolist())
        assert (result.indices[b, counts[b] :] == -1).all() and (result.tokens[b, counts[b] :] == 0).all()
        rows = brute.merged(x, result.indices[b, : counts[b]].tolist())
        wanted = torch.tensor(np.array([rows[i] for i in sorted(rows)])).float()
        torch.testing.assert_close(result.tokens[b, : counts[b]], wanted, atol=1e-5, rtol=1e-5)
    assert counts[1] < 6 and counts[2] == 1 and counts[0] > 6
    least = run("apet_plus", tokens, 25, **options, min_keep=8)
    assert (least.indices >= 0).sum(-1).tolist() == [max(8, count) for count in counts]
    dropped = run("apet_plus", tokens, 25, **(options | {"merge": False}))
    assert (dropped.indices == result.indices).all() and (dropped.tokens[:, -1] == 0).any()
    for b in range(3):
        assert sorted(dropped.sources[b][dropped.sources[b] >= 0].tolist()) == list(range(counts[b]))


def test_text_multiplies_the_error():
    tokens, inputs = noise(2, 30, 8), Inputs.random(2, 30, 8)
    plain = run("apet_plus", tokens, 8, inputs=inputs, outlier=0)
    guided = run("apet_plus", tokens, 8, inputs=inputs, outlier=0, text=2.0)
    assert not torch.equal(plain.indices, guided.indices)
    text, mask = inputs.text_embeddings()
    for b in range(2):
        words = text[b][mask[b]]
        relevance = torch.nn.functional.cosine_similarity(tokens[b].unsqueeze(1), words.unsqueeze(0), dim=-1).mean(1)
        assert relevance[guided.indices[b]].mean() > relevance[plain.indices[b]].mean()
    deep = run("apet_plus", tokens, 8, stage="llm", inputs=inputs, outlier=0, text=2.0)
    assert not torch.equal(deep.indices, guided.indices)
    for options, where in (({}, "post"), ({"projected": False}, "pre"), ({"projected": False, "text": 1.0}, "post")):
        assert get_method("apet_plus", **options).features == f"{where}_projector"
    assert get_method("apet_plus").needs("vision") == get_method("apet_plus").needs("llm") == {}


def test_it_keeps_fewer_duplicates_than_one_shot_errors():
    """The reason for the method: near-duplicates far from the basis are kept once, so more is explained."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 32, generator=generator)
    tokens = centres[torch.randint(12, (1, 200), generator=generator)] + 0.1 * torch.randn(
        1, 200, 32, generator=generator
    )
    tokens[:, :12] = 4 * torch.randn(1, 1, 32, generator=generator) + 0.05 * torch.randn(1, 12, 32, generator=generator)

    def unexplained(kept):
        basis = torch.linalg.qr(tokens[0, kept].T.double())[0]
        x = tokens[0].double()
        return ((x - x @ basis @ basis.T).square().sum(-1) / x.square().sum(-1)).mean()

    ours, published = (run(name, tokens, 12).indices[0] for name in ("apet_plus", "apet"))
    assert unexplained(ours) < 0.5 * unexplained(published)


def test_outlier_weight_is_the_scaled_kernel():
    """A weight on the errors picks as the determinant of the kernel scaled with it does, as Cen-Prune has it."""
    tokens = noise(2, 40, 20) + 2 * noise(1, 1, 20, seed=1)
    picks = run("apet_plus", tokens, 12, **BARE | {"normalise": "centre_unit", "outlier": 1.0}).basis
    weight = outlierness(tokens)
    centred = cosine(tokens - tokens.mean(1, keepdim=True))
    scaled = greedy_volume(weight.unsqueeze(1) * centred * weight.unsqueeze(2), 12, first=picks[:, 0]).picks
    assert picks.tolist() == scaled.tolist()
    assert picks.tolist() != run("apet_plus", tokens, 12, **BARE | {"normalise": "centre_unit"}).basis.tolist()
