"""A device whose every wait is counted, so that a machine without one can tell where a call would hold the host up.

Tensors of the device are real ones on the CPU inside a wrapper that says "meta": arithmetic has its usual results, and
whatever would let the host see a value (`item`, `bool`, `tolist`, `cpu`, a boolean index, ...) or copies a host tensor
there without `non_blocking` is noted with the place it was called from. Uploads of ApET are free: on a GPU they go from
pinned memory and never wait (`apet.core.constants.on_device`).
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from apet.core import constants

DEVICE = torch.device("meta")
_ROOT = f"{Path(__file__).parents[1]}/"
_aten = torch.ops.aten
# Operations whose result, or its shape, only the device knows.
_READS = {
    _aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.nonzero, _aten.masked_select, _aten.equal,
    _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount, _aten.allclose,
    _aten.repeat_interleave,
}  # fmt: skip
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_}


class _There(Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_There":
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"there({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        note("tolist")
        return self.inner.tolist()

    def __format__(self, spec: str) -> str:
        note("format")
        return format(self.inner, spec)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of the counted device to numpy; use .cpu() first")


class Waits:
    """What was noted: per wait the operation and the innermost places of the repository and of transformers."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.paused = False

    def __len__(self) -> int:
        return len(self.places)


_current: list[Waits] = []


def note(name: str) -> None:
    """A wait of the innermost count."""
    if not _current or _current[-1].paused:
        return
    frames = [
        f"{frame.filename.split('site-packages/')[-1].removeprefix(_ROOT)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_stack()
        if "/transformers/" in frame.filename or "/apet/" in frame.filename or "/llava/" in frame.filename
    ]
    _current[-1].places.append(f"{name}: {' < '.join(frames[:-3:-1])}")


def _run(func: Any, args: Any, kwargs: dict) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    here = any(isinstance(one, _There) for one in flat)
    packet = func.overloadpacket
    target = kwargs.get("device")
    if packet in (_aten._to_copy, _aten.copy_):
        source = args[0] if packet is _aten._to_copy else args[1]
        goes = (target if target is not None else source.device) if packet is _aten._to_copy else args[0].device
        there, was = torch.device(goes).type == DEVICE.type, isinstance(source, _There)
        non_blocking = kwargs.get("non_blocking", False) or (packet is _aten.copy_ and len(args) > 2 and args[2])
        if there != was and not (there and (non_blocking or source.dim() == 0 and packet is _aten.copy_)):
            note("upload" if there else "read")
        wrap = there
    else:
        wrap = torch.device(target).type == DEVICE.type if target is not None else here
        _note_reads(packet, args, here)
    if target is not None and torch.device(target).type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if not wrap:
        return result
    if func._schema.is_mutable and isinstance(args[0], _There) and result is inner_args[0]:
        return args[0]
    return tree_map(lambda one: _There(one) if type(one) is Tensor else one, result)


def _note_reads(packet: Any, args: Any, here: bool) -> None:
    if not here:
        return
    if packet in _READS:
        note(packet.__name__)
    if packet in _INDEXED:
        indices = [one for one in args[1] if one is not None]
        if any(one.dtype in (torch.bool, torch.uint8) for one in indices):
            note("boolean index")
        if isinstance(args[0], _There) and any(not isinstance(one, _There) for one in indices if one.dim()):
            note("index of the host")


def _inner(one: Any) -> Any:
    return one.inner if isinstance(one, _There) else one


class _Literals(TorchFunctionMode):
    """`torch.tensor(values, device=...)`, which forgets the values on "meta": an upload."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or target is None or torch.device(target).type != DEVICE.type:
            return func(*args, **kwargs)
        if isinstance(args[0], _There):
            return func(*args, **kwargs)
        made = func(*tree_map(_read, args), **kwargs | {"device": "cpu"})
        if made.numel():
            note("upload")
        return _There(made)


def _read(one: Any) -> Any:
    if not isinstance(one, _There):
        return one
    note("item")
    return one.inner.item()


class _Factories(TorchDispatchMode):
    """Makes what is created on the device its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("device")
        there = target is not None and torch.device(target).type == DEVICE.type
        if there or any(isinstance(one, _There) for one in tree_flatten((args, kwargs))[0]):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def there(value: Any) -> Any:
    """Tensors, containers of them, or a module (in place) on the device."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(_There(parameter.data), requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = _There(buffer)
        return value
    return tree_map(lambda one: _There(one) if type(one) is Tensor else one, value)


def back(value: Any) -> Any:
    """Tensors on the CPU again, uncounted."""
    return tree_map(_inner, value)


@contextmanager
def counted() -> Iterator[Waits]:
    """Counts the waits of the ``with`` block; the device exists inside it only."""
    waits = Waits()
    _current.append(waits)
    try:
        with _Literals(), _Factories():
            yield waits
    finally:
        _current.pop()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ApET's uploads be what they are on a GPU, no waits; and the device have no autocast, as "meta" has none."""
    upload, autocast = constants.on_device, torch.autocast

    def free_upload(tensor: Tensor, device: torch.device) -> Tensor:
        return _There(tensor) if device.type == DEVICE.type else upload(tensor, device)

    def no_autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == DEVICE.type else autocast(kind, *args, **kwargs)

    for module in ("apet.core.constants", "apet.core.basis", "apet.adapters.layout"):
        monkeypatch.setattr(f"{module}.on_device", free_upload)
    monkeypatch.setattr("torch.autocast", no_autocast)
