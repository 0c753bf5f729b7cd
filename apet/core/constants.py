"""Small host tensors on a device, uploaded once: what depends on shapes and seeds is the same for most calls.

An upload costs pinned memory and a copy, and is not allowed while a CUDA graph is captured.
"""

import functools

import torch
from torch import Tensor

# Uploads kept. More different ones than these are uploaded again.
_KEPT = 512
# Larger tensors than this many bytes are not kept.
_LARGEST = 1 << 18
# Read by captured graphs at every replay, so never freed.
_captured: dict[int, Tensor] = {}


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor as a tensor on `device`, without waiting for it. The result is shared: never write into it.

    Raises:
        RuntimeError: From torch, where a graph is being captured and the same call was not made on this stream before.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return tensor.to(device)
    if tensor.nbytes > _LARGEST:
        return _upload(tensor, device)
    stream = torch.cuda.current_stream(device).cuda_stream  # another stream would have to wait for the upload
    data = tensor.contiguous().view(torch.uint8) if tensor.dtype != torch.bool else tensor.contiguous()
    found = _uploaded(data.numpy().tobytes(), tensor.dtype, tuple(tensor.shape), device, stream)
    if torch.cuda.is_current_stream_capturing():
        _captured[id(found)] = found
    return found


@functools.lru_cache(maxsize=_KEPT)
def _uploaded(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):  # calls outside of inference mode may get it too
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return _upload(flat.view(shape), device)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
