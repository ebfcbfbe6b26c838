"""The small MLP under the residual head: noisy residuals, their time and condition to a prediction.

M rows, C latent channels, D width of the transformer, W width of the MLP. The same MLP as in MAR
(arXiv 2406.11838) and HART (arXiv 2410.10812); DC-AR section 3.2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.inner = nn.Linear(frequencies, width)
        self.output = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        half = torch.arange(self.frequencies // 2, device=time.device, dtype=torch.float32)
        rate = torch.exp(half * (-math.log(10000.0) / (self.frequencies // 2)))
        angle = time.float()[:, None] * rate
        code = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.inner.weight.dtype)
        return self.output(F.silu(self.inner(code)))  # (M, W)


def _modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, normed, 1 + scale)


class ModulatedBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.inner = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        change = self.inner(_modulate(self.norm(hidden), shift, scale))
        return torch.addcmul(hidden, gate, self.output(F.silu(change)))


class Denoiser(nn.Module):
    """Noisy rows (M, C), times and conditions to (M, outputs). Starts as the zero function."""

    def __init__(self, *, channels: int, outputs: int, dim: int, width: int, depth: int):
        super().__init__()
        self.time_embedding = TimeEmbedding(width)
        self.condition_embedding = nn.Linear(dim, width)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.output_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, outputs)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embedding.inner, self.time_embedding.output):
            nn.init.normal_(layer.weight, std=0.02)
        modulations = [
            block.modulation for block in self.blocks if isinstance(block, ModulatedBlock)
        ]
        for layer in (*modulations, self.output_modulation, self.output):
            nn.init.zeros_(layer.weight)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """time (M,) or (1,); condition (M, W) from `condition_embedding`."""
        condition = F.silu(self.time_embedding(time) + condition)  # (M, W)
        hidden = self.input(noisy.to(self.input.weight.dtype))  # (M, W)
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.output_modulation(condition).chunk(2, dim=-1)
        return self.output(_modulate(self.output_norm(hidden), shift, scale))  # (M, outputs)
