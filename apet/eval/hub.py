"""A benchmark from a hub data set, or from a folder of its parquet files, written in the layout that DATA has.

What follows is what always follows: the same programs read the same files. `datasets` does the reading (``pip install
'apet[hub]'``); which columns a data set must have is in `SOURCES`, how they become files in `apet.eval.hub_files`.
Benchmarks of videos are not there: no public data set is known to hold the videos in its rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from apet.eval import hub_files
from apet.eval.benchmarks.files import user_path
from apet.eval.data_check import check_benchmark, complete, find_data
from apet.eval.hub_files import Rows, Target


@dataclass(frozen=True)
class Part:
    """A split of a data set.

    Attributes:
        split: Its name.
        columns: Columns that are read; nothing else is downloaded. A picture is the column `image`.
        config: Its configuration (subset); empty for the default one.
    """

    split: str
    columns: tuple[str, ...]
    config: str = ""

    @property
    def files(self) -> str:
        """Where the hub has its files, as a pattern."""
        return "/".join(filter(None, (self.config, "**", f"{self.split}-*.parquet")))


@dataclass(frozen=True)
class Source:
    """How a benchmark stands on the hub.

    Attributes:
        dataset: Its usual id.
        parts: What is read of it.
        write: Writes the files from the rows of each part.
    """

    dataset: str
    parts: tuple[Part, ...]
    write: Callable[..., None]


_OPTIONS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category")

SOURCES: Mapping[str, Source] = {
    "gqa": Source(
        "lmms-lab/GQA",
        (
            Part(
                "testdev",
                ("id", "imageId", "question", "answer", "isBalanced", "types", "semantic", "groups"),
                "testdev_balanced_instructions",
            ),
            Part("testdev", ("id", "image"), "testdev_balanced_images"),
        ),
        hub_files.write_gqa,
    ),
    "mmbench": Source(
        "lmms-lab/MMBench_EN", (Part("dev", (*_OPTIONS, "l2-category", "split", "image")),), hub_files.write_mmbench
    ),
    "mmbench_cn": Source(
        "lmms-lab/MMBench", (Part("dev", (*_OPTIONS, "L2-category", "split", "image"), "cn"),), hub_files.write_mmbench
    ),
    "mme": Source("lmms-lab/MME", (Part("test", ("question_id", "question", "answer", "image")),), hub_files.write_mme),
    "pope": Source(
        "lmms-lab/POPE",
        (Part("test", ("question", "answer", "category", "image_source", "image")),),
        hub_files.write_pope,
    ),
    "sqa": Source(
        "lmms-lab/ScienceQA",
        (Part("test", ("question", "choices", "answer", "hint", "image"), "ScienceQA-FULL"),),
        hub_files.write_scienceqa,
    ),
    "textvqa": Source(
        "lmms-lab/textvqa",
        (Part("validation", ("image_id", "question_id", "question", "answers", "ocr_tokens", "image")),),
        hub_files.write_textvqa,
    ),
    "vizwiz": Source(
        "lmms-lab/VizWiz-VQA", (Part("test", ("question_id", "question", "image")),), hub_files.write_vizwiz
    ),
    "vqav2": Source(
        "lmms-lab/VQAv2",
        (
            Part("testdev", ("question_id", "question", "image_id", "image")),
            Part("test", ("question_id", "question", "image_id")),
        ),
        hub_files.write_vqav2,
    ),
}


def write_benchmark(benchmark: str, root: str | Path, dataset: str | None = None) -> Path:
    """Write the question, label and picture files of a benchmark below `root`; files that are there are replaced.

    Args:
        benchmark: Key of `SOURCES`.
        root: The folder that the programs call DATA.
        dataset: Hub id (ORG/NAME), or a folder with the parquet files named and placed as on the hub; None for the
            usual id.

    Returns:
        The benchmark's folder.

    Raises:
        ValueError: A benchmark or data set that is not known, a missing column, a row that cannot be, or `datasets`
            is not installed.
    """
    if benchmark not in SOURCES:
        raise ValueError(f"benchmark {benchmark!r} is not read from data sets; known: {', '.join(SOURCES)}")
    if find_spec("datasets") is None:
        raise ValueError("--dataset needs the package datasets: pip install 'apet[hub]'")
    source, data = SOURCES[benchmark], find_data(benchmark)
    folder = user_path(root) / data.folder
    images = folder / data.images[0] if data.images else folder
    parts = [_rows(dataset or source.dataset, part) for part in source.parts]
    source.write(Target(folder, [folder / file.path for file in data.files], images), *parts)
    findings = check_benchmark(data, root)
    if not complete(findings, any_size=True):
        wrong = "; ".join(f"{one.path}: {one.state} {one.found}" for one in findings if one.state != "ok")
        raise ValueError(f"data set {dataset or source.dataset!r} is not that of {benchmark}: {wrong}")
    return folder


def _rows(name: str, part: Part) -> Rows:
    """Rows of a part as they are read, pictures as they are stored: {"bytes": ..., "path": ...}."""
    import datasets  # optional

    there = _load(name, part).column_names
    missing = [column for column in part.columns if column not in there]
    if missing:
        raise ValueError(f"data set {name!r} has no column {', '.join(missing)}; it has {', '.join(there)}")
    rows = _load(name, part, columns=list(part.columns))
    return rows.cast_column("image", datasets.Image(decode=False)) if "image" in part.columns else rows


def _load(name: str, part: Part, **options: Any) -> Any:
    """A part as a stream: no copy of it is kept, and columns that are not asked for stay where they are."""
    import datasets  # optional

    files = sorted(str(file) for file in Path(name).glob(part.files))
    if Path(name).is_dir() and not files:
        raise ValueError(f"{name} has no parquet file {part.files}; names and folders must be those of the hub")
    if files:
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, **options)
    try:
        return datasets.load_dataset(name, part.config or None, split=part.split, streaming=True, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data set {name!r} cannot be read: {error}; give a hub id or a folder of parquet files"
        ) from error
