"""Draw the figure of docs/theory.md: ``python scripts/draw_theory.py [FILE]``."""

import sys
from pathlib import Path

import _checkout  # noqa: F401
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import apet
from apet.core.types import CompressedTokens

ROOT = Path(__file__).resolve().parents[1]
KEEP = 8


def toy() -> torch.Tensor:
    """(1, 40, 2): a cloud along one direction, and a few points beside it."""
    generator = torch.Generator().manual_seed(3)
    along = torch.rand(30, 1, generator=generator) * torch.tensor([[3.0, 1.2]]) + torch.tensor([[0.6, 0.2]])
    cloud = along + 0.12 * torch.randn(30, 2, generator=generator)
    beside = torch.tensor([[1.0, 2.0], [2.6, 2.4]]).repeat_interleave(5, 0) + 0.3 * torch.randn(
        10, 2, generator=generator
    )
    return torch.cat([cloud, beside])[None]


def draw() -> Figure:
    """Errors on the left, what is kept and merged on the right; the basis is the far end of the cloud."""
    tokens = toy()
    start = int(tokens[0, :30].sum(dim=1).argmax())
    decided = apet.compress(tokens, KEEP, basis=1, insertion="none", start=start)
    figure = Figure(figsize=(9, 4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True, subplot_kw={"aspect": "equal"})
    _errors(left, tokens[0], decided)
    _merged(right, tokens[0], decided)
    return figure


def _errors(axes: Axes, points: torch.Tensor, decided: CompressedTokens) -> None:
    basis = points[decided.basis[0, 0]]
    feet = (points @ basis / basis.square().sum())[:, None] * basis
    for point, foot in zip(points.tolist(), feet.tolist(), strict=True):
        axes.plot(*zip(point, foot, strict=True), color="#d08770", linewidth=1)
    axes.plot([0, 1.25 * basis[0]], [0, 1.25 * basis[1]], color="#4c566a", linewidth=1.2)
    axes.scatter(*points.T, color="#81a1c1", s=26, zorder=2)
    axes.scatter(*basis, color="black", marker="*", s=150, zorder=3)
    axes.set_title("basis (star), its span, errors")


def _merged(axes: Axes, points: torch.Tensor, decided: CompressedTokens) -> None:
    kept = points[decided.indices[0]]
    for point, row in zip(points.tolist(), decided.sources[0].tolist(), strict=True):
        axes.plot(*zip(point, kept[row].tolist(), strict=True), color="#a3be8c", linewidth=1)
    axes.scatter(*points.T, color="#d8dee9", s=26, zorder=2)
    axes.scatter(*kept.T, color="#bf616a", s=50, zorder=3)
    axes.set_title(f"{KEEP} kept tokens and whom they stand for")


if __name__ == "__main__":
    draw().savefig(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/theory.png")
