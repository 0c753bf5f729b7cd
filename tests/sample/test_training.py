"""Model and trainer: shared pictures equal single turns, windows equal plain towers, runs resume, exports fit LLaVA."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from examples.sample_vlm import train
from examples.sample_vlm.data import Order, loader, make_batch
from examples.sample_vlm.evaluate import evaluate
from examples.sample_vlm.export import MODEL_NAME, TOWER_NAME, load_checkpoint, new_model
from examples.sample_vlm.model import PIXEL_MEAN, PIXEL_STD, SIZES, block_layout


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return new_model(SIZES["mini"]).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_questions_that_share_a_picture_equal_single_turns(model, attention):
    batch = make_batch((0, 1), 112, 2, 3)
    model.speed_up(attention, compiled=False)
    with torch.inference_mode():
        features, _ = model.see(batch.pixels, batch.origins)
        together = model.read(features, batch.questions)
        image = model.projector(features)
        prefix = model.llm.embed_tokens(model.prefix).expand(2, -1, -1)
        for number in range(3):
            text = model.llm.embed_tokens(batch.questions[:, number])
            plain = model.llm(inputs_embeds=torch.cat([prefix, image, text], dim=1)).last_hidden_state
            torch.testing.assert_close(together[:, number], plain[:, -text.shape[1] :], atol=1e-5, rtol=1e-4)


def test_block_layout():
    mask, positions = block_layout(2, 2, 2, "cpu")
    assert positions.tolist() == [0, 1, 2, 3, 2, 3]
    assert mask[0, 0, 4].tolist() == [True, True, False, False, True, False]
    assert mask[0, 0, 1].tolist() == [True, True, False, False, False, False]


def test_full_window_is_the_plain_tower(model):
    batch = make_batch((0, 2), 336, 1, 0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    with torch.inference_mode():
        ours, first = model.see(batch.pixels, batch.origins)
        plain = model.tower((batch.pixels.float() / 255 - mean) / std, output_hidden_states=True).hidden_states[-2]
    assert ours.shape[1] == 576
    torch.testing.assert_close(torch.cat([first[:, None], ours], dim=1), plain)


def test_batches_depend_on_the_seed_only():
    orders = [Order(1, 56, 2, 2), Order(2, 112, 1, 0)]

    def batches(workers):
        left = list(orders)
        return list(loader(3, workers, lambda: left.pop(0) if left else None))

    for one, other in zip(batches(0), batches(1), strict=True):
        for name, tensor in vars(one).items():
            assert torch.equal(tensor, getattr(other, name)), name


def test_training_exports_a_llava(miniature):
    config = json.loads((miniature / "model" / MODEL_NAME / "config.json").read_text())
    assert config["sample_weights"] == "trained" and config["model_type"] == "llava"
    weights = load_file(miniature / "model" / MODEL_NAME / "model.safetensors")
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias", "lm_head.weight"} <= set(weights)
    assert weights["model.embed_tokens.weight"].shape[0] == config["vocab_size"]
    assert all(t.dtype == torch.float16 for t in weights.values())
    tower = load_file(miniature / "model" / TOWER_NAME / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in tower)
    assert (miniature / "mini" / "loss.png").stat().st_size > 1000
    log = json.loads((miniature / "mini" / "log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 10, 11, 20] and log[-1]["side"] == 336 and "seeing" not in log[-1]


def test_a_stopped_run_continues(miniature, tmp_path, capsys):
    flags = ["--size", "mini", "--out", str(tmp_path), "--export", str(tmp_path / "model"), "--device", "cpu"]
    train.main([*flags, "--max_steps", "6", "--session_minutes", "0.000001"])
    assert "run the same command to continue" in capsys.readouterr().out
    train.main([*flags, "--max_steps", "6"])
    assert "continuing" in capsys.readouterr().out
    assert torch.load(tmp_path / "mini" / "last.pt", weights_only=True)["step"] == 6


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling layers needs a C++ compiler")
def test_compiled_layers_learn_the_same(tmp_path, muon):
    flags = ["--size", "mini", "--device", "cpu", "--max_steps", "3", "--no-bf16"]
    states = {}
    for choice in ("--compile", "--no-compile"):
        out = tmp_path / choice
        train.main([*flags, choice, "--out", str(out), "--export", str(out / "model")])
        states[choice] = torch.load(out / "mini" / "last.pt", weights_only=True)["model"]
    for name, tensor in states["--compile"].items():
        torch.testing.assert_close(
            tensor, states["--no-compile"][name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_an_old_torch_is_named(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(SystemExit, match=r"PyTorch 2\.9 or newer"):
        train.main(["--size", "mini", "--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.parametrize("size", ["small", "full"])
def test_each_size_trains_and_exports(size, tmp_path, muon, monkeypatch):
    # One step of both losses, on a small picture: the optimiser alone takes seconds for so many weights on a CPU.
    phases = (train.Phase(1.0, 56, 1, 1),)
    monkeypatch.setitem(train.PLANS, "mini", replace(train.PLANS["mini"], phases=phases))
    flags = ["--size", size, "--plan", "mini", "--device", "cpu", "--out", str(tmp_path), "--max_steps", "1"]
    train.main([*flags, "--export", str(tmp_path / "model")])
    exported = sum(p.stat().st_size for p in (tmp_path / "model").rglob("*") if p.is_file())
    assert exported <= 24e6


def test_evaluation_counts_every_question(miniature):
    report = evaluate(load_checkpoint(miniature / "mini" / "last.pt").eval(), pictures=3, per_picture=4, side=112)
    assert report["all"][1] == 12
    assert sum(total for name, (_, total) in report.items() if name != "all") == 12
