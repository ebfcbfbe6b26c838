"""Fine-tuning by command: adapters, decoder, merged folders; resolutions and shapes of pictures."""

import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from PIL import Image, ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcar.data.batches import in_unit_range
from dcar.data.loader import ShardLoader
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import CheckpointError
from dcar.models.checkpoints import Model, load_model, load_tokenizer, save_model
from dcar.models.draws import Draws
from dcar.models.fingerprint import fingerprint
from experiments.components import build
from experiments.config import load_config
from experiments.fine_tune import find_base, start_from_base, start_with_new_head
from experiments.run import RunOptions, main
from experiments.train import build_trainer
from tests.toys import (
    ROOT,
    SIZE,
    ToyData,
    model_config,
    stage_checkpoint,
    toy_masked_generator,
    toy_model,
    toy_trainer,
)

STYLE = "blob"  # one of the embedded pictures' six


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights."""
    folder = tmp_path_factory.mktemp("base")
    save_model(toy_model(), folder)
    return folder


def extract(split: str, into: Path, *, limit: int | None = None, style: str = STYLE) -> list[Path]:
    """The embedded pictures of one style, with captions beside them: a user's own folder."""
    pictures: list[Path] = []
    for shard in sorted((ROOT / "assets/emoji").glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(f"{style}/")]
            tar.extractall(into, members=members, filter="data")
    pictures = sorted(into.rglob("*.webp"))
    for path in pictures[limit:] if limit else []:
        path.unlink()
        path.with_suffix(".txt").unlink()
    return pictures[:limit]


def shards_of(folder: Path, out: Path, *settings: str) -> Path:
    assert main(["--exp=data/build", "source=folder", f"in={folder}", f"out={out}", *settings]) == 0
    return out


@torch.no_grad()
def validation_losses(model: Model, shards: Path) -> dict[str, float]:
    """Means over the set `val`, with the captions that belong to the pictures."""
    stream = ShardStream(
        shards / "folder-val-*.tar",
        transform=ImageTransform(size=model.size),
        batch_size=32,
        seed=0,
        shuffle=False,
    )
    totals, count = dict.fromkeys(("token", "residual"), 0.0), 0
    for index, batch in enumerate(ShardLoader(stream)):
        latents = model.tokenizer.encode(in_unit_range(batch)["image"])
        text, mask = model.text_encoder(batch["caption"])
        terms = model.generator.losses(
            latents.ids, latents.residual, text, mask, Draws(index), caption_drop=0.0
        )
        for name in totals:
            totals[name] += float(terms[name]) * len(text)
        count += len(text)
    return {name: total / count for name, total in totals.items()}


def on_black(pictures: list[Path]) -> None:
    """The drawings in a look that the base has not seen, with a caption that says so."""
    for path in pictures:
        with Image.open(path) as drawing:
            night = Image.new("RGB", drawing.size, "black")
            night.paste(drawing, mask=drawing.convert("RGBA").getchannel("A"))
        night.save(path)
        words = path.with_suffix(".txt")
        words.write_text(words.read_text().replace(f"{STYLE} style", "night style"))


@pytest.mark.slow
def test_adapters_learn_a_style_and_its_held_out_pictures_gain(tmp_path: Path) -> None:
    few = ["tokenizer_from=null", "max_steps=40", "val_every=40", "module.fid_images=0"]
    few += ["batch_size=8", "learning_rate=3e-3", f"outputs={tmp_path}"]
    assert main(["--exp=smoke/pretrain_256", *few]) == 0
    for split, limit in (("train", 300), ("val", 60)):
        on_black(extract(split, tmp_path / "pictures" / split, limit=limit))
    data = shards_of(tmp_path / "pictures", tmp_path / "shards", "processes=1")
    more = ["data=shards", f"data_root={data}", "data.num_workers=0", "max_steps=120"]
    more += ["val_every=120", "learning_rate=5e-3", "batch_size=8", f"outputs={tmp_path}"]
    assert main(["--exp=smoke/lora", "init_from=smoke/pretrain_256", *more]) == 0
    before = validation_losses(find_base("smoke/pretrain_256", str(tmp_path)), data)
    after = validation_losses(load_model(tmp_path / "smoke/lora/model"), data)
    assert after["token"] < 0.97 * before["token"]
    assert sum(after.values()) < sum(before.values())


