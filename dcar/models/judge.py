"""The judge: which concept a small picture shows, in which style, and how many objects.

B pictures of side S, D width of the pooled features.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dcar.errors import CheckpointError
from dcar.models.checkpoints import load_strictly
from dcar.models.weights_io import SHIPPED

COUNTS = 4  # the most objects that are counted
IGNORED = -100  # a label that is not known; cross-entropy leaves it out


class Verdict(NamedTuple):
    """Logits. The order of concepts and styles is the judge's; count: index 0 is one object."""

    concept: Tensor  # (B, concepts)
    style: Tensor  # (B, styles)
    count: Tensor  # type: ignore[assignment]  # (B, COUNTS); a tuple's own `count` is of no use


def conv_norm(width: int, out: int, kernel: int, *, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: arXiv 1512.03385."""

    def __init__(self, width: int):
        super().__init__()
        first, last = conv_norm(width, width, 3), conv_norm(width, width, 3)
        nn.init.zeros_(last[1].weight)  # type: ignore[arg-type]  # begins as the identity
        self.layers = nn.Sequential(first, nn.ReLU(inplace=True), last)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden + self.layers(hidden))


class Judge(nn.Module):
    """A residual network with three heads: pictures (B, 3, S, S) in [-1, 1] -> `Verdict`.

    Any S, and pictures that are no squares: they are resized to 64 x 64 in here.
    concepts, styles: names of the logits, in their order. widths: of the stages at 16, 8, 4, ...
    pixels; depths: residual blocks in each. features: D.
    Raises ValueError where widths and depths differ in number, or a name comes twice.
    """

    side = 64

    def __init__(
        self,
        *,
        concepts: Sequence[str],
        styles: Sequence[str],
        stem: int,
        widths: Sequence[int],
        depths: Sequence[int],
        features: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(f"{len(widths)} widths and {len(depths)} depths must be as many")
        for names in (concepts, styles):
            if len(set(names)) < len(names):
                raise ValueError(f"{len(names)} names, {len(set(names))} of them different")
        self.concepts, self.styles = tuple(concepts), tuple(styles)
        self.figures: dict[str, Any] = {}  # of a trained judge: how good it is
        self.shape = {
            "stem": stem,
            "widths": list(widths),
            "depths": list(depths),
            "features": features,
        }
        layers: list[nn.Module] = [conv_norm(3, stem, 3, stride=2), nn.ReLU(inplace=True)]
        for before, width, depth in zip([stem, *widths], widths, depths, strict=False):
            layers += [conv_norm(before, width, 3, stride=2), nn.ReLU(inplace=True)]
            layers += [ResidualBlock(width) for _ in range(depth)]
        layers += [conv_norm(widths[-1], features, 1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.concept = nn.Linear(features, len(concepts))
        self.style = nn.Linear(features, len(styles))
        self.count = nn.Linear(features, COUNTS)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Verdict:
        hidden = self.layers(self._sized(image))  # (B, D, H, W)
        pooled = hidden.mean((2, 3))  # (B, D)
        return Verdict(self.concept(self.dropout(pooled)), self.style(pooled), self.count(pooled))

    def _sized(self, image: Tensor) -> Tensor:
        size = (self.side, self.side)
        if image.shape[2:] != size:
            image = F.interpolate(image, size, mode="bilinear", antialias=True)  # (B, 3, 64, 64)
        return image.contiguous(memory_format=torch.channels_last)


def judge_losses(
    verdict: Verdict,
    labels: Mapping[str, Tensor],
    *,
    smoothing: float,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """Cross-entropy of each head in nats, and `loss`, their sum by `weights`.

    labels: (B,) int64 by the heads' names, IGNORED where one is not known. smoothing: of the
    concept's labels. A head without a label in the whole batch has loss 0.
    """
    terms = {
        name: _mean(
            F.cross_entropy(
                logits.float(),
                labels[name],
                ignore_index=IGNORED,
                label_smoothing=smoothing if name == "concept" else 0.0,
                reduction="sum",
            ),
            labels[name],
        )
        for name, logits in verdict._asdict().items()
    }
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": total, **terms}


def _mean(total: Tensor, labels: Tensor) -> Tensor:
    return total / (labels != IGNORED).sum().clamp(min=1)


def save_judge(judge: Judge, path: str | Path, *, figures: Mapping[str, Any]) -> None:
    """One .safetensors file: matrices in half precision, vectors in fp32; names and figures within.

    figures: plain data that says how good the weights are. One metadata key only: more would be
    written in any order.
    """
    tensors = {
        name: (tensor.half() if tensor.ndim >= 2 else tensor).contiguous()
        for name, tensor in judge.state_dict().items()
    }
    about = {
        "concepts": judge.concepts,
        "styles": judge.styles,
        "shape": judge.shape,
        "figures": dict(figures),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors, metadata={"judge": json.dumps(about)}))


def load_judge(path: str | Path | None = None) -> Judge:
    """The judge of a file of `save_judge`, in eval mode, fp32 on the CPU, without gradients.

    path: None is dcar/weights/judge.safetensors. `judge.figures` says how good it is.
    Raises FileNotFoundError, with the command that trains one, where there is no file, and
    CheckpointError where it is damaged, holds no judge, or its weights do not fit its names.
    """
    path = Path(path or SHIPPED / "judge.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; `python -m experiments.run --exp=judge weights={path}` "
            "trains them"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["judge"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {key: about[key] for key in ("concepts", "styles")}
        judge = Judge(**names, **about["shape"])
        judge.figures = about["figures"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged, or no judge: {error!r}") from error
    load_strictly(judge, tensors, source=path)
    return judge.eval().requires_grad_(False)
