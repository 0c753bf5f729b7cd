"""How a trainer tells the workers of its data loader what it wants next."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler


class Orders(Sampler):
    """Hands the trainer's wishes to the workers; ends when the trainer returns None."""

    def __init__(self, next_order: Callable[[], Any]):
        self.next_order = next_order

    def __iter__(self) -> Iterator[Any]:
        while (order := self.next_order()) is not None:
            yield order


def ordered(made: Dataset, workers: int, next_order: Callable[[], Any], **options: Any) -> DataLoader:
    """What `made` holds for every order, in their order, made by worker processes (0: in this one)."""
    return DataLoader(
        made, batch_size=None, sampler=Orders(next_order), num_workers=workers,
        prefetch_factor=2 if workers else None, **options,
    )  # fmt: skip
