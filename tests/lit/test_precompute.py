"""Tokens as raw samples: what they hold, to the bit, and which tokens a training run refuses."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcar.data.members import BadSample
from dcar.data.transforms import ImageTransform
from dcar.errors import CheckpointError, NonFiniteError
from dcar.lit.averaging import AverageWeights
from dcar.lit.precompute import ImageDecoder, TokenPredictor, check_tokens, describe_tokens
from dcar.models.checkpoints import read_checkpoint
from dcar.models.text_encoder import ByteT5TextEncoder
from dcar.models.tokenizer import HybridTokenizer
from tests.prediction_toys import picture, row, tokenizer_checkpoint
from tests.toys import (
    SIZE,
    ToyData,
    ToyImages,
    collate,
    toy_stage,
    toy_text_encoder,
    toy_tokenizer,
    toy_trainer,
)


def frozen_text_encoder() -> ByteT5TextEncoder:
    torch.manual_seed(1)
    encoder = toy_text_encoder()
    encoder.trainable = False
    return encoder.eval()


def load(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def batch(count: int = 3) -> dict[str, Any]:
    return collate([ToyImages(count)[index] for index in range(count)])


@torch.no_grad()
def test_a_sample_holds_ids_and_residual_of_its_image_and_its_caption() -> None:
    tokenizer = toy_tokenizer().eval()
    samples = TokenPredictor(tokenizer=tokenizer).predict_step(batch(), 0)
    latents = tokenizer.encode(batch()["image"])
    assert [list(sample) for sample in samples] == [
        ["__key__", "ids.npy", "residual.npy", "txt"]
    ] * 3
    for index, sample in enumerate(samples):
        ids, residual = load(sample["ids.npy"]), load(sample["residual.npy"])
        assert ids.dtype == np.uint16 and np.array_equal(ids, latents.ids[index].numpy())
        assert residual.dtype == np.float16
        assert np.array_equal(residual, latents.residual[index].half().numpy())
        assert (sample["__key__"], sample["txt"]) == (f"toy/{index}", f"toy {index}".encode())


@torch.no_grad()
def test_text_embeddings_are_the_rows_of_the_caption_without_its_padding() -> None:
    encoder = frozen_text_encoder()
    captions = ["a", "a red apple", ""]
    samples = TokenPredictor(tokenizer=toy_tokenizer(), text_encoder=encoder).predict_step(
        batch() | {"caption": captions}, 0
    )
    text, mask = encoder(captions)
    for index, sample in enumerate(samples):
        stored = load(sample["text.npy"])
        assert stored.shape == (len(captions[index]) + 1, 8) and stored.dtype == np.float16
        assert np.array_equal(stored, text[index][mask[index]].half().numpy())


def test_a_batch_without_samples_gives_none() -> None:
    assert TokenPredictor(tokenizer=toy_tokenizer()).predict_step({"key": []}, 0) == []


def test_a_residual_that_is_not_finite_is_never_stored() -> None:
    predictor = TokenPredictor(tokenizer=toy_tokenizer())
    broken = batch()
    broken["image"][1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="between toy/0 and toy/2"):
        predictor.predict_step(broken, 0)


def test_ids_that_do_not_fit_16_bits_are_refused() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.quantizer.num_codes = 2**16
    TokenPredictor(tokenizer=tokenizer)
    tokenizer.quantizer.num_codes += 1
    with pytest.raises(ValueError, match="65537 codes"):
        TokenPredictor(tokenizer=tokenizer)


def test_a_text_encoder_that_is_still_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="ByteT5TextEncoder is trained with the generator"):
        TokenPredictor(tokenizer=toy_tokenizer(), text_encoder=toy_text_encoder())


def test_a_picture_is_decoded_alike_every_time_from_its_centre() -> None:
    decode = ImageDecoder(ImageTransform(SIZE), captioned=True)
    first, again = decode(row(3)), decode(row(3))
    assert torch.equal(first["image"], again["image"]) and first["key"] == "toys/003"
    pixels = np.asarray(picture(3))[:, 4:36].transpose(2, 0, 1)  # 40 x 32 before
    torch.testing.assert_close(
        first["image"], torch.from_numpy(pixels / 127.5 - 1).float(), rtol=0, atol=1e-5
    )


def test_words_are_required_only_where_asked_for() -> None:
    bare = {"__key__": "a", "png": row(1)["png"]}
    transform = ImageTransform(SIZE)
    assert ImageDecoder(transform, captioned=False)(bare)["caption"] == ""
    with pytest.raises(BadSample, match="no caption"):
        ImageDecoder(transform, captioned=True)(bare)


def test_tokens_of_tokens_are_bad_samples() -> None:
    (sample,) = TokenPredictor(tokenizer=toy_tokenizer()).predict_step(batch(1), 0)
    with pytest.raises(BadSample, match="no image"):
        ImageDecoder(ImageTransform(SIZE), captioned=True)(sample)


@pytest.mark.parametrize("chance", [{"crop": "random"}, {"flip": True}])
def test_a_transform_that_draws_is_refused(chance: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="drawn at random"):
        ImageDecoder(ImageTransform(SIZE, **chance), captioned=True)


def facts(
    tokenizer: HybridTokenizer | None = None, text_encoder: nn.Module | None = None, **changed: Any
) -> dict[str, Any]:
    torch.manual_seed(0)
    described = describe_tokens(
        tokenizer=tokenizer or toy_tokenizer(),
        text_encoder=text_encoder,
        size=changed.pop("size", SIZE),
        checkpoint=changed.pop("checkpoint", "tokenizer/stage3"),
        module=changed.pop("module", "TokenizerStage3"),
    )
    return {**described, "folder": "data/tokens", **changed}


def test_tokens_of_the_same_weights_are_accepted_whatever_file_they_came_from() -> None:
    encoder = frozen_text_encoder()
    check_tokens(facts(), facts(checkpoint="elsewhere.ckpt", module="TokenizerStage2"))
    check_tokens(facts(text_encoder=encoder), facts(text_encoder=encoder))
    check_tokens(facts(text_encoder=encoder), facts())
    check_tokens(facts(), facts(text_encoder=encoder))


def test_tokens_of_another_tokenizer_are_refused_by_both_names() -> None:
    torch.manual_seed(5)
    mine = facts(toy_tokenizer(), checkpoint="other.ckpt", module="TokenizerStage2")
    theirs = facts()
    with pytest.raises(CheckpointError) as error:
        check_tokens(theirs, mine)
    for part in ("data/tokens", "tokenizer/stage3", "TokenizerStage3", "other.ckpt"):
        assert part in str(error.value)
    for side in (theirs, mine):
        digits = side["tokenizer"]["fingerprint"]
        assert digits[:12] in str(error.value) and digits[:13] not in str(error.value)


def test_tokens_of_another_resolution_are_refused_with_both_sizes() -> None:
    with pytest.raises(
        CheckpointError, match="data/tokens are of 64 px .* this run's are of 32 px"
    ):
        check_tokens(facts(size=64), facts())


@pytest.mark.parametrize("change", ["weights", "max_tokens"])
def test_text_embeddings_of_another_encoder_are_refused(change: str) -> None:
    theirs, ours = frozen_text_encoder(), frozen_text_encoder()
    if change == "weights":
        next(ours.parameters()).data += 1
    else:
        ours.max_tokens = 8
    reason = "fingerprint" if change == "weights" else "max_tokens: 16 there, 8 here"
    with pytest.raises(CheckpointError, match=f"of ByteT5TextEncoder, .* differ in {reason}"):
        check_tokens(facts(text_encoder=theirs), facts(text_encoder=ours))


def test_stage_3_keeps_the_tokens_of_stage_2(tmp_path: Path) -> None:
    """It trains the decoder alone, and averaging leaves what does not move as it is."""

    def described(path: Path) -> dict[str, Any]:
        tokenizer = toy_tokenizer(revival_decay=0.9)
        tokenizer.load_state_dict(read_checkpoint(path)["network"])
        return facts(tokenizer)

    second = tokenizer_checkpoint(tmp_path / "2.ckpt", revival_decay=0.9)
    module = toy_stage(3, init_from=second, revival_decay=0.9)
    trainer = toy_trainer(3, callbacks=[AverageWeights(decay=0.9)])
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    check_tokens(described(second), described(tmp_path / "3.ckpt"))
