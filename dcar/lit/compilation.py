"""torch.compile for the networks that take a training step's time, in place."""

import torch
from torch import nn
from torch._functorch import config as aot

from dcar.models.autoencoder import Decoder, Encoder
from dcar.models.denoiser import Denoiser
from dcar.models.discriminator import PatchDiscriminator
from dcar.models.transformer import Block

# The transformer by the block: its blocks share one graph, and FSDP2 works between them.
PARTS = (Encoder, Decoder, PatchDiscriminator, Denoiser, Block)
VARIANTS = 64  # training or not, shapes, widths of layers: more of them run uncompiled


def compile_backend(setting: bool | str) -> str | None:
    """The backend that `compile` stands for: True is inductor, False none.

    Raises ValueError for a name that torch does not know.
    """
    if isinstance(setting, bool):
        return "inductor" if setting else None
    known = torch.compiler.list_backends(exclude_tags=())
    if setting not in known:
        raise ValueError(f"compile={setting!r} is not true, false or one of {', '.join(known)}")
    return setting


def compile_parts(module: nn.Module, *, backend: str) -> None:
    """Compile the networks in `module` when they first run, under the names that they have.

    What cannot be compiled (a graph break) runs as it is: it costs speed alone.
    """
    if hasattr(aot, "backward_pass_autocast"):
        aot.backward_pass_autocast = "off"  # as training steps run it
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
    for part in module.modules():
        if isinstance(part, PARTS) and part._compiled_call_impl is None:
            part.compile(backend=backend)
