"""Every recorded result of the published implementation, through `apet.compress`."""

from pathlib import Path

import numpy as np
import pytest
import torch

import apet

GOLDEN = Path(__file__).parents[1] / "golden" / "algorithm"
KEEP_ALL = {"enc_b1_n256_d48_keep256_basis10", "enc_b1_n576_d16_keep576_passthrough"}
DTYPES = [torch.float32, torch.float16]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request) -> str:
    return request.param


def names(pattern: str) -> list[str]:
    return sorted(path.stem for path in GOLDEN.glob(pattern + ".npz"))


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def compress(golden, tokens, dtype, device, **options) -> apet.CompressedTokens:
    """Run on the golden file's tokens (B, N, D), budget, basis size and start."""
    start = golden["start"]
    start = int(start) if start.ndim == 0 else torch.from_numpy(start).to(device)
    tokens = torch.from_numpy(np.ascontiguousarray(tokens)).to(device, dtype)
    result = apet.compress(tokens, int(golden["keep"]), basis=int(golden["num_basis"]), start=start, **options)
    assert result.tokens.dtype == dtype and result.tokens.device.type == device
    return apet.CompressedTokens(*(field.cpu() for field in result))


def check(result, golden, output, dtype, indices="kept_indices") -> None:
    """Indices exact, errors and output (None: not recorded) within the tolerances of the golden README."""
    basis, errors = np.atleast_2d(golden["basis_indices"]), np.atleast_2d(golden["errors"])
    np.testing.assert_array_equal(result.basis, basis)
    np.testing.assert_array_equal(result.indices[:, : int(golden["keep"])], np.atleast_2d(golden[indices]))
    rest = np.ones(errors.shape, dtype=bool)
    np.put_along_axis(rest, basis, False, axis=1)
    np.testing.assert_allclose(result.errors.numpy()[rest], errors[rest], rtol=1e-4)
    np.testing.assert_allclose(result.errors.numpy()[~rest], errors[~rest], atol=1e-3)
    if output is not None:
        tolerance = {"atol": 1e-4} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 1e-3}
        np.testing.assert_allclose(result.tokens.float(), output, **tolerance)


def test_all_files_are_here():
    assert [len(names(pattern)) for pattern in ("fps_*", "enc_*", "llm_*", "qwen_*", "video_*")] == [3, 7, 4, 3, 1]


@pytest.mark.parametrize("name", names("fps_*"))
def test_farthest_points(name, device):
    golden = load(name) | {"keep": np.array(1)}
    result = compress(golden, golden["features"], torch.float32, device, insertion="none")
    np.testing.assert_array_equal(result.basis, golden["basis_indices"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(set(names("enc_*")) - KEEP_ALL))
def test_vision_stage(name, dtype, device):
    golden = load(name)
    result = compress(golden, golden["features"], dtype, device)
    check(result, golden, golden.get("output"), dtype)
    for sources, indices, donors, targets in zip(
        result.sources, result.indices, golden["donor_indices"], golden["donor_target"], strict=True
    ):
        np.testing.assert_array_equal(indices[sources[donors]], targets)


@pytest.mark.parametrize("name", sorted(KEEP_ALL))
def test_keeping_all_is_the_identity(name, device):
    golden = load(name)
    result = compress(golden, golden["features"], torch.float32, device)
    np.testing.assert_array_equal(result.tokens, golden["features"])
    np.testing.assert_array_equal(result.indices, golden["kept_indices"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("llm_*") + names("qwen_llm_*"))
def test_decoder_stage(name, dtype, device):
    golden = load(name)
    qwen = {"insertion": "blend", "ridge": 0.1} if name.startswith("qwen") else {}
    starts, (length,) = np.atleast_1d(golden["image_start"]), set(np.atleast_1d(golden["image_length"]).tolist())
    keep = int(golden["keep"])
    blocks = np.stack([row[p : p + length] for row, p in zip(golden["hidden"], starts, strict=True)])
    output = np.stack([row[p : p + keep] for row, p in zip(golden["output"], starts, strict=True)])
    check(compress(golden, blocks, dtype, device, slots="error", **qwen), golden, output, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("qwen_enc_*"))
def test_qwen_vision_stage(name, dtype, device):
    golden = load(name)
    assert int(golden["ratio"] * len(golden["features"])) == golden["keep"]
    check(
        compress(golden, golden["features"][None], dtype, device, insertion="blend"),
        golden,
        golden["output"][None],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("video_*"))
def test_video_frames(name, dtype, device):
    golden = load(name)
    patches, output = golden["features"][0, :, 1:], golden["output"][0, :, 1:]
    result = compress(golden, patches, dtype, device, insertion="append")
    check(result, golden, output, dtype, indices="top_indices")
    np.testing.assert_array_equal(result.indices[:, int(golden["keep"]) :], golden["basis_indices"])
