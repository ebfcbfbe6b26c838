"""Captions to embeddings and a mask: a frozen T5, or a small byte-level T5 trained with the model.

B captions, L text length, E width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from dcar.models.precision import without_autocast, without_half

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# ByT5 (arXiv 2105.13626): bytes follow three special tokens in the vocabulary
PADDING, END, FIRST_BYTE, BYTE_VOCABULARY = 0, 1, 3, 384
VOCABULARY_PADDING = 128  # T5 models round their vocabulary up to a multiple of this
HASH_BASE, HASH_PRIME = 257, 2_147_483_647  # products of both stay below 2^63
LENGTH_STEP = 8  # batches are padded to a multiple of this, so that few shapes occur


def _padded_length(longest: int, max_tokens: int) -> int:
    return min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_tokens)


def byte_ids(captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """UTF-8 bytes as ByT5 ids (B, L), each caption ended by one end token, and the mask (B, L).

    L is the longest caption rounded up to a multiple of 8, at most max_tokens; longer ones are cut.
    Text that spells a special token stays text.
    """
    encoded = [text.encode("utf-8", errors="replace")[: max_tokens - 1] for text in captions]
    lengths = torch.tensor([len(text) for text in encoded])[:, None]  # (B, 1), without the end
    columns = _padded_length(int(lengths.max()) + 1, max_tokens)
    padded = bytearray(b"".join(text.ljust(columns, b"\0") for text in encoded))
    ids = torch.frombuffer(padded, dtype=torch.uint8).view(len(encoded), columns).long()
    position = torch.arange(columns)
    ids = torch.where(position < lengths, ids + FIRST_BYTE, PADDING)
    return torch.where(position == lengths, END, ids), position <= lengths


def word_starts(ids: Tensor) -> Tensor:
    """Where a word begins in byte ids (B, L): bool, by the rule of SpaceByte (arXiv 2404.14408).

    At a byte that is neither letter, digit nor the continuation of a character, if one of those is
    before it: spaces and commas open the word that follows them, and a character of more than one
    byte is a word. The end token is a word too.
    """
    byte = ids - FIRST_BYTE
    lower = byte | 0x20  # a capital's small letter
    inside = ((lower >= ord("a")) & (lower <= ord("z"))) | ((byte >= 0x80) & (byte < 0xC0))
    inside = inside | ((byte >= ord("0")) & (byte <= ord("9")))
    after_inside = F.pad(inside[:, :-1], (1, 0))
    return (~inside & after_inside) | (ids == END)


def _word_of_byte(ids: Tensor) -> Tensor:
    """(B, L), from 0 on; whatever the first byte is, it is in word 0."""
    return F.pad(word_starts(ids)[:, 1:].cumsum(1), (1, 0))


def _most_words(ids: Tensor, mask: Tensor) -> int:
    return int(_word_of_byte(ids).masked_fill(~mask, 0).max()) + 1


class NgramEmbedding(nn.Module):
    """Adds to each byte what the n bytes that end there spell (arXiv 2412.09871, section 3.2.1).

    Each n-gram is hashed to one of `codes` rows of its length's own table: a word is known at its
    last byte, where bytes alone would have to be put together by attention first. std: of the sum
    over all lengths, at first.
    """

    powers: Tensor

    def __init__(self, *, lengths: Sequence[int], codes: int, dim: int, std: float = 1.0):
        super().__init__()
        if any(length < 2 for length in lengths) or codes < 1:
            raise ValueError(f"n-gram lengths {list(lengths)} must be 2 or more, codes {codes} > 0")
        self.lengths, self.codes = tuple(lengths), codes
        self.table = nn.Embedding(codes * len(self.lengths), dim)
        nn.init.normal_(self.table.weight, std=std * len(self.lengths) ** -0.5)
        powers = [pow(HASH_BASE, power, HASH_PRIME) for power in range(max(self.lengths))]
        self.register_buffer("powers", torch.tensor(powers), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        hashes = [self._hash(ids, length) for length in self.lengths]
        rows = [row + self.codes * n for n, row in enumerate(hashes)]
        return self.table(torch.stack(rows)).sum(0)  # (B, L, E)

    def _hash(self, ids: Tensor, length: int) -> Tensor:
        """Of the `length` bytes that end at each, in [0, codes): (B, L)."""
        padded = F.pad(ids, (length - 1, 0), value=END)  # (B, L + n - 1)
        grams = padded.unfold(1, length, 1)  # (B, L, n)
        return (grams * self.powers[:length]).sum(2) % HASH_PRIME % self.codes


class ByteT5TextEncoder(nn.Module):
    """A small T5 encoder over bytes: no vocabulary file, trained together with the generator.

    `encoder(captions)` gives embeddings (B, L, dim) and the mask (B, L) bool, True = a real token,
    where L <= max_tokens follows the longest caption of the batch; padding is not attended to, so
    that L changes nothing. With `ngrams`, lengths in bytes, embeddings of the n-grams that end at
    a byte are added to its own, `ngram_codes` rows a length: a short training learns words sooner.
    With `pool_words` the embeddings of a word are added up before T5 sees them (`word_starts`): a
    token is a word, and captions are several times shorter. `embedding_std` is what bytes and
    n-grams start with; above T5's 1 words stay apart until attention has learned to mix them.
    Raises ValueError if dim is not a multiple of heads, and without captions.
    """

    trainable = True

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        max_tokens: int,
        feed_forward: int | None = None,
        ngrams: Sequence[int] = (),
        ngram_codes: int = 4096,
        pool_words: bool = False,
        embedding_std: float = 1.0,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if max_tokens < 2:
            raise ValueError(f"max_tokens {max_tokens} is below 2: one byte and the end")
        self.dim, self.max_tokens, self.pool_words = dim, max_tokens, pool_words
        # the stack alone: its parent holds the embedding under two names, which safetensors refuses
        self.model = T5EncoderModel(
            T5Config(
                vocab_size=BYTE_VOCABULARY,
                d_model=dim,
                d_kv=dim // heads,
                d_ff=feed_forward or 4 * dim,
                num_layers=layers,
                num_heads=heads,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=PADDING,
                eos_token_id=END,
                is_encoder_decoder=False,
                use_cache=False,
            )
        ).encoder
        with torch.no_grad():
            self.model.embed_tokens.weight.mul_(embedding_std)  # T5 starts at 1
        self.words: NgramEmbedding | None = None
        if ngrams:
            self.words = NgramEmbedding(
                lengths=ngrams, codes=ngram_codes, dim=dim, std=embedding_std
            )

    @property
    def most_tokens(self) -> int:
        """The largest L: with `pool_words` that of letters with spaces between them."""
        if not self.pool_words:
            return self.max_tokens
        return _padded_length((self.max_tokens - 1) // 2 + 2, self.max_tokens)

    def cuts(self, caption: str) -> bool:
        """Whether the end of the caption lies beyond `max_tokens`, so that it is not read."""
        return len(caption.encode("utf-8", errors="replace")) >= self.max_tokens

    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        _check_captions(captions)
        ids, mask = byte_ids(captions, self.max_tokens)
        words = _most_words(ids, mask) if self.pool_words else 0  # here: a GPU would be waited for
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        with without_half(ids):  # T5's feed-forward layers leave the range of fp16
            embedded = self.model.embed_tokens(ids)  # (B, L, E)
            if self.words is not None:
                embedded = embedded + self.words(ids)
            if self.pool_words:
                embedded, mask = self._pool_words(embedded, ids, mask, words)
            hidden = self.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return hidden, mask

    def _pool_words(
        self, embedded: Tensor, ids: Tensor, mask: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Bytes (B, L, E) and mask (B, L) to words (B, W, E) and (B, W): sums over root of length.

        A product of matrices, since sums over indices have no fixed order on a GPU. most: words of
        the caption that has most.
        """
        word = _word_of_byte(ids)
        counts = word.masked_fill(~mask, 0).amax(1) + 1  # (B,)
        columns = _padded_length(most, self.max_tokens)
        column = torch.arange(columns, device=ids.device)
        members = (word[:, None] == column[:, None]) & mask[:, None]  # (B, W, L)
        weights = members / members.sum(2, keepdim=True).clamp(min=1).sqrt()
        return weights.to(embedded) @ embedded, column < counts[:, None]


