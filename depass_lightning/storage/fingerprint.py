"""Identify a model's weights by a hash."""

import hashlib

import torch
from torch import nn


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that depend on the name, shape, type and value of every weight.

    Parameters and stored buffers are hashed (SHA-256) in the order of their names, one tensor on the CPU at
    a time. The device does not matter; the floating-point type does, since it changes what the model
    computes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # a quantised layer's extra state
            digest.update(f"{name} {tensor!r}".encode())
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]
