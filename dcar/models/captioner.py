"""Pictures to captions by any image-text-to-text model of transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GREEDY = {"do_sample": False, "num_beams": 1}


@dataclass(frozen=True)
class Prompt:
    """What the model is asked about a picture, and the most tokens it may answer with."""

    text: str
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.text.strip() or self.max_new_tokens < 1:
            raise ValueError(
                f"a prompt needs words and at least one new token: {self.text!r}, "
                f"max_new_tokens={self.max_new_tokens}"
            )


def answers(output: Tensor, asked: Tensor) -> Tensor:
    """What was generated, (B, new): a decoder alone repeats the prompt (B, L) before it."""
    length = asked.shape[1]
    repeats = output.shape[1] >= length and bool((output[:, :length] == asked).all())
    return output[:, length:] if repeats else output


class Captioner(nn.Module):
    """`captioner(images, prompt)` gives one line of text for each picture, in evaluation mode.

    name: a hub name or a local folder; code that comes with a model is never run.
    dtype: of weights and pictures: float32, bfloat16 or float16.
    generation: arguments of transformers' `generate`; None takes the likeliest token each time.
    A model without a chat template gets the prompt's text as it stands, image token and all.

    Raises ValueError for another dtype; FileNotFoundError if name has no such model.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str = "bfloat16",
        generation: Mapping[str, Any] | None = None,
        local_files_only: bool = False,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.processor: Any  # transformers' own types of both know less than their classes do
        self.model: Any
        self.name, self.generation = name, dict(GREEDY if generation is None else generation)
        try:
            self.processor = AutoProcessor.from_pretrained(name, local_files_only=local_files_only)
            self.model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=DTYPES[dtype], local_files_only=local_files_only
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"no image-text-to-text model at {name!r}: give a folder with its files, or a hub "
                f"name within reach ({str(error).splitlines()[0]})"
            ) from error
        self.processor.tokenizer.padding_side = "left"  # answers begin where prompts end
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Sequence[Image], prompt: Prompt, *, seed: int = 0) -> list[str]:
        """seed: of the draws, where `generation` asks for any; the state of torch's own stays."""
        inputs = self._inputs(images, prompt.text).to(self.model.device, dtype=self.model.dtype)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = self.model.generate(
                **inputs, max_new_tokens=prompt.max_new_tokens, **self.generation
            )  # (B, L + new) or (B, new)
        texts = self.processor.batch_decode(
            answers(output, inputs["input_ids"]), skip_special_tokens=True
        )
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: Sequence[Image], text: str) -> Any:
        if not self.processor.chat_template:
            return self.processor(
                text=[text] * len(images), images=list(images), padding=True, return_tensors="pt"
            )
        asked = {"type": "text", "text": text}
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": image}, asked]}]
            for image in images
        ]
        return self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