@pytest.mark.parametrize("exp", ["generator", "residual_head", "lora", "decoder", "tokenizer"])
def test_a_base_that_is_not_there_is_named_by_its_setting(exp: str, tmp_path: Path, capsys) -> None:
    command = [f"--exp=finetune/{exp}", "init_from=nowhere", "data=emoji", f"outputs={tmp_path}"]
    assert main(command) == 2
    assert "init_from=nowhere is no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_all_weights_of_a_model_go_on_from_where_they_are(base: Path, tmp_path: Path) -> None:
    run = ["--exp=finetune/generator", "data=emoji", "data.num_workers=0", "batch_size=4"]
    run += ["max_steps=2", "warmup_steps=1", "val_every=2", "+trainer.limit_val_batches=1"]
    run.append("--ckpt=new")
    before, prints = load_model(base), []
    for rate, start in ((0, base), (1e-3, base), (0, "finetune/generator")):
        more = [f"learning_rate={rate}", f"init_from={start}", f"outputs={tmp_path}"]
        more += ["output_dir=${outputs}/again"] if start != base else []
        assert main([*run, *more]) == 0
        folder = tmp_path / ("again" if start != base else "finetune/generator")
        after = load_model(folder / "model")
        assert fingerprint(after.tokenizer) == fingerprint(before.tokenizer)
        assert after.sampler == before.sampler and after.size == before.size
        prints.append((fingerprint(after.generator), fingerprint(after.text_encoder)))
    kept, moved, again = prints
    assert kept == (fingerprint(before.generator), fingerprint(before.text_encoder))
    assert moved[0] != kept[0] and moved[1] != kept[1]
    assert again == moved  # from the checkpoint that the second left


