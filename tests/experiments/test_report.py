"""The report over miniature runs: names in metrics.json, one self-contained page, clear errors."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from dcar.models.checkpoints import save_model
from experiments.report import finite, processor, versions, write_report
from tests.toys import ToyData, ToyImages, ToyLoader, toy_model

pytestmark = pytest.mark.slow

STAGES, GENERATORS = ("stage1", "stage2", "stage3"), ("generator_32", "generator_64")
MARKUP = "<script>alert('a & b')</script>"


class MarkedImages(ToyImages):
    """Captions that would be markup if a page did not escape them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"caption": f"{MARKUP} {index}"}


class ReportData(ToyData):
    """Two validation sets, as the quickstart has."""

    def val_dataloader(self) -> list[ToyLoader]:
        return [ToyLoader(MarkedImages(12, offset=offset), 4) for offset in (100, 200)]


def metrics_of(run: str) -> dict[str, float]:
    """What the training modules log at their last validation."""
    if run in GENERATORS:
        named = {
            f"{split}/{name}": value
            for split, extra in (("val", 0.0), ("heldout", 1.0))
            for name, value in {"token": 2.0 + extra, "token_shuffled": 2.5 + extra}.items()
        }
        return named | {"val/gfid_mobilenetv2": 9.0, "train/token": 2.1}
    paths = {"hybrid": 30.0 + STAGES.index(run), "discrete": 20.0}
    named = {}
    for split in ("val", "heldout"):
        for path, value in paths.items():
            for name in ("psnr", "ssim", "lpips", "rfid_mobilenetv2"):
                named[f"{split}/{name}_{path}"] = value
        named |= {f"codebook/{split}_usage": 0.75, f"codebook/{split}_perplexity": 11.0}
    return named | {"train/l1": 0.1}


def write_run(folder: Path, run: str) -> None:
    facts = {"steps": 40, "seconds": 3.0, "parameters": 1000, "trained_parameters": 500}
    facts |= {"precision": "32-true", "device": "cpu", "metrics": metrics_of(run)}
    (folder / run).mkdir(parents=True)
    (folder / run / "metrics.json").write_text(json.dumps(facts))
    config = {
        "data": {"_target_": f"{ReportData.__module__}.ReportData"},
        "module": {"val_names": ["val", "heldout"]},
    }
    (folder / run / "config.yaml").write_text(yaml.safe_dump(config))
    board = SummaryWriter(str(folder / run / "tensorboard"))
    for step in range(0, 40, 10):
        board.add_scalar("perf/images_per_second", 100 + step, step)
        for tag, value in metrics_of(run).items():
            board.add_scalar(tag, value - step / 100, step)
    board.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five finished runs, and the report on them."""
    folder = tmp_path_factory.mktemp("quickstart")
    for run in (*STAGES, *GENERATORS):
        write_run(folder, run)
    save_model(toy_model(), folder / "generator_64" / "model")
    assert write_report(folder, runs=(*STAGES, *GENERATORS)) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


class Tags(HTMLParser):
    """Every tag with its attributes; raises where tags do not nest."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def tags(folder: Path) -> Tags:
    return Tags((folder / "report.html").read_text("utf-8"))


def test_metrics_of_the_last_tokenizer_and_generator_have_flat_names(figures) -> None:
    tokenizer, generator = figures["tokenizer"], figures["generator"]
    assert tokenizer["psnr_hybrid"] == 32.0 and tokenizer["psnr_discrete"] == 20.0
    for name in ("ssim", "lpips", "rfid_mobilenetv2"):
        assert {f"{name}_hybrid", f"{name}_discrete", f"heldout_{name}_hybrid"} <= set(tokenizer)
    assert tokenizer["codebook_usage"] == 0.75 and tokenizer["heldout_codebook_perplexity"] == 11
    assert generator["token"] == 2.0 and generator["token_shuffled"] == 2.5
    assert generator["heldout_token"] == 3.0 and generator["heldout_token_shuffled"] == 3.5
    assert generator["gfid_mobilenetv2"] == 9.0
    assert not [name for name in tokenizer | generator if "/" in name or "l1" in name]


def test_every_run_keeps_its_own_figures(figures) -> None:
    after = [figures["runs"][run]["figures"]["psnr_hybrid"] for run in STAGES]
    assert after == [30.0, 31.0, 32.0]
    assert figures["runs"]["stage1"]["images_per_second"] == 115
    assert figures["seconds"]["total"] == 15 and figures["seconds"]["stage2"] == 3


def test_versions_name_python_the_packages_and_the_machine(figures) -> None:
    assert {"python", "torch", "lightning", "dcar", "processor", "cores"} <= set(
        figures["versions"]
    )
    assert figures["versions"] == versions()


def test_the_page_takes_nothing_from_anywhere_else(tags: Tags) -> None:
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    assert images and all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] for image in images)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    for _, attributes in tags.found:
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_the_page_shows_eight_pairs_a_split_and_every_sampling_step(tags: Tags) -> None:
    words = [image.get("alt", "") for tag, image in tags.found if tag == "img"]
    assert len([word for word in words if word.startswith("drawn by the model")]) == 24
    assert len([word for word in words if word.startswith("real picture")]) == 24
    assert len([word for word in words if word.startswith("step ")]) == 3
    assert len([word for word in words if word == "hybrid"]) == 8


def test_captions_are_text_not_markup(folder: Path, tags: Tags) -> None:
    assert MARKUP not in (folder / "report.html").read_text("utf-8")
    assert MARKUP in tags.text
    assert any(MARKUP in (attributes.get("alt") or "") for _, attributes in tags.found)


def test_the_pictures_lie_beside_the_page(folder: Path) -> None:
    for name in ("reconstruction", "samples", "unmasking", "curves"):
        with Image.open(folder / "report" / f"{name}.png") as picture:
            assert picture.width > 100 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_the_page_is_called_by_its_recipe(folder: Path, tags: Tags) -> None:
    assert f"DC-AR {folder.name} report" in tags.text


def test_a_run_that_is_not_finished_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'stage4' is not finished"):
        write_report(folder, runs=(*STAGES, "stage4", *GENERATORS))


@pytest.mark.parametrize(("kind", "runs"), [("generator", STAGES), ("tokenizer", GENERATORS)])
def test_a_report_needs_both_halves(folder: Path, kind: str, runs: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"validation metrics of a {kind}"):
        write_report(folder, runs=runs)


def test_what_is_not_finite_becomes_null() -> None:
    nested = {"a": float("inf"), "b": {"c": float("nan"), "d": 1.5}, "e": "x"}
    assert finite(nested) == {"a": None, "b": {"c": None, "d": 1.5}, "e": "x"}


def test_the_processor_is_the_one_that_linux_names(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast CPU: v2\nflags : a\n")
    assert processor(tmp_path / "cpuinfo") == "Fast CPU: v2"
    assert processor(tmp_path / "missing")
