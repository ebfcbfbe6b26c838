"""Captioner: a real class at toy size, batches of pictures of unlike shapes, no network."""

from pathlib import Path

import pytest
import torch

from dcar.models.captioner import Captioner, Prompt, answers
from tests.prediction_toys import picture, write_captioner

PROMPT = Prompt("What is it?", 12)
PICTURES = [picture(1, (40, 10)), picture(2, (32, 32)), picture(3, (20, 40))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("captioner"))


def load(folder: Path, **options) -> Captioner:
    return Captioner(str(folder), **{"dtype": "float32", "local_files_only": True, **options})


def test_a_batch_gives_each_picture_what_it_gets_alone(folder: Path) -> None:
    """Pictures of other shapes take another number of tokens, so prompts are padded on the left."""
    captioner = load(folder)
    inputs = captioner._inputs(PICTURES, PROMPT.text)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    assert inputs["attention_mask"][:, -1].all()
    together = captioner(PICTURES, PROMPT)
    assert together == [captioner([each], PROMPT)[0] for each in PICTURES]
    assert len(set(together)) == 3


def test_captions_hold_neither_the_prompt_nor_special_tokens_nor_line_breaks(folder: Path) -> None:
    captioner = load(folder)
    longer = captioner(PICTURES, Prompt("What is it?", 40))
    for text, start in zip(longer, captioner(PICTURES, PROMPT), strict=True):
        assert text.startswith(start) and len(text) <= 40
        assert "assistant" not in text and "<image>" not in text and text == " ".join(text.split())


def test_the_prompt_changes_the_caption(folder: Path) -> None:
    captioner = load(folder)
    assert captioner(PICTURES, PROMPT) != captioner(PICTURES, Prompt("Which colours?", 12))


def test_drawn_captions_follow_the_seed_and_leave_torch_s_own_state(folder: Path) -> None:
    captioner = load(folder, generation={"do_sample": True, "temperature": 2.0})
    state = torch.get_rng_state()
    first = captioner(PICTURES, PROMPT, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert captioner(PICTURES, PROMPT, seed=1) == first
    assert captioner(PICTURES, PROMPT, seed=2) != first


def test_half_precision_weights_take_pictures_of_their_own_type(folder: Path) -> None:
    captioner = load(folder, dtype="bfloat16")
    assert {p.dtype for p in captioner.parameters()} == {torch.bfloat16}
    assert len(captioner(PICTURES, PROMPT)) == 3


def test_a_model_without_a_chat_template_gets_the_text_as_it_stands(tmp_path: Path) -> None:
    captioner = load(write_captioner(tmp_path, chat=False))
    asked = captioner._inputs(PICTURES[1:2], "<image>What is it?")["input_ids"]
    assert captioner.processor.batch_decode(asked)[0].endswith("What is it?")
    assert len(captioner(PICTURES[1:2], Prompt("<image>What is it?", 12))) == 1


def test_only_a_repeated_prompt_is_cut_off() -> None:
    asked = torch.tensor([[0, 5, 6], [4, 5, 6]])
    decoder = torch.tensor([[0, 5, 6, 9], [4, 5, 6, 8]])
    assert answers(decoder, asked).tolist() == [[9], [8]]
    both = torch.tensor([[2, 9, 1, 1], [2, 8, 7, 1]])
    assert answers(both, asked).tolist() == both.tolist()
    assert answers(both[:, :2], asked).tolist() == both[:, :2].tolist()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no image-text-to-text model at '{tmp_path}'"):
        load(tmp_path)


@pytest.mark.parametrize(("text", "tokens"), [(" ", 5), ("What?", 0)])
def test_an_impossible_prompt_is_refused(text: str, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens={tokens}"):
        Prompt(text, tokens)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'int8' is not one of float32, bfloat16, float16"):
        Captioner("x", dtype="int8")
