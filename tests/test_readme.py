"""The README: short, its links lead somewhere, its figures are those of the pages they come from."""

import re
from pathlib import Path

import pytest
import torch
from tiny import images, left_pad, prompt

import apet
from apet.bench.presets import get_preset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(README.splitlines()) < 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [one for one in targets if "://" not in one and not (page.parent / one).exists()]


def test_what_the_five_lines_print():
    model = get_preset("llava-1.5-7b").build(torch.device("meta"), torch.bfloat16)
    assert f"```text\n{apet.describe(apet.compress_model(model, tokens=64))}\n```" in README


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_five_lines_run(page, llava_sdpa):
    lines = (ROOT / page).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert lines.count("tokens=64") == 1
    inputs = left_pad([prompt(9, (3,))]) | {"pixel_values": images(1)}
    names = {"model": llava_sdpa, "inputs": inputs | {"max_new_tokens": 2, "min_new_tokens": 2}}
    exec(compile(lines.replace("tokens=64", "tokens=8"), page, "exec"), names)  # its image has fewer patches
    assert names["answer"].shape[1] == inputs["input_ids"].shape[1] + 2
    assert not hasattr(llava_sdpa, "apet")


def test_accuracies_are_those_of_the_comparison():
    table = README.split("## How good")[1].split("## How fast")[0]
    found = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    compared = (ROOT / "docs/sample_whole.md").read_text(encoding="utf-8").splitlines()
    assert len(found) == 10
    for name, *figures in found:
        full = next(line for line in compared if line.startswith(f"| {name} | ") and line.count("..") == len(figures))
        assert [cell.split(" ")[0] for cell in full.strip("| ").split(" | ")[1:]] == figures


def test_speeds_are_those_of_the_gpu():
    measured = (ROOT / "docs/performance-cuda.md").read_text(encoding="utf-8").splitlines()
    speeds = README.split("## How fast")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+)x \| ([\d.]+)x \|$", speeds, flags=re.MULTILINE)
    assert len(rows) == 3
    for ours, random in rows:

        def says(cell: str, figure: str) -> bool:
            return bool(re.match(r"[\d.]+ \(", cell)) and f"{float(cell.split()[0]):.2f}" == figure

        lines = [[cell.strip() for cell in line.split("|")] for line in measured]
        assert any(any(says(c, ours) for c in line) and any(says(c, random) for c in line) for line in lines)


def test_speeds_on_a_cpu_are_those_measured():
    page = (ROOT / "docs/performance-cpu.md").read_text(encoding="utf-8")
    parts = [page.split(f"## generate-dinov2-smollm2-{tokens}\n")[1].split("\n## ")[0] for tokens in (192, 128, 64)]
    speeds = README.split("## How fast")[1].split("\n## ")[0]
    rows = [re.findall(r"([\d.]+)x", line) for line in speeds.splitlines() if line.count("x, ") == 4]
    assert [len(row) for row in rows] == [6, 6]
    for new_tokens, row in zip((1, 8), rows, strict=True):
        for place, method in enumerate(("apet", "random")):
            lines = [re.search(rf"^\| {method} +\| {new_tokens} +\|.*$", part, re.MULTILINE)[0] for part in parts]
            assert [f"{float(line.split('|')[5].split()[0]):.2f}" for line in lines] == row[3 * place :][:3]
