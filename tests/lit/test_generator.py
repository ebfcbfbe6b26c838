"""MaskedARGenerator: what moves, what is saved, tokens made once, exact resume, resolutions."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import CheckpointError
from dcar.evaluation.metrics import GenerationMetrics
from dcar.lit.averaging import AverageWeights
from dcar.lit.datamodule import ShardDataModule
from dcar.lit.generator import MaskedARGenerator
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.models.checkpoints import save_model
from dcar.models.sampler import draw_residual
from dcar.models.text_encoder import ByteT5TextEncoder
from dcar.models.unmasking import SamplerSettings
from tests.prediction_toys import make_tokens, write_pictures
from tests.toys import (
    SIZE,
    ToyData,
    ToyImages,
    ToyLoader,
    collate,
    toy_generator,
    toy_masked_generator,
    toy_model,
    toy_stage,
    toy_text_encoder,
    toy_tokenizer,
    toy_trainer,
    weights,
)


def test_generator_and_text_encoder_move_and_the_tokenizer_does_not() -> None:
    module = toy_masked_generator()
    before, tokenizer = weights(module), weights(module.tokenizer.module)
    toy_trainer(3).fit(module, datamodule=ToyData())
    moved = {
        k.split(".")[1] for k, v in module.state_dict().items() if not torch.equal(v, before[k])
    }
    assert moved == {"generator", "text_encoder"}
    for name, tensor in module.tokenizer.module.state_dict().items():
        assert torch.equal(tensor, tokenizer[name]), name


def test_no_frozen_weight_is_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    trainer.fit(toy_masked_generator(), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    parts = {tuple(name.split(".")[:2]) for name in saved["state_dict"]}
    assert parts == {("network", "generator"), ("network", "text_encoder")}


def test_the_scale_is_the_standard_deviation_of_training_residuals() -> None:
    module = toy_masked_generator(generator=toy_generator(scale=None), scale_batches=2)
    toy_trainer(1).fit(module, datamodule=ToyData())
    images = collate([ToyImages(8)[index] for index in range(8)])["image"]
    residual = module.tokenizer.encode(images).residual
    expected = residual.square().mean().sqrt().item()
    assert module.generator.residual_head.scale.item() == pytest.approx(expected, rel=1e-5)


def test_tokens_of_pictures_that_are_cut_at_random_are_not_cached(shards: Path) -> None:
    module, pictures = toy_masked_generator(cache_tokens=True), data(shards / "pictures")
    pictures.train_stream.keywords["transform"] = ImageTransform(SIZE, flip=True)
    with pytest.raises(ValueError, match="cut or mirrored at random"):
        toy_trainer(1).fit(module, datamodule=pictures)


def test_shards_that_hold_tokens_are_not_tokenised_again() -> None:
    module = toy_masked_generator()
    batch = {"ids": torch.zeros(1, 4, 4), "residual": torch.zeros(1, 4, 4, 4)}
    assert module.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.slow
def test_validation_compares_right_and_shuffled_captions_and_reports_gfid() -> None:
    module = toy_masked_generator(fid_images=8, metrics=partial(GenerationMetrics))
    trainer = toy_trainer(4, limit_val_batches=1.0, val_check_interval=4)
    trainer.fit(module, datamodule=ToyData())
    names = set(trainer.callback_metrics)
    assert {"val/token", "val/token_shuffled", "val/residual"} <= names
    assert any(name.startswith("val/gfid_") for name in names)
    right, shuffled = (trainer.callback_metrics[f"val/token{s}"] for s in ("", "_shuffled"))
    assert right != shuffled


def test_the_wrong_number_of_codes_is_refused_with_both_numbers() -> None:
    generator = toy_generator()
    generator.transformer.num_codes = 99
    with pytest.raises(ValueError, match="99 codes, the tokenizer has 16"):
        toy_masked_generator(generator=generator)


def test_a_stage_1_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    trainer.fit(toy_stage(1), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="written by TokenizerStage1"):
        toy_masked_generator(tokenizer_from=tmp_path / "a.ckpt")


def test_weights_of_one_resolution_start_another(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    low = toy_masked_generator()
    trainer.fit(low, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "low.ckpt")
    high = toy_masked_generator(size=64, init_from=tmp_path / "low.ckpt")
    for name, tensor in low.network.state_dict().items():
        assert torch.equal(tensor, high.network.state_dict()[name]), name
    text, mask = high.text_encoder(["a"])
    assert high.sample(text, mask, seeds=[0]).ids.shape == (1, 16, 16)


def test_a_deeper_transformer_goes_on_from_a_shallower_one(tmp_path: Path) -> None:
    """From a checkpoint and from a model folder; only where that is asked for."""
    trained = toy_masked_generator()
    trainer = toy_trainer(1)
    trainer.fit(trained, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    save_model(toy_model(), tmp_path / "model")
    for path, shallow in ((tmp_path / "last.ckpt", trained), (tmp_path / "model", toy_model())):
        deeper = partial(toy_masked_generator, generator=toy_generator(depth=3), init_from=path)
        with pytest.raises(CheckpointError, match="another architecture"):
            deeper()
        deep = deeper(deepen=True)
        text, mask = shallow.text_encoder(["a"])
        assert torch.equal(deep.text_encoder(["a"])[0], text)
        ids = torch.zeros(1, 8, 8, dtype=torch.int64)
        ours, theirs = (m.generator.transformer(ids, text, mask).logits for m in (deep, shallow))
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(CheckpointError, match="cannot be deepened: .* 2 blocks .* to 1"):
        toy_masked_generator(generator=toy_generator(depth=1), init_from=path, deepen=True)


def trained_checkpoint(folder: Path) -> Path:
    trainer = toy_trainer(1)
    trainer.fit(toy_masked_generator(), datamodule=ToyData())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_new_head_learns_alone_from_a_finished_generator(is_folder: bool, tmp_path: Path) -> None:
    """The base's own head has another width; scale and head are new, all else is the base's."""
    save_model(toy_model(), tmp_path / "model")
    base = tmp_path / "model" if is_folder else trained_checkpoint(tmp_path)
    wider = toy_generator(scale=None, width=24)
    module = toy_masked_generator(generator=wider, init_from=base, head_alone=True)
    theirs = toy_masked_generator(init_from=base).network.state_dict()
    trainer = toy_trainer(4, limit_val_batches=1.0, val_check_interval=4)
    trainer.fit(module, datamodule=ToyData())
    for name, tensor in module.network.state_dict().items():
        assert torch.equal(tensor, theirs[name]) or name.startswith("generator.residual_head."), (
            name
        )
    head = module.generator.residual_head
    assert head.scale.isfinite() and bool(head.denoiser.output.weight.any())  # which was zero
    logged = set(trainer.callback_metrics)
    assert {"val/residual", "val/explained"} <= logged and "val/token" not in logged
    batch = module.on_after_batch_transfer(collate([ToyImages(4)[k] for k in range(4)]), 0)
    text, mask = module.text_encoder(batch["caption"])
    drawn = draw_residual(
        module.generator, text, mask, ids=batch["ids"], seeds=range(4), settings=module.sampler
    )
    missed = (drawn - batch["residual"]).square().sum() / batch["residual"].square().sum()
    assert module._explained(batch, text, mask).item() == pytest.approx(1 - missed.item())


def test_without_a_head_there_is_none_to_train_alone() -> None:
    generator = toy_generator()
    generator.residual_head = None
    with pytest.raises(ValueError, match="head_alone=True: .*none is no head to train"):
        toy_masked_generator(generator=generator, head_alone=True)


def test_stopping_and_resuming_is_bit_equal(tmp_path: Path) -> None:
    """6 straight against 3, mid-epoch, then 3 more: caption drop, masks, noise, averages."""

    def run(steps: int, ckpt: Path | None = None):
        torch.manual_seed(0)
        module = toy_masked_generator(generator=toy_generator(scale=None, caption_drop=0.5))
        average = AverageWeights(decay=0.9)
        last = LastCheckpoint(folder=tmp_path / str(steps), every_steps=100)
        trainer = toy_trainer(steps, callbacks=[average, last])
        trainer.fit(module, datamodule=ToyData(count=16), ckpt_path=ckpt)
        return module, average, trainer

    straight, straight_average, _ = run(6)
    run(3)
    resumed, resumed_average, _ = run(6, tmp_path / "3" / "last.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, tensor in straight_average.average.state_dict().items():
        assert torch.equal(tensor, resumed_average.average.state_dict()[name]), name


def frozen_text_encoder() -> ByteT5TextEncoder:
    torch.manual_seed(1)
    encoder = toy_text_encoder()
    encoder.trainable = False
    return encoder.eval()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The same 16 samples as pictures, as tokens, and as tokens with text embeddings."""
    root = tmp_path_factory.mktemp("shards")
    pictures = write_pictures(root / "pictures", (6, 3, 7))
    torch.manual_seed(0)
    tokenizer = toy_masked_generator().tokenizer.module
    make_tokens(pictures, root / "tokens", tokenizer)
    make_tokens(pictures, root / "tokens_text", tokenizer, frozen_text_encoder())
    return root