class T5TextEncoder(nn.Module):
    """A pretrained T5 encoder, frozen: captions to embeddings (B, L, dim) and the mask (B, L) bool.

    `name` is a hub name (the paper's: google-t5/t5-base) or a local folder. With
    `attend_to_padding`, as in the authors' code, T5 sees no mask and every batch padded to
    max_tokens (300); without it, to the longest caption, which changes the embeddings. L is that of
    the longest caption, rounded up, either way. `dtype` is
    "float32" or "bfloat16": T5 overflows in float16, and autocast is off inside.

    Raises ValueError for another dtype, a tokenizer that is not the model's, or without captions;
    FileNotFoundError if name has no model.
    """

    trainable = False

    def __init__(
        self,
        name: str,
        *,
        max_tokens: int = 300,
        dtype: str = "float32",
        attend_to_padding: bool = True,
        local_files_only: bool = False,
    ):
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is neither 'float32' nor 'bfloat16' (T5 overflows)")
        self.max_tokens, self.attend_to_padding = max_tokens, attend_to_padding
        self.tokenizer = _load(AutoTokenizer, name, local_files_only=local_files_only)
        self.model = _load(
            T5EncoderModel, name, local_files_only=local_files_only, dtype=DTYPES[dtype]
        )
        self.dim: int = self.model.config.d_model
        self._check_vocabulary(name)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "T5TextEncoder":
        """Stays in evaluation mode: T5's dropout must not come on with the generator's training."""
        return super().train(False)

    def cuts(self, caption: str) -> bool:
        """Whether the end of the caption lies beyond `max_tokens`, so that it is not read."""
        return len(self.tokenizer(caption, verbose=False)["input_ids"]) > self.max_tokens

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        _check_captions(captions)
        ids, mask = self._tokenize(captions)
        longest = _padded_length(int(mask.sum(1).max()), self.max_tokens)  # here: no GPU waits
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        seen = None if self.attend_to_padding else mask
        with without_autocast(ids):
            hidden = self.model(input_ids=ids, attention_mask=seen).last_hidden_state
        return hidden[:, :longest], mask[:, :longest]  # whatever it saw: the rest is padding

    def _check_vocabulary(self, name: str) -> None:
        """Without tokenizer files transformers makes one that maps every word to "unknown"."""
        known, rows = len(self.tokenizer), self.model.config.vocab_size
        if not rows - VOCABULARY_PADDING < known <= rows:
            raise ValueError(
                f"the tokenizer at {name!r} has {known} tokens, the model {rows}: files are missing"
            )

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            list(captions),
            padding="max_length" if self.attend_to_padding else "longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"].bool()


def _check_captions(captions: Sequence[str]) -> None:
    if isinstance(captions, str) or len(captions) == 0:
        raise ValueError("captions must be a list of at least one string")


def _load(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:  # ValueError: an empty folder given for a tokenizer
        raise FileNotFoundError(
            f"no T5 model at {name!r}: give a folder with its files, or a hub name within reach"
        ) from error
