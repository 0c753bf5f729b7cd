"""What every measurement prints: tables for people, and the machine it ran on."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from apet.measure import number
from apet.tables import markdown_table


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table as JSON types: numbers and None, for nothing to say, as they are, any other cell as text.

    Raises:
        ValueError: A row with more or fewer cells than columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {title!r}: row {list(row)} has {len(row)} cells for {len(columns)} columns")
    kept = int | float | None
    cells = [[cell if isinstance(cell, kept) else str(cell) for cell in row] for row in rows]
    return {"title": title, "columns": list(columns), "rows": cells}


def markdown(tables: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> str:
    """Tables in Markdown, above them the machine."""
    parts = [", ".join(f"{name} {value}" for name, value in where.items() if value is not None)]
    for one in tables:
        rows = [[_cell(value) for value in row] for row in one["rows"]]
        parts.append(f"**{one['title']}**\n\n{markdown_table(one['columns'], rows)}".rstrip())
    return "\n\n".join(parts) + "\n"


def environment() -> dict[str, Any]:
    """Versions and hardware, without the name of the machine."""
    gpu = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "GPU": torch.cuda.get_device_name() if gpu else None,
        "CUDA": torch.version.cuda if gpu else None,
        "CPU": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)
