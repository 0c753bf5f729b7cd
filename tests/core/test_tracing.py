"""No host synchronisation and no data-dependent shape: `compress` compiles whole and runs without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import apet
from apet.core import similarity
from core import noise

SELECTIONS = ["fps", "dpc", "random"]


def check(compiled, tokens, keep: int, **options) -> None:
    expected, result = apet.compress(tokens, keep, **options), compiled(tokens, keep, **options)
    for field in ("indices", "basis", "sources"):
        assert torch.equal(getattr(result, field), getattr(expected, field)), field
    torch.testing.assert_close(result.tokens, expected.tokens)
    torch.testing.assert_close(result.errors, expected.errors)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_shapes_and_flow_do_not_depend_on_data(selection, masked, monkeypatch):
    """Fake tensors hold no data: any look at a value raises."""
    monkeypatch.setattr(similarity, "MAY_LOOK", ())  # as on any device but the CPU
    generator = torch.Generator().manual_seed(0)
    with FakeTensorMode():
        tokens = torch.empty(3, 40, 16, dtype=torch.float16)
        mask = torch.empty(3, 40, dtype=torch.bool) if masked else None
        start = torch.empty(3, dtype=torch.int64)
        for insertion, rows in (("overwrite", 12), ("blend", 12), ("append", 17), ("none", 12)):
            for slots in ("position", "error"):
                result = apet.compress(
                    tokens, 12, basis=5, basis_selection=selection, start=start, slots=slots, insertion=insertion,
                    mask=mask, generator=generator,
                )  # fmt: skip
                assert result.tokens.shape == (3, rows, 16) and result.tokens.dtype == torch.float16
                assert result.indices.shape == (3, rows)
        assert apet.compress(tokens, 50, basis_selection=selection, mask=mask).tokens.shape == (3, 40, 16)


def test_validate_is_the_only_look_at_values():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        apet.compress(torch.empty(1, 8, 4), 2, validate=True)


@pytest.mark.parametrize("selection", ["fps", "dpc"])
def test_one_graph(selection):
    """Traced whole, with a mask and without; run by the eager kernels."""
    torch._dynamo.reset()
    compiled = torch.compile(apet.compress, fullgraph=True, backend="aot_eager", dynamic=False)
    tokens = noise(2, 40, 16)
    check(compiled, tokens, 12, basis=4, basis_selection=selection)
    check(compiled, tokens, 12, basis=4, basis_selection=selection, mask=noise(2, 40) > -1, slots="error")
    check(compiled, tokens, 40, basis=4, basis_selection=selection)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(apet.compress, fullgraph=True)
    for seed in range(3):
        check(compiled, noise(2, 40, 16, seed=seed), 12, basis=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_synchronisation_on_cuda(selection):
    tokens = noise(3, 576, 64).cuda()
    mask = (noise(3, 576) > -1).cuda()
    apet.compress(tokens, 96, basis_selection=selection, mask=mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"mask": mask}, {"insertion": "append"}, {"slots": "error", "merge": False}):
            apet.compress(tokens, 96, basis_selection=selection, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_agrees_with_the_cpu(tf32):
    tokens = noise(3, 576, 64)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        result = apet.compress(tokens.cuda(), 96)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    expected = apet.compress(tokens, 96)
    assert torch.equal(result.indices.cpu(), expected.indices)
    assert torch.equal(result.sources.cpu(), expected.sources)
    torch.testing.assert_close(result.tokens.cpu(), expected.tokens)
