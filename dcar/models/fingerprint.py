"""A short name for weights: equal where they are bit-equal, whatever file they came from."""

import hashlib

import torch
from torch import nn

from dcar.models.tokenizer import HybridTokenizer


def fingerprint(module: nn.Module) -> str:
    """sha256, in hex, over name, dtype, shape and bytes of every entry of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # bytes, because numpy knows no bfloat16; flat, because a scalar has no axis to view along
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: HybridTokenizer) -> str:
    """Of the encoder and the quantiser, which decide the tokens.

    The decoder is left out: stage 3 trains it alone, so tokens made with the stage 2 tokenizer stay
    those of the stage 3 tokenizer.
    """
    parts = {"encoder": tokenizer.encoder, "quantizer": tokenizer.quantizer}
    return fingerprint(nn.ModuleDict(parts))