@pytest.mark.slow
@pytest.mark.parametrize(("head", "has_one"), [("diffusion", True), ("flow", False)])
def test_a_finished_generator_gets_a_new_residual_head(
    head: str, has_one: bool, tmp_path: Path
) -> None:
    """Told the codes, of a width of its own; of the sampler's settings those of the head are new.

    Stopped and gone on with, it is the head of one that was not stopped.
    """
    base = toy_model()
    base.config["sampler"] |= {"residual_refinement": has_one, "residual_clip": 1.5}
    if not has_one:
        base.generator.residual_head = None
        base.config["generator"]["residual_head"] = {"_target_": "types.NoneType"}
    save_model(base, tmp_path / "base")
    run = ["--exp=finetune/residual_head", f"init_from={tmp_path}/base", "data=emoji"]
    run += ["batch_size=4", "data.num_workers=0", "warmup_steps=1", "val_every=2"]
    run += [f"generator/residual_head={head}", "residual_width=24", "residual_depth=1"]
    run += ["module.schedule.total_steps=2", "module.scale_batches=1", "sampler.residual_steps=1"]
    run += ["+trainer.limit_val_batches=1"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main([*run, "max_steps=2", f"outputs={straight}"]) == 0
    assert main([*run, "max_steps=1", f"outputs={stopped}"]) == 0
    assert main([*run, "max_steps=2", f"outputs={stopped}", "--ckpt=auto"]) == 0
    folder = "finetune/residual_head/model"
    assert same_files(straight / folder, stopped / folder)
    before, after = load_model(tmp_path / "base"), load_model(straight / folder)
    new = after.generator.residual_head
    assert type(new).__name__ == {"diffusion": "ResidualHead", "flow": "FlowResidualHead"}[head]
    assert new.denoiser.input.out_features == 24 and new.num_codes == before.tokenizer.num_codes
    assert bool((new.denoiser.output.weight != 0).any()) and new.scale.isfinite()
    assert fingerprint(after.generator.transformer) == fingerprint(before.generator.transformer)
    assert fingerprint(after.text_encoder) == fingerprint(before.text_encoder)
    assert fingerprint(after.tokenizer) == fingerprint(before.tokenizer)
    own = {"residual_refinement": True, "residual_clip": None, "residual_steps": 1}
    own["residual_condition"] = "extra_forward"
    assert after.sampler == replace(before.sampler, **own)
    metrics = json.loads((straight / folder).with_name("metrics.json").read_text())["metrics"]
    assert -10 < metrics["val/explained"] < 1


def contents(folder: Path) -> dict[str, Any]:
    """Files to the byte; config.json without the lineage, which is of one run at one time."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "config.json" in files:
        config = json.loads(files["config.json"])
        files["config.json"] = {key: value for key, value in config.items() if key != "lineage"}
    return files


def same_files(one: Path, two: Path) -> bool:
    return contents(one) == contents(two)


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly_and_leaves_adapter_and_merged_model(
    base: Path, tmp_path: Path
) -> None:
    run = ["--exp=smoke/lora", f"init_from={base}", "module.schedule.total_steps=6"]
    straight, stopped = tmp_path / "straight/smoke/lora", tmp_path / "stopped/smoke/lora"
    assert main([*run, f"outputs={tmp_path}/straight"]) == 0
    assert main([*run, f"outputs={tmp_path}/stopped", "max_steps=3"]) == 0
    assert main([*run, f"outputs={tmp_path}/stopped", "--ckpt=auto"]) == 0
    for folder in ("model", "adapter"):
        assert same_files(straight / folder, stopped / folder), folder
    merge = [f"init_from={base}", f"adapter={straight}/adapter", f"out={tmp_path}/merged"]
    assert main(["--exp=finetune/merge", *merge]) == 0
    assert same_files(straight / "model", tmp_path / "merged")
    before, after = load_model(base), load_model(tmp_path / "merged")
    assert fingerprint(before.generator) != fingerprint(after.generator)
    for part in ("tokenizer", "text_encoder"):
        assert fingerprint(getattr(before, part)) == fingerprint(getattr(after, part))
    facts = json.loads((straight / "metrics.json").read_text())
    assert facts["trained_parameters"] < 10_000 and "val/token" in facts["metrics"]


@pytest.mark.slow
def test_adapters_of_another_base_are_refused_by_both_commands(
    base: Path, tmp_path: Path, capsys
) -> None:
    run = ["--exp=smoke/lora", f"outputs={tmp_path}", "val_every=2", "warmup_steps=1"]
    assert main([*run, f"init_from={base}", "max_steps=2"]) == 0
    other = toy_model()
    other.generator.transformer.output.bias.data.add_(1e-3)
    save_model(other, tmp_path / "other")
    assert main([*run, f"init_from={tmp_path}/other", "max_steps=4", "--ckpt=auto"]) == 2
    message = f"belongs to the base {base}"
    assert message in capsys.readouterr().err
    adapter = [f"adapter={tmp_path}/smoke/lora/adapter", f"out={tmp_path}/merged"]
    assert main(["--exp=finetune/merge", f"init_from={tmp_path}/other", *adapter]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_without_peft_the_command_names_the_extra(base: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["--exp=smoke/lora", f"init_from={base}", f"outputs={tmp_path}"]) == 2
    assert "pip install 'dcar-lightning[lora]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generator", "residual_head", "lora", "decoder", "tokenizer"])
def test_switches_of_memory_and_speed_are_the_run_s_own(task: str, base: Path) -> None:
    """The base was saved without them."""
    switches = ["checkpoint_activations=true", "compile=aot_eager"]
    given = [f"init_from={base}", "train_urls=x", "val_urls=x", f"size={SIZE}"]
    config = load_config(f"finetune/{task}", [*given, *switches])
    if task in ("generator", "residual_head"):
        complete = {"generator": start_from_base, "residual_head": start_with_new_head}[task]
        complete(config)
    module = build(config.module)
    network = module.network if task in ("decoder", "tokenizer") else module.generator
    switched = [part.checkpoint_activations for part in network.modules() if has_switch(part)]
    assert switched and all(switched) and module.backend == "aot_eager"


def has_switch(module: torch.nn.Module) -> bool:
    return hasattr(module, "checkpoint_activations")


def test_a_base_is_found_by_folder_run_and_experiment(base: Path, tmp_path: Path) -> None:
    expected = fingerprint(load_model(base).generator)
    save_model(toy_model(), tmp_path / "a/b/model")
    for reference in (str(base), str(tmp_path / "a/b"), "a/b"):
        assert fingerprint(find_base(reference, str(tmp_path)).generator) == expected
    with pytest.raises(CheckpointError, match="a/c"):
        find_base("a/c", str(tmp_path))


@pytest.mark.slow
def test_a_base_is_found_in_a_run_that_has_only_checkpoints_so_far(tmp_path: Path) -> None:
    tokenizer = stage_checkpoint(2, tmp_path / "stage.ckpt")
    module = toy_masked_generator(tokenizer_from=tokenizer)
    module.plain_config = model_config()
    trainer = toy_trainer(1)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a/b/checkpoints/last.ckpt")
    for reference in ("a/b", str(tmp_path / "a/b/checkpoints/last.ckpt")):
        found = find_base(reference, str(tmp_path))
        assert fingerprint(found.generator) == fingerprint(module.generator)
        assert fingerprint(found.tokenizer) == fingerprint(load_tokenizer(tokenizer)[0])


@pytest.mark.slow
def test_weights_of_256_px_start_512_px_whole_at_the_paper_s_size() -> None:
    with torch.device("meta"):
        coarse, fine = (
            build(load_config(f"generator/{name}", ["data_root=x"]).generator)
            for name in ("pretrain_256", "finetune_512")
        )
    loaded = fine.load_state_dict(coarse.state_dict(), strict=True, assign=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert set(dict(fine.named_parameters())) <= set(coarse.state_dict())  # none is left as it was


@pytest.mark.slow
def test_from_scratch_costs_what_the_paper_says_beside_the_two_resolutions() -> None:
    def cost(name: str, batch: int) -> float:
        """In images of 256 px: an image of 512 px has four times the tokens."""
        config = load_config(f"generator/{name}", ["data_root=x"])
        return config.max_steps * batch * (config.size / 256) ** 2

    two = cost("pretrain_256", 2048) + cost("finetune_512", 1024)
    assert cost("scratch_512", 1024) / two == pytest.approx(1440 / 760, rel=0.01)
    assert load_config("generator/scratch_512", ["data_root=x"]).module.init_from is None


class Shapes(Callback):
    """Notes the grids that are trained and validated on."""

    def __init__(self) -> None:
        self.train: list[tuple[int, ...]] = []
        self.val: set[tuple[int, ...]] = set()

    def on_train_batch_end(self, trainer: Any, module: Any, _: Any, batch: Any, *args: Any) -> None:
        self.train.append(tuple(batch["ids"].shape[1:]))

    def on_validation_batch_end(
        self, trainer: Any, module: Any, _: Any, batch: Any, *args: Any
    ) -> None:
        self.val.add(tuple(batch["ids"].shape[1:]))


def crop_to_shapes(pictures: list[Path]) -> None:
    """Every third picture wide, every third tall."""
    for number, path in enumerate(pictures):
        size = ((128, 128), (128, 100), (70, 128))[number % 3]
        with Image.open(path) as picture:
            ImageOps.fit(picture.convert("RGB"), size).save(path)


@pytest.mark.slow
def test_one_run_trains_on_grids_of_several_shapes(tmp_path: Path) -> None:
    for split, limit in (("train", 90), ("val", 12)):
        crop_to_shapes(extract(split, tmp_path / "pictures" / split, limit=limit))
    data = shards_of(tmp_path / "pictures", tmp_path / "shards", "processes=1", "prefix=journeydb")
    options = [f"data_root={data}", f"outputs={tmp_path}", "max_steps=12", "val_every=6"]
    config = load_config("smoke/buckets", [*options, "tokenizer_from=null", "init_from=null"])
    module, shapes = build(config.module), Shapes()
    trainer = build_trainer(config, module, RunOptions())
    trainer.callbacks.append(shapes)  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in module.network.state_dict().items()}
    trainer.fit(module, datamodule=build(config.data))
    assert {(8, 8), (7, 9), (11, 6)} <= set(shapes.train) and len(shapes.train) == 12
    assert shapes.val == {(8, 8)}
    moved = sum(not torch.equal(t, before[n]) for n, t in module.network.state_dict().items())
    assert moved > 0.9 * len(before)
    assert all(torch.isfinite(t).all() for t in module.network.state_dict().values())
    assert torch.isfinite(trainer.callback_metrics["val/token"])
    assert "val/gfid_mobilenetv2" in trainer.callback_metrics
    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard")).Reload()
    assert len(events.Images("val/samples")) == 2
