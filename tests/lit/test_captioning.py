"""Captions as raw samples: by prompt, in order, none empty; pictures made ready for them."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from dcar.data.members import BadSample
from dcar.lit.captioning import CaptionPredictor, PictureDecoder
from dcar.models.captioner import Captioner, Prompt
from tests.prediction_toys import picture, row, write_captioner

PROMPTS = {"long": Prompt("What is it?", 12), "short": Prompt("What?", 4)}
BATCH = {"key": ["a", "b"], "picture": [picture(1), picture(2, (20, 40))]}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Captioner:
    folder = write_captioner(tmp_path_factory.mktemp("captioner"))
    return Captioner(str(folder), dtype="float32", local_files_only=True)


def test_a_sample_holds_a_caption_for_each_prompt_and_the_first_as_text(
    captioner: Captioner,
) -> None:
    predictor = CaptionPredictor(captioner=captioner, prompts=PROMPTS)
    samples = predictor.predict_step(BATCH, 0)
    assert [sample["__key__"] for sample in samples] == ["a", "b"]
    columns = {name: captioner(BATCH["picture"], prompt) for name, prompt in PROMPTS.items()}
    for index, sample in enumerate(samples):
        captions = {name: texts[index] for name, texts in columns.items()}
        assert json.loads(sample["json"]) == {"captions": captions}
        assert sample["txt"].decode() == captions["long"]
        assert list(json.loads(sample["json"])["captions"]) == ["long", "short"]


def test_an_empty_caption_is_left_out_and_without_the_first_there_is_no_sample(
    captioner: Captioner,
) -> None:
    """With the last token forced to be the end, a prompt of one token has an empty answer."""
    silent = {"first": Prompt("What?", 1), "then": Prompt("What is it?", 12)}
    try:
        captioner.generation = {"do_sample": False, "forced_eos_token_id": 2}
        predictor = CaptionPredictor(captioner=captioner, prompts=silent)
        assert predictor.predict_step(BATCH, 0) == []
        swapped = CaptionPredictor(captioner=captioner, prompts=dict(reversed(silent.items())))
        samples = swapped.predict_step(BATCH, 0)
        assert [list(json.loads(s["json"])["captions"]) for s in samples] == [["then"], ["then"]]
    finally:
        captioner.generation = {"do_sample": False}


def test_drawn_captions_depend_on_the_keys_of_the_batch_alone(tmp_path: Path) -> None:
    drawing = Captioner(
        str(write_captioner(tmp_path)), dtype="float32", generation={"do_sample": True}
    )
    predictor = CaptionPredictor(captioner=drawing, prompts=PROMPTS)
    assert predictor.predict_step(BATCH, 0) == predictor.predict_step(BATCH, 7)
    other = BATCH | {"key": ["a", "c"]}
    texts = [[s["txt"] for s in predictor.predict_step(each, 0)] for each in (BATCH, other)]
    assert texts[0] != texts[1]


def test_a_batch_without_pictures_gives_no_samples(captioner: Captioner) -> None:
    assert CaptionPredictor(captioner=captioner, prompts=PROMPTS).predict_step({"key": []}, 0) == []


def test_no_prompt_is_an_error(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        CaptionPredictor(captioner=captioner, prompts={})


def test_long_pictures_are_shrunk_and_short_ones_left_as_they_are() -> None:
    assert PictureDecoder(max_side=20)(row(1))["picture"].size == (20, 16)  # 40 x 32 before
    decoded = PictureDecoder(max_side=50)(row(1))
    assert decoded["key"] == "toys/001"
    assert decoded["picture"].tobytes() == picture(1).tobytes()


def test_pictures_of_any_mode_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(buffer, "PNG")
    decoded = PictureDecoder(max_side=9)({"__key__": "a", "png": buffer.getvalue()})["picture"]
    assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("members", "reason"),
    [({}, "no image"), ({"png": b"no"}, "broken image"), ({"txt": b"words"}, "no image")],
)
def test_a_picture_that_cannot_be_read_is_a_bad_sample(
    members: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(BadSample, match=reason):
        PictureDecoder(max_side=9)({"__key__": "a", **members})


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="max_side=0"):
        PictureDecoder(max_side=0)
