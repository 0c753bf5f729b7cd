"""Every family of docs/families.md is proven somewhere; that the page is current is tested with the others."""

from pathlib import Path

import transformers
from families import FAMILIES

from apet.adapters import registered
from apet.config import FAMILY_PRESETS

ROOT = Path(__file__).parents[1]


def test_every_family_has_a_preset_classes_and_a_proof():
    assert sorted(adapter.family for adapter in registered()) == sorted(FAMILY_PRESETS)
    for adapter in registered():
        assert all((ROOT / path).is_file() for path in adapter.proof) and adapter.proof
        assert all(hasattr(transformers, name) for name in adapter.classes) and adapter.classes


def test_every_family_behind_its_projector_is_compared_with_the_reference():
    compared = {adapter.family for adapter in registered() if "tests/test_patch_families.py" in adapter.proof}
    assert compared == set(FAMILIES)
