"""How a trainer tells the workers of its data loader what it wants next."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch.utils.data import Sampler

Order = TypeVar("Order")


class Orders(Sampler, Generic[Order]):
    """Hands the trainer's wishes to the workers; ends when the trainer returns None."""

    def __init__(self, next_order: Callable[[], Order | None]):
        self.next_order = next_order

    def __iter__(self) -> Iterator[Order]:
        while (order := self.next_order()) is not None:
            yield order
