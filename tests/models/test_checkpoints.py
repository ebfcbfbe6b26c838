"""Model folders and checkpoints: exact round trips, and nothing of a stranger's is executed."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dcar.errors import CheckpointError
from dcar.models.checkpoints import (
    Model,
    build,
    build_model,
    digest_path,
    known_digests,
    load_model,
    load_tokenizer,
    read_checkpoint,
    save_model,
)
from tests.prediction_toys import tokenizer_checkpoint
from tests.toys import SIZE, model_config, toy_model, toy_tokenizer


class Payload:
    """Pickles to a call that would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_model_folder_gives_back_the_same_weights(tmp_path: Path) -> None:
    model = toy_model()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    for part in ("tokenizer", "generator", "text_encoder"):
        ours, theirs = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert loaded.size == SIZE and loaded.sampler == model.sampler


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    save_model(toy_model(), tmp_path)
    loaded: Model = load_model(tmp_path)
    assert not any(p.requires_grad for p in loaded.generator.parameters())
    assert not any(m.training for m in loaded.tokenizer.modules())


def test_half_precision_halves_the_files_and_comes_back_wide(tmp_path: Path) -> None:
    model = toy_model()
    save_model(model, tmp_path / "whole")
    save_model(model, tmp_path / "half", dtype=torch.float16)
    files = [tmp_path / name / "generator.safetensors" for name in ("whole", "half")]
    sizes = [file.stat().st_size for file in files]
    assert 0.45 < sizes[1] / sizes[0] < 0.75  # of a toy the names are a good part
    loaded = load_model(tmp_path / "half").generator.state_dict()
    for name, tensor in model.generator.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        is_narrowed = tensor.is_floating_point() and tensor.ndim > 0
        wanted = tensor.half().to(tensor.dtype) if is_narrowed else tensor
        torch.testing.assert_close(loaded[name], wanted, rtol=0, atol=0, equal_nan=True)


def test_a_weight_that_half_precision_cannot_hold_is_named(tmp_path: Path) -> None:
    model = toy_model()
    with torch.no_grad():
        model.generator.transformer.output.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"generator\.transformer\.output\.bias .*float16: 1e"):
        save_model(model, tmp_path, dtype=torch.float16)


def test_a_config_that_names_another_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"os\.system"):
        build({"a": [{"_target_": "os.system", "command": f"touch {tmp_path}/x"}]})
    assert not (tmp_path / "x").exists()


def test_a_config_without_a_part_is_refused_by_name() -> None:
    config = model_config()
    del config["generator"]
    with pytest.raises(CheckpointError, match="generator"):
        build_model(config)


@pytest.mark.parametrize(
    ("part", "wrong", "named"),
    [
        ("generator", {"bogus": 1}, "generator: .*bogus"),
        ("generator", {"caption_drop": 7}, "generator: caption_drop"),
        ("sampler", {"steps": 0}, "sampler: steps"),
        ("sampler", None, "sampler is None"),
        ("tokenizer", None, "tokenizer is None"),
        ("size", "x", "size 'x' is no integer"),
    ],
)
def test_what_nothing_can_be_built_from_is_named(part: str, wrong: Any, named: str) -> None:
    config = model_config()
    config[part] = config[part] | wrong if isinstance(wrong, dict) else wrong
    with pytest.raises(CheckpointError, match=f"the model's config: {named}"):
        build_model(config)


