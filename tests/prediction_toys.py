"""Pictures in shards, a tokenizer's checkpoint and a tiny captioner, for tests of predictions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from dcar.data.cache import ShardCache
from dcar.data.shards import write_manifest, write_shards
from dcar.data.transforms import ImageTransform
from dcar.lit.precompute import ImageDecoder, TokenPredictor, describe_tokens
from dcar.lit.shard_reader import ShardReading, find_sources
from dcar.lit.shard_writer import Progress, ShardPredictionWriter
from dcar.models.tokenizer import HybridTokenizer
from tests.toys import SIZE, ToyData, tokenizer_config, toy_stage, toy_trainer

UNEVEN = (5, 2, 7, 3)  # samples per shard
Row = dict[str, bytes | str]


def picture(number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Smooth random colours, (width, height), a function of the number alone."""
    pixels = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def row(number: int) -> Row:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return {
        "__key__": f"toys/{number:03d}",
        "png": buffer.getvalue(),
        "txt": f"picture {number}".encode(),
    }


def write_pictures(
    folder: Path,
    sizes: Sequence[int] = UNEVEN,
    *,
    changed: Mapping[int, Row] | None = None,
    split: str = "train",
) -> Path:
    """Shards `<split>-<n>-000000.tar` with a manifest; `changed` replaces members by number."""
    entries, first = [], 0
    for shard, size in enumerate(sizes):
        rows = [
            row(number) | (changed or {}).get(number, {}) for number in range(first, first + size)
        ]
        entries += write_shards(rows, folder, f"{split}-{shard}", size)
        first += size
    write_manifest(folder, {split: entries})
    return folder


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """All that a run has left in its output folder, by name: shards, records, manifest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tokenizer_checkpoint(path: Path, stage: int = 2, **options: Any) -> Path:
    """A toy tokenizer after two steps of a stage, as a run of experiments leaves it."""
    module = toy_stage(stage, **options)
    module.plain_config = {"tokenizer": tokenizer_config()}
    trainer = toy_trainer(2)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(path)
    return path


def make_tokens(
    pictures: Path, out: Path, tokenizer: HybridTokenizer, text_encoder: Any = None
) -> Path:
    """Shards of tokens for shards of pictures, each picture cut to a square from its centre."""
    facts = describe_tokens(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        size=SIZE,
        checkpoint="toy.ckpt",
        module="TokenizerStage2",
    )
    sources = find_sources(pictures / "*.tar")
    progress = Progress(str(out), facts, sources=sources)
    data = ShardReading(
        sources,
        decode=ImageDecoder(ImageTransform(SIZE), captioned=True),
        finished=progress.finished,
        batch_size=4,
        num_workers=0,
        cache=ShardCache(out / "cache"),
    )
    writer = ShardPredictionWriter(progress, max_bad=0.0)
    trainer = toy_trainer(-1, callbacks=[writer])
    predictor = TokenPredictor(tokenizer=tokenizer, text_encoder=text_encoder)
    trainer.predict(predictor, datamodule=data, return_predictions=False)
    return out


SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")
CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _letters() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, "<global-img>", *map(chr, range(32, 127))]
    tokens = models.WordLevel(
        {letter: number for number, letter in enumerate(vocabulary)}, unk_token="?"
    )
    tokenizer = Tokenizer(tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[*SPECIAL[3:], "<global-img>"],
    )


def write_captioner(folder: Path, *, chat: bool = True) -> Path:
    """A random Idefics3 of 20,000 parameters whose pictures take from 62 tokens up, by shape.

    Its processor is one of those that work without torchvision.
    """
    torch.manual_seed(0)
    tokenizer = _letters()
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    processor = Idefics3Processor(
        pictures, tokenizer, image_seq_len=1, chat_template=CHAT if chat else None
    )
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "intermediate_size": 32}
    config = Idefics3Config(
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
        vision_config={**small, "intermediate_size": 16, "image_size": 16, "patch_size": 8},
        text_config={**small, **special, **text, "initializer_range": 0.5},
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
