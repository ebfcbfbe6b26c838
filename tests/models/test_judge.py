"""The judge: its heads and names, its losses, its file, and what the shipped one tells."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dcar.data.loader import ShardLoader
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform, to_unit_range
from dcar.data.views import read_names
from dcar.errors import CheckpointError
from dcar.models.judge import COUNTS, IGNORED, Judge, judge_losses, load_judge, save_judge
from dcar.models.weights_io import SHIPPED
from tests.toys import ROOT

CONCEPTS, STYLES = ("whale", "apple", "clock"), ("noto", "3d")
WEIGHTS = {"concept": 1.0, "style": 0.5, "count": 2.0}
LOOK = {"side": 32, "widths": [4, 6]}
EMOJI = ROOT / "assets/emoji"


def small(concepts: tuple[str, ...] = CONCEPTS, **options) -> Judge:
    hidden = {"concept": 12, "style": 8, "count": 8}
    shape = {"side": 32, "look": LOOK, "hidden": hidden} | options
    return Judge(concepts=concepts, styles=STYLES, **shape)


def labels(concept: list[int], style: list[int], count: list[int]) -> dict[str, Tensor]:
    return {
        "concept": torch.tensor(concept),
        "style": torch.tensor(style),
        "count": torch.tensor(count),
    }


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (128, 96), (7, 5)])
def test_pictures_of_any_size_are_judged(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size) * 2 - 1
    verdict = small().eval()(image)
    assert verdict.concept.shape == (2, 3) and verdict.style.shape == (2, 2)
    assert verdict.count.shape == (2, COUNTS)


def test_other_sizes_are_resized_with_antialias() -> None:
    judge, image = small().eval(), torch.rand(2, 3, 100, 40) * 2 - 1
    sized = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    for ours, theirs in zip(judge(image), judge(sized), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_loss_is_that_of_each_head_by_its_weight() -> None:
    judge = small().eval()
    verdict = judge(torch.rand(3, 3, 64, 64))
    asked = labels([0, 2, IGNORED], [1, 0, 1], [IGNORED, IGNORED, 3])
    terms = judge_losses(verdict, asked, smoothing=0.1, weights=WEIGHTS)
    concept = F.cross_entropy(verdict.concept[:2], torch.tensor([0, 2]), label_smoothing=0.1)
    count = F.cross_entropy(verdict.count[2:], torch.tensor([3]))
    torch.testing.assert_close(terms["concept"], concept)
    torch.testing.assert_close(terms["count"], count)
    total = terms["concept"] + 0.5 * terms["style"] + 2 * terms["count"]
    torch.testing.assert_close(terms["loss"], total)


def test_a_head_without_labels_loses_nothing_and_learns_nothing() -> None:
    judge = small()
    none = labels([IGNORED] * 2, [0, 1], [IGNORED] * 2)
    terms = judge_losses(judge(torch.rand(2, 3, 64, 64)), none, smoothing=0.1, weights=WEIGHTS)
    assert terms["concept"] == 0 and terms["count"] == 0 and terms["style"] > 0
    terms["loss"].backward()
    concept, style = judge.concept[-1].weight.grad, judge.style[-1].weight.grad
    assert concept is not None and not concept.any() and style is not None and style.any()
    first = next(judge.look.parameters()).grad
    assert first is not None and first.any()  # what a style looks like is learned from the pixels


def test_a_few_steps_lower_the_loss() -> None:
    judge = small()
    image = torch.rand(3, 3, 1, 1).expand(3, 3, 64, 64) * 2 - 1
    asked = labels([0, 1, 2], [0, 1, 0], [0, 1, 2])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    seen = []
    for _ in range(15):
        loss = judge_losses(judge(image), asked, smoothing=0.0, weights=WEIGHTS)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_a_saved_judge_comes_back_with_its_names_and_figures(tmp_path: Path) -> None:
    judge, image = small(), torch.rand(8, 3, 64, 64) * 2 - 1
    judge(image)  # running statistics of their own
    judge.eval()
    figures = {"val/concept_top1": 0.5, "steps": 3}
    for name in ("one", "two"):
        save_judge(judge, tmp_path / f"{name}.safetensors", figures=figures)
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    loaded = load_judge(one)
    assert (loaded.concepts, loaded.styles, loaded.figures) == (CONCEPTS, STYLES, figures)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for ours, theirs in zip(judge(image), loaded(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    weight = judge.concept[-1].weight
    assert torch.equal(loaded.concept[-1].weight, weight.half().float())


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--exp=judge weights=.*mine"):
        load_judge(tmp_path / "mine.safetensors")


def test_what_is_damaged_no_judge_or_does_not_fit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_judge(small(), path, figures={})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged, or no judge"):
        load_judge(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged, or no judge"):
        load_judge(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no judge: KeyError"):
        load_judge(path)
    one_more = small(concepts=(*CONCEPTS, "tulip"))
    one_more.concepts = CONCEPTS
    save_judge(one_more, path, figures={})
    with pytest.raises(CheckpointError, match=r"concept\.6\.bias: \(3,\) here, \(4,\) there"):
        load_judge(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": 40}, "side 40 is not a multiple of 32"),
        ({"concepts": ("apple", "apple")}, "2 names, 1 of them different"),
    ],
)
def test_impossible_settings_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.fixture(scope="module")
def shipped() -> Judge:
    return load_judge()


def test_the_shipped_judge_is_small_and_knows_the_embedded_drawings(shipped: Judge) -> None:
    assert (SHIPPED / "judge.safetensors").stat().st_size < 8e6
    names = read_names(EMOJI / "concepts.json")
    assert (shipped.concepts, shipped.styles) == names
    assert sum(p.numel() for p in shipped.parameters()) < 4e6


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "heldout"])
def test_the_shipped_judge_tells_real_drawings_as_well_as_its_file_says(
    shipped: Judge, split: str
) -> None:
    """A quarter of the set; the bars are a tenth under what was measured on all of it."""
    stream = ShardStream(
        f"{EMOJI}/{split}-00000[0]*.tar",
        transform=ImageTransform(64),
        batch_size=128,
        seed=0,
        shuffle=False,
    )
    names, right = read_names(EMOJI / "concepts.json"), []
    for batch in ShardLoader(stream):
        verdict = shipped(to_unit_range(batch["image"]))
        asked = torch.tensor([names.labels(key) for key in batch["key"]])
        guesses = torch.stack([logits.argmax(1) for logits in verdict[:2]], 1)
        right.append(guesses == asked)
    concept, style = torch.cat(right).float().mean(0).tolist()
    assert concept > shipped.figures[f"{split}/concept_top1"] - 0.1
    assert style > shipped.figures[f"{split}/style_top1"] - 0.1
