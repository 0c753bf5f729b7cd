"""Importing this refuses to work in a folder that also holds files of another package `llava`.

LLaVA's own distribution, and many that started as a copy of it, install a package of the same name. pip writes both
into one folder without a word, the later over the earlier, and uninstalling either takes files of the other with it.
Whatever is imported from such a folder is half of one and half of the other.

This file and the two that import it beside `llava/__init__.py` (`llava.eval.program`, `llava.eval.apet_loader`) have no
namesake in LLaVA, so the mixture is found whichever was installed last.
"""

import csv
from pathlib import Path, PurePosixPath

_FOLDER = Path(__file__).parent
# Where modules of this package lie. In a checkout further modules may be added to these folders.
_PACKAGES = (
    ".", "eval", "model", "model/language_model", "model/multimodal_encoder", "model/multimodal_projector",
    "model/processors", "serve",
)  # fmt: skip
_SHOWN = 3  # names in the message


def foreign_files(folder: Path) -> list[str]:
    """Modules in a folder `llava` that are not of `apet-llava`, as sorted paths below it.

    Where `apet-llava` is installed these are all that it did not install; in a checkout, those of packages it lacks.
    """
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    records = list(folder.parent.glob("apet_llava-*.dist-info/RECORD"))
    if not records:
        # `pip install ./llava` leaves a folder `build` in a checkout.
        return sorted(name for name in present if not name.startswith("build/") and _package(name) not in _PACKAGES)
    own = set()
    for record in records:
        with record.open(encoding="utf-8", newline="") as lines:
            own |= {name.removeprefix("llava/") for name, *_ in csv.reader(lines)}
    return sorted(present - own)


def _package(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def check(folder: Path) -> None:
    """Refuse a mixture.

    Raises:
        ImportError: There are files of another `llava` in the folder.
    """
    foreign = foreign_files(folder)
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise ImportError(
            f"{folder} holds files of another package `llava` beside those of apet-llava: "
            f"{', '.join(foreign[:_SHOWN])}{more}; the two cannot share a folder, so uninstall both (`pip uninstall "
            "llava apet-llava`), remove what is left of the folder, and install the one you want to use",
            name="llava",
        )


check(_FOLDER)
