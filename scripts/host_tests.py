"""Runs transformers' own model tests plain and under a patch, and prints which end otherwise.

    python scripts/host_tests.py FOLDER [--config JSON] [--models llava qwen2_5_vl] [--pytest '-k generate']

FOLDER is transformers' source tree of the installed version, with `tests/models`. Every model of a family that ApET
serves is patched as soon as it is built. The default configuration asks for nothing, so nothing may end otherwise, not
even training; one that keeps every token of every image may refuse training, loss and prompts it cannot read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MODELS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "video_llava", "llava_onevision")
CONFIG = "APET_HOST_TESTS"


def pytest_configure() -> None:
    """As a pytest plugin: patch every model that is built."""
    if CONFIG not in os.environ:
        return
    import transformers

    import apet
    import apet.adapters

    config = apet.ApetConfig.from_dict(json.loads(os.environ[CONFIG]))
    for adapter in apet.adapters.registered():
        for name in adapter.classes:
            _patch_when_built(getattr(transformers, name), apet, config)


def _patch_when_built(cls: type, apet, config) -> None:
    original = cls.__init__

    def built(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls:
            apet.apply_patch(self, config)

    cls.__init__ = built


def outcomes(folders: list[str], config: str | None, words: list[str]) -> dict[str, str]:
    """Outcome of every test, by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {} if config is None else {CONFIG: config}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "host_tests", "-p", "no:cacheprovider"]
        subprocess.run([*command, f"--junitxml={report}", *words, *folders], env=environment, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}.{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    found = [child for child in case if child.tag in ("failure", "error", "skipped")]
    return found[0].tag if found else "passed"


def main() -> int:
    """Exit status 1 if a test ends otherwise under the patch."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("folder", type=Path)
    flags.add_argument("--config", default="{}", help="fields of ApetConfig as JSON")
    flags.add_argument("--models", nargs="+", default=MODELS)
    flags.add_argument("--pytest", default="", help="arguments for pytest, e.g. '-k generate'")
    args = flags.parse_args()
    folders = [str(args.folder / "tests" / "models" / name) for name in args.models]
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        flags.error(f"{missing[0]} is not there; give the folder of transformers' sources of the installed version")
    words = args.pytest.split()
    plain, patched = outcomes(folders, None, words), outcomes(folders, args.config, words)
    other = {name: (plain[name], patched.get(name, "missing")) for name in plain if plain[name] != patched.get(name)}
    print(
        f"{len(plain)} tests, {sum(word == 'passed' for word in plain.values())} pass plain; {len(other)} end otherwise"
    )
    for name, (before, after) in other.items():
        print(f"  {name}: {before} plain, {after} patched")
    return int(bool(other) or not plain)


if __name__ == "__main__":
    sys.exit(main())
