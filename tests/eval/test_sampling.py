"""Draws that depend on the question alone, and follow the distribution transformers would draw from."""

import pytest
import torch
from transformers import GenerationConfig

from apet.eval.benchmarks import Question
from apet.eval.runner import numbered
from apet.eval.sampling import QuestionSampling, draw_key, draw_seed, gumbel

VOCABULARY = 50


def drawn(seeds, logits, temperature=1.0, top_p=None, step=0, prompt=3, **stored):
    """Tokens (B,) that a greedy `generate` picks at a step."""
    sampling = QuestionSampling(seeds, temperature, top_p, GenerationConfig(**stored))
    for done in range(step + 1):
        scores = sampling(torch.zeros(len(seeds), prompt + done, dtype=torch.int64), logits)
    return scores.argmax(1)


@pytest.fixture(scope="module")
def logits():
    return 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))


def test_the_noise_is_gumbel_noise():
    noise = gumbel(torch.arange(40), 7, 5000)
    assert noise.dtype == torch.float64 and noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    distance = (uniform - torch.linspace(0, 1, len(uniform), dtype=torch.float64)).abs().max()
    assert distance < 1.63 / len(uniform) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.07  # rows do not depend on each other
    steps = torch.stack([gumbel(torch.tensor([5]), step, 5000)[0] for step in range(20)])
    assert torch.corrcoef(steps).fill_diagonal_(0).abs().max() < 0.07


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.5, None), (1.0, 0.7)])
def test_tokens_are_drawn_as_often_as_they_are_likely(logits, temperature, top_p):
    count = 20_000
    tokens = drawn(range(count), logits.expand(count, -1), temperature, top_p)
    likely = torch.softmax(logits[0].double() / temperature, 0)
    if top_p is not None:
        order = likely.argsort(descending=True)
        outside = likely[order].cumsum(0) - likely[order] >= top_p
        likely[order[outside]] = 0
        likely /= likely.sum()
    found = torch.bincount(tokens, minlength=VOCABULARY)
    assert found[likely == 0].sum() == 0
    some = likely * count > 5
    chi = ((found - likely * count)[some] ** 2 / (likely * count)[some]).sum()
    freedom = int(some.sum()) - 1
    assert chi < freedom + 3.1 * (2 * freedom) ** 0.5  # about 0.1 %


@pytest.mark.parametrize("stored", [{}, {"top_k": 3}, {"top_k": 0}, {"min_p": 0.2}, {"top_p": 0.5}], ids=str)
def test_what_may_be_drawn_is_what_transformers_lets_be_drawn(stored):
    """The finite scores of a real sampling `generate` with the same settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 40
    model.generation_config = GenerationConfig(pad_token_id=0, **stored)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    theirs = model.generate(ids, do_sample=True, temperature=1.3, **options).scores[0]
    raw = model.generate(ids, do_sample=False, **options).scores[0]
    ours = QuestionSampling([0], 1.3, None, model.generation_config)(ids, raw)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert theirs.isfinite().sum() == {"{}": 50, "{'top_k': 3}": 3, "{'top_k': 0}": 80}.get(
        str(stored), ours.isfinite().sum()
    )
    kept = ours.isfinite()
    noise = gumbel(torch.tensor([0]), 0, 80)
    assert torch.allclose((ours - noise)[kept], theirs[kept].double(), atol=1e-5)


def test_a_row_draws_alike_in_every_batch_and_behind_every_padding(logits):
    seeds = [draw_seed(0, key) for key in "abcdef"]
    many = logits.expand(6, -1)
    for step in range(4):
        together = drawn(seeds, many, step=step, prompt=9)
        alone = torch.cat([drawn([seed], logits, step=step, prompt=2) for seed in seeds])
        assert torch.equal(together, alone)
    assert len({tuple(drawn(seeds, many, step=step).tolist()) for step in range(4)}) == 4


def test_a_setting_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="typical_p=0.5"):
        QuestionSampling([0], 1.0, None, GenerationConfig(typical_p=0.5))


def test_seeds_follow_from_the_runs_seed_the_id_and_its_occurrence():
    asked = numbered([Question(key, text, text) for key, text in ((7, "a"), (8, "a"), (7, "b"), (7, "c"))])
    keys = [draw_key(question) for question in asked]
    assert [question.occurrence for question in asked] == [0, 0, 1, 2] and len(set(keys)) == 4
    seeds = {draw_seed(seed, key) for seed in (0, 1) for key in keys}
    assert len(seeds) == 8 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert draw_seed(0, draw_key(Question(7, "z", "z"))) == draw_seed(0, keys[0])
