"""Shared by the sample model's tests: one benchmark folder and one trained miniature per session."""

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from examples.sample_vlm import benchmarks, train


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small for more threads to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_benchmarks(tmp_path_factory):
    """The four benchmarks at a fiftieth of their size."""
    folder = tmp_path_factory.mktemp("eval")
    benchmarks.main(["--out", str(folder), "--scale", "0.02"])
    return folder


@pytest.fixture(scope="session")
def muon():
    """Skips what trains where PyTorch is too old for the trainer's optimiser."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("training needs PyTorch 2.9")


@pytest.fixture(scope="session")
def miniature(tmp_path_factory, muon):
    """The folder of a finished miniature training run (`mini/last.pt` and its export in `model/`)."""
    folder = tmp_path_factory.mktemp("mini")
    train.main(_mini_flags(folder) + ["--max_steps", "20"])
    return folder


def _mini_flags(folder):
    """Flags of a run of the smallest model on the CPU."""
    return ["--size", "mini", "--out", str(folder), "--export", str(folder / "model"), "--device", "cpu"]
