"""What each tokenizer stage moves, which path it decodes, and that it resumes exactly."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from einops import rearrange
from lightning import Callback
from torch import Tensor

from dcar.errors import DataError
from dcar.lit.averaging import AverageWeights
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.models.checkpoints import Model
from dcar.models.discriminator import PatchDiscriminator
from dcar.models.draws import Draws
from dcar.models.fingerprint import fingerprint
from dcar.models.kmeans import kmeans
from dcar.models.losses import TokenizerCriterion
from dcar.models.noise import ImageNoise
from dcar.models.tokenizer import Latents
from tests.toys import (
    CODES,
    ToyData,
    ToyImages,
    collate,
    toy_model,
    toy_stage,
    toy_trainer,
    weights,
)

MOVES = {1: {"encoder", "decoder"}, 2: {"encoder", "quantizer", "decoder"}, 3: {"decoder"}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_moves_exactly_the_trainable_parts(stage: int) -> None:
    module = toy_stage(stage)
    before = weights(module)
    toy_trainer(2).fit(module, datamodule=ToyData())
    after = module.state_dict()
    moved = {k.split(".")[1] for k in after if not torch.equal(after[k], before[k])}
    assert moved == MOVES[stage]


@pytest.mark.parametrize(("stage", "share"), [(1, 0.0), (2, 1.0), (3, 0.5)])
def test_the_share_of_discrete_images_is_the_stage_s(stage: int, share: float) -> None:
    module = toy_stage(stage)
    module._trainer = toy_trainer(1)
    latents = module.network.encode(torch.rand(64, 3, 16, 16))
    hits = []
    for batch_idx in range(200):
        mixed = module._mix(latents, module.draws(batch_idx))
        hits.append((mixed == latents.discrete).flatten(1).all(1).float())
        either = (mixed == latents.discrete) | (mixed == latents.continuous)
        assert either.all()
    assert torch.cat(hits).mean().item() == pytest.approx(share, abs=0.02)


def test_one_coin_for_the_whole_batch_when_asked() -> None:
    module = toy_stage(3, per_image=False)
    module._trainer = toy_trainer(1)
    latents = module.network.encode(torch.rand(8, 3, 16, 16))
    shares = set()
    for batch_idx in range(20):
        mixed = module._mix(latents, module.draws(batch_idx))
        shares.add((mixed == latents.discrete).flatten(1).all(1).float().mean().item())
    assert shares == {0.0, 1.0}


def test_the_discriminator_joins_at_its_step() -> None:
    module = toy_stage(2, adversarial=True, discriminator_start=2)
    before = weights(module)
    toy_trainer(2).fit(module, datamodule=ToyData())
    names = [name for name in before if name.startswith("discriminator")]
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in names)
    module = toy_stage(2, adversarial=True, discriminator_start=2)
    toy_trainer(3).fit(module, datamodule=ToyData())
    assert any(not torch.equal(module.state_dict()[name], before[name]) for name in names)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_discriminator_s_step_tells_real_pictures_from_made_ones(norm: str) -> None:
    """Its own hinge loss alone moves it, and that by the pictures from before the step.

    Real and made pictures are not in one batch, whose norm would even out their difference.
    """
    module = toy_stage(
        2,
        adversarial=True,
        discriminator=PatchDiscriminator(width=16, layers=2, norm=norm),
        norm="ln2d",
        gradient_clip=None,
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )
    expected: list[Tensor] = []

    class ByHand(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            judge, image = pl_module.discriminator, batch["image"]
            recon = pl_module.network.decode(pl_module.network.encode(image).discrete).detach()
            loss = (1 - judge(image)).relu().mean() + (1 + judge(recon)).relu().mean()
            parameters = list(judge.parameters())
            gradients = torch.autograd.grad(loss / 2, parameters)
            pairs = zip(parameters, gradients, strict=True)
            expected.extend((p - 0.5 * gradient).detach() for p, gradient in pairs)

    toy_trainer(1, callbacks=[ByHand()]).fit(module, datamodule=ToyData())
    for mine, theirs in zip(expected, module.discriminator.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_the_codebook_starts_from_k_means_of_latents() -> None:
    still = partial(torch.optim.SGD, lr=0.0)
    module = toy_stage(2, kmeans_vectors=128, norm="ln2d", optimizer=still)
    toy_trainer(1, callbacks=[]).fit(module, datamodule=ToyData())
    assert bool(module.network.quantizer.initialized)
    batches = ToyData().preview_batches()
    latents = [module.network.encode(next(batches)["image"]).continuous]
    while sum(latent[:, 0].numel() for latent in latents) < 128:
        latents.append(module.network.encode(next(batches)["image"]).continuous)
    vectors = rearrange(torch.cat(latents), "b c h w -> (b h w) c").detach()
    codes = kmeans(vectors, CODES, iterations=20, seed=module.seed, spherical=True)
    torch.testing.assert_close(module.network.quantizer.codebook.detach(), codes)
    untouched = toy_stage(2)
    toy_trainer(1).fit(untouched, datamodule=ToyData())
    assert not bool(untouched.network.quantizer.initialized)


def test_validation_reports_both_paths_and_codebook_usage() -> None:
    module = toy_stage(3)
    trainer = toy_trainer(2, limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(module, datamodule=ToyData())
    metrics = trainer.callback_metrics
    for name in ("val/psnr_hybrid", "val/psnr_discrete", "val/lpips_hybrid", "val/ssim_discrete"):
        assert torch.isfinite(metrics[name]), name
    ids = torch.cat([module.network.encode(collate([s])["image"]).ids for s in _val()])
    usage = len(ids.unique()) / module.network.num_codes
    assert metrics["codebook/val_usage"].item() == pytest.approx(usage)


def _val() -> list[dict]:
    data = ToyImages(8, offset=100)
    return [data[index] for index in range(8)]


def test_a_checkpoint_holds_the_network_and_the_discriminator_alone(tmp_path: Path) -> None:
    trainer = toy_trainer(1)
    module = toy_stage(2, adversarial=True)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"network", "discriminator"}
    assert saved["dcar"]["module"] == "TokenizerStage2"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stopping_and_resuming_is_bit_equal(stage: int, tmp_path: Path) -> None:
    """5 straight against 3, mid-epoch, then 2: two optimizers, averages, k-means, revival."""

    def run(steps: int, ckpt: Path | None = None):
        module = toy_stage(stage, adversarial=True, revival_decay=0.9, kmeans_vectors=64)
        average = AverageWeights(decay=0.9)
        last = LastCheckpoint(folder=tmp_path / str(steps), every_steps=100)
        trainer = toy_trainer(steps, callbacks=[average, last])
        trainer.fit(module, datamodule=ToyData(count=16), ckpt_path=ckpt)
        return module, average, trainer

    straight, straight_average, straight_trainer = run(6)
    run(3)
    resumed, resumed_average, resumed_trainer = run(6, tmp_path / "3" / "last.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, tensor in straight_average.average.state_dict().items():
        assert torch.equal(tensor, resumed_average.average.state_dict()[name]), name
    for ours, theirs in zip(straight_trainer.optimizers, resumed_trainer.optimizers, strict=True):
        for key, state in ours.state_dict()["state"].items():
            assert torch.equal(state["exp_avg"], theirs.state_dict()["state"][key]["exp_avg"])


def test_tokens_are_no_pictures_to_train_a_tokenizer_on() -> None:
    with pytest.raises(DataError, match="a tokenizer trains on pictures"):
        toy_stage(1).on_after_batch_transfer({"ids": torch.zeros(1, 2, 2), "key": ["a"]}, 0)


class WithVariation(TokenizerCriterion):
    """One term more, as a user would add it; and a parameter, as some losses have."""

    def __init__(self, *, learns: bool):
        super().__init__(
            pixel="l1",
            pixel_weight=1.0,
            perceptual=None,
            perceptual_weight=0.0,
            codebook_weight=0.0,
            adversarial_weight=0.0,
        )
        self.weights["variation"] = 0.5
        self.log_variance = torch.nn.Parameter(torch.zeros(()), requires_grad=learns)

    def terms(self, recon, image, latents, fake_logits) -> dict[str, Tensor]:
        variation = (recon[..., 1:] - recon[..., :-1]).abs().mean()
        return super().terms(recon, image, latents, fake_logits) | {"variation": variation}


def test_a_term_of_one_s_own_is_weighed_and_one_that_would_learn_is_refused() -> None:
    module = toy_stage(1, criterion=WithVariation(learns=False))
    trainer = toy_trainer(1)
    trainer.fit(module, datamodule=ToyData())
    logged = trainer.callback_metrics
    expected = logged["train/l1"] + 0.5 * logged["train/variation"]
    torch.testing.assert_close(logged["train/loss"], expected)
    with pytest.raises(ValueError, match="would learn log_variance"):
        toy_stage(1, criterion=WithVariation(learns=True))


def steady_model() -> Model:
    """Its residuals depend on seed, codes and caption, and are not guided."""
    model = toy_model()
    settings = {"residual_guidance": 0.0, "residual_temperature": 0.0}
    return replace(model, sampler=replace(model.sampler, **settings))


def drawn_stage(captions: list[str]) -> tuple[Tensor, Latents]:
    """What stage 3 decodes of eight pictures with these captions, and their latents."""
    module = toy_stage(3, drawn_by=steady_model(), drawn_share=0.5)
    module._trainer = toy_trainer(1)
    torch.manual_seed(1)
    latents = module.network.encode(torch.rand(8, 3, 16, 16))
    return module.decoded(latents, {"caption": captions}, 0), latents


def test_a_share_of_a_batch_is_decoded_with_the_residual_that_the_model_draws() -> None:
    words = [f"toy {index}" for index in range(8)]
    mixed, latents = drawn_stage(words)
    either = (mixed == latents.discrete) | (mixed == latents.continuous)
    assert either[4:].all()
    generator, encoder = steady_model().generator.eval(), steady_model().text_encoder.eval()
    ids = latents.ids[:4]
    with torch.no_grad():
        hidden = generator.transformer(ids, *encoder(words[:4])).hidden
    draws = Draws(Random("0/0/0").getrandbits(63))  # of the module's first batch
    draws.rand(8)  # the coin between the paths
    noise = ImageNoise(draws.randint(2**31, 4).tolist())
    noise.rand(1, 2, ids[0].numel())  # the sampler's, of the one step
    head = generator.residual_head
    drawn = head.sample(hidden, noise=noise, ids=ids.flatten(1), temperature=0.0)
    expected = rearrange(drawn, "b (h w) c -> b c h w", h=ids.shape[1])
    torch.testing.assert_close((mixed - latents.discrete)[:4], expected)
    assert expected.std() > 1e-3
    others, _ = drawn_stage([words[0], "another", *words[2:]])
    changed = (others != mixed).flatten(1).any(1)
    assert changed.tolist() == [False, True, *[False] * 6]


def test_of_any_share_at_least_one_picture_of_a_batch_is_drawn() -> None:
    module = toy_stage(3, drawn_by=steady_model(), drawn_share=0.01)
    module._trainer = toy_trainer(1)
    latents = module.network.encode(torch.rand(8, 3, 16, 16))
    mixed = module.decoded(latents, {"caption": [f"toy {index}" for index in range(8)]}, 0)
    either = (mixed == latents.discrete) | (mixed == latents.continuous)
    assert either.flatten(1).all(1).tolist() == [False, *[True] * 7]


def test_a_decoder_learns_what_the_model_draws_and_the_model_stays() -> None:
    model = steady_model()
    before = fingerprint(model.generator)
    module = toy_stage(3, drawn_by=model, drawn_share=0.5)
    first = weights(module)
    toy_trainer(2).fit(module, datamodule=ToyData())
    assert fingerprint(model.generator) == before
    after = module.state_dict()
    assert after.keys() == first.keys()  # the model is in no checkpoint
    moved = {k.split(".")[1] for k in after if not torch.equal(after[k], first[k])}
    assert moved == {"decoder"}


def test_a_share_that_nothing_can_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="drawn_share 1.5 is not in"):
        toy_stage(3, drawn_by=toy_model(), drawn_share=1.5)
    with pytest.raises(ValueError, match="drawn_share 0.5 needs a model"):
        toy_stage(3, drawn_share=0.5)
    model = toy_model()
    silent = replace(model, sampler=replace(model.sampler, residual_refinement=False))
    with pytest.raises(ValueError, match="draws no residuals"):
        toy_stage(3, drawn_by=silent, drawn_share=0.5)
    module = toy_stage(3, drawn_by=model, drawn_share=0.5)
    module._trainer = toy_trainer(1)
    with pytest.raises(DataError, match="data.train.captioned=true"):
        module.decoded(module.network.encode(torch.rand(2, 3, 16, 16)), {}, 0)
