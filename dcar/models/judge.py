"""The judge: which concept a small picture shows, in which style, and how many objects.

B pictures of side S.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dcar.errors import CheckpointError
from dcar.models.checkpoints import load_strictly
from dcar.models.features import CPU_CHUNK, MobileNetV2Features
from dcar.models.weights_io import SHIPPED

COUNTS = 4  # the most objects that are counted
IGNORED = -100  # a label that is not known; cross-entropy leaves it out


class Verdict(NamedTuple):
    """Logits. The order of concepts and styles is the judge's; count: index 0 is one object."""

    concept: Tensor  # (B, concepts)
    style: Tensor  # (B, styles)
    count: Tensor  # type: ignore[assignment]  # (B, COUNTS); a tuple's own `count` is of no use


class Levels(nn.Module):
    """What MobileNetV2, frozen, sees at each of its levels: images (B, 3, S, S) in [-1, 1].

    Gives (B, WIDTH) means and deviations over the picture of every level's channels, the finest
    first, and the last map of 1/32 of `side`, (B, PLACED, side/32, side/32). Any S: resized to
    `side` in here. The network has no state: `dcar.models.features`.
    """

    ENDS = (2, 4, 7, 11, 14, 17, 18, 20)  # layers after which a level ends
    WIDTH = 2 * (16 + 24 + 32 + 64 + 96 + 160 + 320 + 1280)
    PLACED = 160  # channels of the map, that of level 5

    def __init__(self, side: int):
        super().__init__()
        self.side, self.network = side, MobileNetV2Features()

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        chunk = CPU_CHUNK if image.device.type == "cpu" else len(image)
        with torch.autocast(image.device.type, enabled=False):
            parts = [self._of_chunk(part) for part in image.float().split(max(chunk, 1))]
        pooled, maps = zip(*parts, strict=True)
        return torch.cat(pooled), torch.cat(maps)

    def _of_chunk(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ((_resized(image, self.side) + 1) / 2 - self.network.mean) / self.network.std
        hidden = hidden.contiguous(memory_format=torch.channels_last)
        pooled, last = [], hidden
        for number, layer in enumerate(self.network.layers):
            hidden = layer(hidden)
            if number in self.ENDS:
                pooled += _moments(hidden)
            if number == self.ENDS[5]:
                last = hidden
        return torch.cat(pooled, 1), last


class Look(nn.Module):
    """A small convolutional network for what a style is made of: outlines, shades, palette.

    Images (B, 3, S, S) in [-1, 1], resized to `side` in here, to (B, 2 * sum(widths)): means and
    deviations over the picture of the channels of each level, `widths` of them, each half as large
    as the one before.
    """

    def __init__(self, *, side: int, widths: Sequence[int]):
        super().__init__()
        self.side = side
        before = (3, *widths[:-1])
        self.levels = nn.ModuleList(map(_look_level, before, widths))

    def forward(self, image: Tensor) -> Tensor:
        hidden = _resized(image, self.side).contiguous(memory_format=torch.channels_last)
        pooled = []
        for level in self.levels:
            hidden = level(hidden)
            pooled += _moments(hidden)
        return torch.cat(pooled, 1)


def _look_level(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _moments(hidden: Tensor) -> list[Tensor]:
    """Mean and deviation of each channel over the picture, (B, C) each."""
    return [hidden.mean((2, 3)), hidden.std((2, 3), correction=0)]


def _resized(image: Tensor, side: int) -> Tensor:
    if image.shape[2:] == (side, side):
        return image
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True)


def head(width: int, hidden: int, out: int, *, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(width, affine=False, eps=1e-4),  # levels differ much in scale
        nn.Dropout(dropout),
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, out),
    )


class Judge(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> `Verdict`. Three heads: concept and count on the levels of
    a frozen MobileNetV2, style on a small network that is trained along, `Look`.

    Any S, and pictures that are no squares: they are resized in here, to `side`, a multiple of 32,
    and to `look`'s own. concepts, styles: names of the logits, in their order. look: arguments of
    `Look`. hidden: widths of the heads' one hidden layer, by the heads' names. dropout: before both
    layers of each head.
    Raises ValueError for another side, and where a name comes twice.
    """

    def __init__(
        self,
        *,
        concepts: Sequence[str],
        styles: Sequence[str],
        side: int,
        look: Mapping[str, Any],
        hidden: Mapping[str, int],
        dropout: float = 0.0,
    ):
        super().__init__()
        if side < 32 or side % 32:
            raise ValueError(f"side {side} is not a multiple of 32")
        for names in (concepts, styles):
            if len(set(names)) < len(names):
                raise ValueError(f"{len(names)} names, {len(set(names))} of them different")
        self.concepts, self.styles = tuple(concepts), tuple(styles)
        self.shape = {"side": side, "look": {**look}, "hidden": {**hidden}}
        self.levels, self.look = Levels(side), Look(**look)
        width, cells = Levels.WIDTH, (side // 32) ** 2
        make = partial(head, dropout=dropout)
        self.concept = make(width, hidden["concept"], len(concepts))
        self.style = make(2 * sum(look["widths"]), hidden["style"], len(styles))
        self.count = make(Levels.PLACED * cells, hidden["count"], COUNTS)

    def forward(self, image: Tensor) -> Verdict:
        return self.judge(image, *self.levels(image))

    def judge(self, image: Tensor, pooled: Tensor, placed: Tensor) -> Verdict:
        """Of images of which `levels` gave the other two."""
        style = self.style(self.look(image))
        return Verdict(self.concept(pooled), style, self.count(placed.flatten(1)))


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
