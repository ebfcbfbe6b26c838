"""Pictures to captions of several lengths, as shards that go beside those of the pictures."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule
from PIL import Image

from dcar.data.images import read_image
from dcar.data.members import Raw
from dcar.data.samples import decoding, image_bytes
from dcar.models.captioner import Captioner, Prompt

NO_CAPTION = "empty caption"


class PictureDecoder:
    """Raw samples to `key` and `picture`, upright RGB; words are not looked at.

    max_side: longer pictures are shrunk to it: many models take time by the pixel.
    """

    def __init__(self, *, max_side: int):
        if max_side < 1:
            raise ValueError(f"max_side={max_side} must be at least 1")
        self.max_side = max_side

    def __call__(self, raw: Raw) -> dict[str, Any]:
        data = image_bytes(raw)
        with decoding():
            picture = read_image(data)
        picture.thumbnail((self.max_side, self.max_side), Image.Resampling.BICUBIC)
        return {"key": str(raw["__key__"]), "picture": picture}


class CaptionPredictor(LightningModule):
    """Batches of pictures to raw samples: `json` {"captions": {name: text}} and `txt`, the first.

    prompts: by name, in the order of preference; each gives one caption. A picture whose first
    caption is empty gives no sample. Draws, where the captioner makes any, depend on keys alone.
    """

    def __init__(self, *, captioner: Captioner, prompts: Mapping[str, Prompt]):
        super().__init__()
        if not prompts:
            raise ValueError("prompts is empty: name at least one, such as short")
        self.captioner, self.prompts = captioner, dict(prompts)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Raw]:
        if not batch["key"]:
            return []
        seed = zlib.crc32("\n".join(batch["key"]).encode())
        columns = [
            self.captioner(batch["picture"], prompt, seed=seed) for prompt in self.prompts.values()
        ]
        samples: list[Raw] = []
        for key, *texts in zip(batch["key"], *columns, strict=True):
            if texts[0]:
                captions = {
                    name: text for name, text in zip(self.prompts, texts, strict=True) if text
                }
                data = json.dumps({"captions": captions}, ensure_ascii=False)
                samples.append({"__key__": key, "json": data.encode(), "txt": texts[0].encode()})
        return samples
