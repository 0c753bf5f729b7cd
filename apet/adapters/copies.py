"""What the host must see of device tensors (ids, masks, sizes of pictures), read once, in front of the encoder.

Layouts, rotary positions and the check of placeholders are host arithmetic. Read where it is done, each value would
make the host wait for all work queued before it, the image encoder above all; read when a call begins, there is nothing
to wait for yet, and everything behind is queued without a look at the device.

A copy belongs to one tensor object, so a copy can never be taken for that of other values: whoever makes a new tensor
of the same values says so (`follow`), and what nobody has said anything about is read anew.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apet.adapters import host
from apet.adapters.hooks import InFlight, Removable, Wrapped
from apet.adapters.layout import to_device


class HostCopies:
    """Copies on the host of what a call was given.

    Args:
        outer: Those of the call that this one is part of.
    """

    def __init__(self, outer: "HostCopies | None" = None) -> None:
        # With the tensors themselves: an id that is free again would name another one.
        self._known: dict[int, tuple[Tensor, Tensor]] = {} if outer is None else dict(outer._known)

    def of(self, value: Any) -> Tensor | None:
        """The copy of a tensor; of a 4-D mask the 2-D one that it was made of. None if there is none."""
        return self._known[id(value)][1] if id(value) in self._known else None

    def add(self, tensor: Tensor, copy: Tensor) -> None:
        """Note a copy."""
        self._known[id(tensor)] = tensor, copy

    @torch.compiler.disable
    def read(self, given: Mapping[str, Any]) -> None:
        """Copy those arguments of a call that hosts read, if they are not known. Waits for the device.

        A prompt of embeddings says on the host where its images are (`visual_items`), and needs nothing else read.
        """
        if given.get("visual_items") is not None:
            return
        for name in host.READ_BY_HOSTS:
            value = given.get(name)
            if isinstance(value, Tensor) and value.dim() <= 2 and self.of(value) is None:
                self.add(value, value.cpu())

    def instead(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The copies of a call's arguments, by name."""
        known = {name: self.of(value) for name, value in given.items()}
        return {name: copy for name, copy in known.items() if copy is not None}

    def seen(self, name: str, value: Any) -> Any:
        """An argument as an encoder is given it: on the host where it only looks at it there."""
        copy = self.of(value) if name in host.READ_BY_ENCODERS else None
        return value if copy is None else copy

    def follow(self, given: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Know the prompt that `generate` hands to a forward (`made`) where it was made of a known one (`given`)."""
        ids = self.of(given.get("input_ids"))
        if ids is None or made.get("input_ids") is None or made["input_ids"].shape != ids.shape:
            return
        self.add(made["input_ids"], ids)
        before, mask = given.get("attention_mask"), host.full_mask(made.get("attention_mask"))
        copy = torch.ones_like(ids) if before is None else self.of(before)
        if mask is not None and copy is not None:
            self.add(mask, copy)


class Reads:
    """The calls of one model that read, and what the host computes with the copies instead of with tensors.

    Args:
        model: The model.
        base_model: The one inside it that encodes images.
    """

    def __init__(self, model: nn.Module, base_model: nn.Module) -> None:
        self._model, self._base_model = model, base_model
        self._calls = InFlight()

    @property
    def top(self) -> HostCopies | None:
        """Copies of the innermost call in flight."""
        return self._calls.top

    def attach(self) -> list[Removable]:
        """Wrap what reads; returns the handles."""
        handles = [
            Wrapped(self._model, host.PREPARE, self._prepare),
            Wrapped(self._model, host.LOGITS_PROCESSORS, self._processors),
        ]
        for name, around in ((host.PLACEHOLDERS, self._placeholders), (host.ROTARY_POSITIONS, self._positions)):
            if hasattr(self._base_model, name):
                handles.append(Wrapped(self._base_model, name, around))
        return handles

    @contextmanager
    def during(self, copies: HostCopies) -> Iterator[HostCopies]:
        """`copies` are at hand inside the ``with`` block."""
        with self._calls.during(copies):
            yield copies

    def begun(self, given: Mapping[str, Any]) -> HostCopies:
        """Copies for a call that begins with these arguments."""
        copies = HostCopies(self.top)
        copies.read(given)
        return copies

    def _prepare(self, original: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(*args, **kwargs)
        if self.top is not None:
            self.top.follow(host.by_name(host.argument_names(original), args) | kwargs, made)
        return made

    def _processors(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """What `generate` does to logits; it looks at the prompt on the host."""
        given = host.by_name(host.argument_names(original), args) | kwargs
        ids = None if self.top is None else self.top.of(host.prompt_beside(given))
        return original(**(given if ids is None else host.with_prompt_beside(given, ids)))

    def _placeholders(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """The mask of the placeholders, and the host's check of their number, from ids on the host."""
        given = host.by_name(host.argument_names(original), args) | kwargs
        ids = None if self.top is None else self.top.of(given.get("input_ids"))
        if ids is None:
            return original(*args, **kwargs)
        return _uploaded(original(**given | host.shape_alone(given, ids)), given["input_ids"].device)

    def _positions(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Rotary positions from copies of everything that they depend on."""
        names = host.argument_names(original)
        given = host.by_name(names, args) | kwargs
        tensors = [name for name in names if isinstance(given.get(name), Tensor)]
        known = {} if self.top is None else self.top.instead({name: given[name] for name in tensors})
        if len(known) < len(tensors):
            return original(*args, **kwargs)
        return _uploaded(original(**given | known), given["input_ids"].device)


class PackedSizes:
    """A tower with all pictures in one sequence: given their sizes on the host, all that follows is worked out there.

    Args:
        tower: The tower.
        borders_there: Whether somebody reads the borders of its segments on the device.
    """

    def __init__(self, tower: nn.Module, borders_there: bool) -> None:
        self._tower, self._borders_there = tower, borders_there

    def attach(self) -> list[Removable]:
        """Wrap the tower; returns the handle."""
        return [Wrapped(self._tower, "forward", self._run)]

    def _run(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        pixels, grid = host.tower_pixels(original, args, kwargs), host.packed_grid(original, args, kwargs)
        if grid.device.type != "cpu":
            return original(*args, **kwargs)
        here = frozenset() if self._borders_there else host.packed_read(self._tower)
        found = host.packed_precomputed(self._tower, grid)
        there = {name: value if name in here else _uploaded(value, pixels.device) for name, value in found.items()}
        return original(*args, **there | kwargs)


def _uploaded(value: Any, device: torch.device) -> Any:
    """Host tensors on a device, without waiting for it, and free to be written into; others as they are."""
    if isinstance(value, tuple):
        return tuple(_uploaded(one, device) for one in value)
    return to_device(value.numpy(), device).clone() if isinstance(value, Tensor) else value