def data(train: Path, val: Path | None = None) -> ShardDataModule:
    def stream(folder: Path, *, shuffle: bool) -> partial[ShardStream]:
        transform = ImageTransform(SIZE)
        settings = {"transform": transform, "batch_size": 4, "seed": 7, "shuffle": shuffle}
        return partial(ShardStream, folder / "*.tar", **settings)

    sets = {} if val is None else {"val": stream(val, shuffle=False)}
    return ShardDataModule(train=stream(train, shuffle=True), val=sets)


def trained(folder: Path, **options: object) -> MaskedARGenerator:
    # plain steps: Adam would make whole ones of gradients that are rounding alone
    steps = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    generator = toy_generator(scale=None)
    module = toy_masked_generator(generator=generator, optimizer=steps, **options)
    toy_trainer(5).fit(module, datamodule=data(folder))
    return module


@pytest.mark.parametrize("with_text", [False, True])
def test_training_from_tokens_equals_training_from_pictures(shards: Path, with_text: bool) -> None:
    """Up to the rounding of residuals to 16 bits: bit-equal where both are rounded."""
    frozen = {"text_encoder": frozen_text_encoder()} if with_text else {}
    stored = trained(shards / ("tokens_text" if with_text else "tokens"), **frozen).network
    exact = trained(shards / "pictures", **frozen).network.state_dict()
    rounded = trained(shards / "pictures", cache_tokens=True, **frozen).network.state_dict()
    for name, tensor in stored.state_dict().items():
        torch.testing.assert_close(tensor, exact[name], rtol=0, atol=1e-5, msg=name)
        atol = 1e-6 if with_text else 0.0
        torch.testing.assert_close(tensor, rounded[name], rtol=0, atol=atol, msg=name)