def test_of_a_model_folder_the_tokenizer_alone_is_read(tmp_path: Path) -> None:
    model = toy_model()
    save_model(model, tmp_path)
    for name in ("generator.safetensors", "text_encoder.safetensors"):
        (tmp_path / name).unlink()
    config = json.loads((tmp_path / "config.json").read_text()) | {"text_encoder": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = model.tokenizer.state_dict()
    for into in (None, toy_tokenizer()):
        tokenizer, _ = load_tokenizer(tmp_path, into)
        assert into is None or tokenizer is into
        assert all(torch.equal(tensor, wanted[n]) for n, tensor in tokenizer.state_dict().items())
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_a_pickle_payload_is_not_executed(tmp_path: Path) -> None:
    torch.save({"dcar": Payload(tmp_path / "ran")}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(CheckpointError, match="refused|damaged"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_truncated_checkpoint_is_called_damaged(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"dcar": {}, "x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged|refused"):
        read_checkpoint(path)


def test_a_missing_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*a.ckpt"):
        read_checkpoint(tmp_path / "a.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="not written by a training run"):
        read_checkpoint(tmp_path / "b.ckpt")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_flipped_byte_is_found_where_a_digest_lies_beside_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"dcar": {}, "x": torch.zeros(1000)}, path)
    digest_path(path).write_text(f"{digest(path)}  a.ckpt\n")
    read_checkpoint(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for mapped in (False, True):
        with pytest.raises(CheckpointError, match="a.ckpt is damaged: its sha256 is not the one"):
            read_checkpoint(path, mapped=mapped)
    digest_path(path).unlink()
    assert read_checkpoint(path)["x"].count_nonzero() == 1  # nobody can know


def test_while_a_checkpoint_is_replaced_it_may_have_either_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"dcar": {}}, path)
    digest_path(path).write_text(f"{'0' * 64}  a.ckpt\n{digest(path)}  a.ckpt\n")
    assert known_digests(path) == ["0" * 64, digest(path)]
    assert read_checkpoint(path) == {"dcar": {}}


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch
) -> None:
    path, new = tmp_path / "a.ckpt", tmp_path / "new"
    torch.save({"dcar": {}, "x": 1}, path)
    torch.save({"dcar": {}, "x": 2}, new)
    digest_path(path).write_text(f"{digest(path)}  a.ckpt\n")

    hash_of = hashlib.file_digest

    def hashed_slowly(*arguments):
        found = hash_of(*arguments)
        if new.exists():  # a training commits its next checkpoint meanwhile
            digest_path(path).write_text(f"{digest(new)}  a.ckpt\n")
            new.replace(path)
        return found

    monkeypatch.setattr(hashlib, "file_digest", hashed_slowly)
    assert read_checkpoint(path)["x"] == 2


@pytest.mark.parametrize("text", ["", "not a digest\n", "0" * 63, "0" * 65, "\udcff"])
def test_a_file_of_digests_without_one_is_as_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"dcar": {}}, path)
    digest_path(path).write_text(text, errors="surrogateescape")
    assert known_digests(path) == [] and read_checkpoint(path) == {"dcar": {}}


def test_a_mapped_checkpoint_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"dcar": {}, "x": torch.arange(9)}, path)
    assert torch.equal(read_checkpoint(path, mapped=True)["x"], torch.arange(9))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"])
def test_malformed_safetensors_are_a_typed_error(content: bytes, tmp_path: Path) -> None:
    save_model(toy_model(), tmp_path)
    (tmp_path / "generator.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="generator.safetensors"):
        load_model(tmp_path)


def test_weights_of_another_architecture_are_refused_with_their_keys(tmp_path: Path) -> None:
    save_model(toy_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["generator"]["transformer"]["depth"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"blocks\.1\..* None here"):
        load_model(tmp_path)


@pytest.mark.parametrize("given", [False, True])
def test_a_tokenizer_is_built_as_its_checkpoint_says_or_takes_the_weights(
    tmp_path: Path, given: bool
) -> None:
    path = tokenizer_checkpoint(tmp_path / "stage2.ckpt")
    into = toy_tokenizer() if given else None
    tokenizer, module = load_tokenizer(path, into=into)
    assert module == "TokenizerStage2" and (tokenizer is into) == given
    for name, tensor in read_checkpoint(path)["network"].items():
        assert torch.equal(tokenizer.state_dict()[name], tensor), name


def test_a_stage_1_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    path = tokenizer_checkpoint(tmp_path / "a.ckpt", stage=1)
    with pytest.raises(CheckpointError, match="written by TokenizerStage1; tokens are those of"):
        load_tokenizer(path)


def test_the_scale_of_the_residual_is_exact_in_half_precision_too(tmp_path: Path) -> None:
    model = toy_model()
    model.generator.residual_head.set_scale(0.1057)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert load_model(tmp_path).generator.residual_head.scale == torch.tensor(0.1057)
