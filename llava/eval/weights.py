"""Which weights answered: a model retrained in its old folder must not continue another's answers."""

import hashlib

import torch
from torch import nn

_SAMPLES = 16  # values read per tensor: any training changes some of them, and 7 billion weights cost milliseconds


def weights_fingerprint(model: nn.Module) -> str:
    """Short SHA-256 of evenly spaced values of every parameter and of the parameters' shapes, as 16 hex digits.

    It depends on the values in memory, so on precision too, but not on device, file format or a patch. Parameters
    that lie on disk (device "meta") count by shape alone.
    """
    shapes, samples = [], {}
    for parameter in model.parameters():
        shapes.append(tuple(parameter.shape))
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
            samples.setdefault(parameter.device, []).append((len(shapes), values.to(torch.float32)))
    # One copy per device, not one per parameter: each would wait for the device.
    on_host = {}
    for parts in samples.values():
        copied = torch.cat([values for _, values in parts]).cpu().split([len(values) for _, values in parts])
        on_host |= {index: values for (index, _), values in zip(parts, copied, strict=True)}
    digest = hashlib.sha256(repr(shapes).encode())
    for index in sorted(on_host):
        digest.update(on_host[index].numpy().tobytes())
    return digest.hexdigest()[:16]