def test_stored_text_is_used_in_place_of_the_encoder(shards: Path) -> None:
    module = toy_masked_generator(text_encoder=frozen_text_encoder())
    module.frozen_text.module.forward = None  # from now on only the shards can answer
    trainer = toy_trainer(2, limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(module, datamodule=data(shards / "tokens_text", shards / "tokens_text"))
    right, shuffled = (trainer.callback_metrics[f"val/token{s}"] for s in ("", "_shuffled"))
    assert right != shuffled


def test_tokens_of_another_tokenizer_are_refused_by_name_before_the_first_step(
    shards: Path, tmp_path: Path
) -> None:
    trainer = toy_trainer(1)
    trainer.fit(toy_stage(2), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    module = toy_masked_generator(tokenizer_from=tmp_path / "other.ckpt")
    before = weights(module)
    match = r"tokens were made by the tokenizer toy\.ckpt .* has .*other\.ckpt \(TokenizerStage2, "
    with pytest.raises(CheckpointError, match=match):
        toy_trainer(1).fit(module, datamodule=data(shards / "tokens"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(module).items())


def test_tokens_that_only_validate_are_checked_too(shards: Path) -> None:
    torch.manual_seed(9)
    module = toy_masked_generator(tokenizer=toy_tokenizer(), tokenizer_from=None)
    next(module.tokenizer.module.encoder.parameters()).data += 1
    with pytest.raises(CheckpointError, match="toy.ckpt"):
        toy_trainer(1).fit(module, datamodule=data(shards / "pictures", shards / "tokens"))


@pytest.mark.parametrize("unknown", ["train", "val"])
def test_tokens_without_a_manifest_are_refused(shards: Path, tmp_path: Path, unknown: str) -> None:
    """Of which a stopped precompute leaves some; nothing tells what made them."""
    copy = tmp_path / "unfinished"
    shutil.copytree(shards / "tokens", copy)
    (copy / "manifest.json").unlink()
    train, val = (copy if unknown == split else shards / "tokens" for split in ("train", "val"))
    trainer = toy_trainer(2, limit_val_batches=1.0, val_check_interval=1)
    match = f"set '{unknown}' is of token shards without a manifest: finish --exp=data/precompute"
    with pytest.raises(CheckpointError, match=match):
        trainer.fit(toy_masked_generator(), datamodule=data(train, val))
    assert trainer.global_step == (unknown == "val")


def test_tokens_of_another_resolution_are_refused(shards: Path) -> None:
    with pytest.raises(CheckpointError, match="32 px images, this run's are of 64 px"):
        toy_trainer(1).fit(toy_masked_generator(size=64), datamodule=data(shards / "tokens"))


def test_a_trained_text_encoder_refuses_stored_text(shards: Path) -> None:
    with pytest.raises(ValueError, match="ByteT5TextEncoder is trained with the generator"):
        toy_trainer(1).fit(toy_masked_generator(), datamodule=data(shards / "tokens_text"))


@pytest.mark.slow
def test_gfid_wants_images_to_compare_with(shards: Path) -> None:
    tokens, pictures = shards / "tokens", shards / "pictures"
    trainer = toy_trainer(1, limit_val_batches=1.0, val_check_interval=1)
    with pytest.raises(
        ValueError, match="tokens holds tokens: give the set 'val' shards of images"
    ):
        trainer.fit(toy_masked_generator(fid_images=8), datamodule=data(tokens, tokens))
    trainer = toy_trainer(1, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(toy_masked_generator(fid_images=8), datamodule=data(tokens, pictures))
    assert any(name.startswith("val/gfid_") for name in trainer.callback_metrics)


def test_sets_with_the_same_keys_have_tokens_of_their_own() -> None:
    module = toy_masked_generator(cache_tokens=True)
    module._trainer = trainer = toy_trainer(1)
    image = torch.stack([ToyImages(2)[index]["image"] for index in range(2)])
    batch = {"key": ["a", "b"], "caption": ["", ""], "image": image}
    trainer.training = True
    module.on_after_batch_transfer(dict(batch), 0)
    trainer.validating = True
    found = module.on_after_batch_transfer(batch | {"image": -image}, 0)
    assert torch.equal(found["ids"], module.tokenizer.encode(-image).ids)


class ValidatedOn(ToyData):
    def __init__(self, count: int, batch_size: int):
        super().__init__()
        self.validated = ToyImages(count, offset=100), batch_size

    def val_dataloader(self) -> list[ToyLoader]:
        return [ToyLoader(*self.validated)]


def test_an_image_alone_in_its_batch_gets_the_caption_of_the_one_before() -> None:
    module = toy_masked_generator()
    trainer = toy_trainer(4, limit_val_batches=1.0, val_check_interval=4)
    trainer.fit(module, datamodule=ValidatedOn(4, batch_size=1))
    right, shuffled = (trainer.callback_metrics[f"val/token{s}"] for s in ("", "_shuffled"))
    assert right != shuffled


@pytest.mark.slow
def test_no_more_pictures_are_drawn_than_asked_for_and_each_seed_once() -> None:
    module, drawn = toy_masked_generator(fid_images=5), []
    sample = module.sample

    def spy(text, text_mask, *, seeds):
        drawn.append(list(seeds))
        return sample(text, text_mask, seeds=seeds)

    module.sample = spy
    trainer = toy_trainer(1, limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, datamodule=ValidatedOn(9, batch_size=4))
    assert drawn == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dim": 16}, "16 wide, .* text_dim=8"), ({"max_tokens": 24}, "24 tokens .* text_tokens=16")],
)
def test_captions_that_do_not_fit_the_transformer_are_refused(changes: dict, message: str) -> None:
    encoder = ByteT5TextEncoder(**{"dim": 8, "layers": 1, "heads": 2, "max_tokens": 16} | changes)
    with pytest.raises(ValueError, match=f"ByteT5TextEncoder gives .*{message}"):
        toy_masked_generator(text_encoder=encoder)


def test_a_sampler_that_the_head_cannot_follow_is_refused_before_any_step() -> None:
    with pytest.raises(ValueError, match="residual_steps 2000 is above the head's 1000"):
        toy_masked_generator(sampler=SamplerSettings(residual_steps=2000))
    codes_alone = SamplerSettings(residual_steps=2000, residual_refinement=False)
    assert toy_masked_generator(sampler=codes_alone).sampler == codes_alone
