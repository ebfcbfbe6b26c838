from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from dcar.models.text_encoder import (
    ByteT5TextEncoder,
    NgramEmbedding,
    T5TextEncoder,
    byte_ids,
    word_starts,
)

REFERENCE = ByT5Tokenizer()


def byte_encoder() -> ByteT5TextEncoder:
    return ByteT5TextEncoder(dim=16, layers=2, heads=2, max_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small T5 on disk, over bytes, as `from_pretrained` expects it."""
    path = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.5
    )
    T5EncoderModel(config).save_pretrained(path)
    REFERENCE.save_pretrained(path)
    return str(path)


@given(captions=st.lists(st.text().filter(lambda text: "<" not in text), min_size=1, max_size=4))
@example(captions=["", "a red heart", "żółć 🍎", " spaced  out \n\t", "x" * 200])
def test_bytes_are_numbered_as_by_the_byt5_tokenizer(captions: list[str]) -> None:
    expected = REFERENCE(
        captions, padding="max_length", truncation=True, max_length=40, return_tensors="pt"
    )
    ids, mask = byte_ids(captions, 40)
    columns = ids.shape[1]
    assert torch.equal(ids, expected["input_ids"][:, :columns])
    assert torch.equal(mask, expected["attention_mask"][:, :columns].bool())
    assert not expected["attention_mask"][:, columns:].any()


def test_batches_are_only_as_long_as_their_longest_caption() -> None:
    assert byte_ids(["a" * 7, "b"], 24)[0].shape == (2, 8)
    assert byte_ids(["a" * 8, "b"], 24)[0].shape == (2, 16)
    assert byte_ids(["a" * 500], 21)[0].shape == (1, 21)


def test_text_that_spells_a_special_token_stays_text() -> None:
    ids, mask = byte_ids(["</s><pad>"], 24)
    assert ids[0, :9].tolist() == [byte + 3 for byte in b"</s><pad>"]
    assert mask.sum() == 10


def test_broken_unicode_is_encoded_all_the_same() -> None:
    assert byte_ids(["\ud800"], 24)[0][0, 0] == ord("?") + 3


def test_longer_neighbours_do_not_change_the_embedding_of_a_caption() -> None:
    encoder = byte_encoder()
    alone, mask = encoder(["a cat"])
    together, both = encoder(["a cat", "a very long story"])
    assert alone.shape == (1, 8, 16)
    assert together.shape == (2, 24, 16)
    assert mask.sum() == both[0].sum() == 6
    assert torch.allclose(alone[0, :6], together[0, :6], atol=1e-5)


def test_the_order_of_the_words_matters() -> None:
    first, second = byte_encoder()(["ab", "ba"])[0][:, :2]
    assert not torch.allclose(first, second.flip(0), atol=1e-3)


def test_an_empty_caption_is_its_end_token() -> None:
    hidden, mask = byte_encoder()(["", "x" * 1000])
    assert mask.sum(1).tolist() == [1, 24]
    assert hidden.isfinite().all()


def test_the_byte_encoder_is_trained_and_can_be_saved(tmp_path: Path) -> None:
    encoder, other = byte_encoder(), byte_encoder()
    encoder(["a cat"])[0].square().sum().backward()
    assert encoder.trainable
    assert all(weight.grad is not None for weight in encoder.parameters())
    save_file(encoder.state_dict(), tmp_path / "weights.safetensors")
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(["a cat"])[0], encoder(["a cat"])[0])


def test_a_pretrained_encoder_is_frozen_and_never_in_training_mode(folder: str) -> None:
    encoder = T5TextEncoder(folder, max_tokens=12, local_files_only=True)
    encoder.train()
    first, second = encoder(["a cat"])[0], encoder(["a cat"])[0]
    assert torch.equal(first, second)  # a dropout of one half would show
    assert not first.requires_grad
    assert not encoder.trainable
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert (encoder.dim, encoder.max_tokens) == (16, 12)


def test_by_default_padding_is_attended_to_and_of_fixed_length(folder: str) -> None:
    short, long = (T5TextEncoder(folder, max_tokens=length) for length in (12, 20))
    hidden, mask = short(["a cat", "a dog runs past us"])
    assert hidden.shape == (2, 12, 16)
    assert mask.sum(1).tolist() == [6, 12]
    assert not torch.allclose(hidden[0, :6], long(["a cat"])[0][0, :6], atol=1e-4)


def test_padding_that_no_caption_of_the_batch_needs_is_attended_to_and_not_returned(
    folder: str,
) -> None:
    encoder = T5TextEncoder(folder, max_tokens=20)
    hidden, mask = encoder(["a cat", "a dog"])
    assert hidden.shape == (2, 8, 16) and mask.shape == (2, 8)  # six tokens, rounded up
    ids = encoder.tokenizer(["a cat"], padding="max_length", max_length=20, return_tensors="pt")
    seen = encoder.model(input_ids=ids["input_ids"]).last_hidden_state[:, :8]
    assert torch.allclose(hidden[:1], seen, atol=1e-5)


def test_without_attention_to_padding_its_length_does_not_matter(folder: str) -> None:
    encoder = T5TextEncoder(folder, max_tokens=20, attend_to_padding=False)
    alone, _ = encoder(["a cat"])
    together, _ = encoder(["a cat", "a dog runs past us"])
    assert together.shape[1] > alone.shape[1]
    assert torch.allclose(alone[0, :6], together[0, :6], atol=1e-5)


def test_the_type_of_the_weights_holds_inside_autocast(folder: str) -> None:
    single, half = (T5TextEncoder(folder, max_tokens=12, dtype=d) for d in ("float32", "bfloat16"))
    expected = single(["a cat"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single(["a cat"])[0], expected)
    assert half(["a cat"])[0].dtype == torch.bfloat16


def test_float16_is_refused_because_t5_overflows(folder: str) -> None:
    with pytest.raises(ValueError, match="float16"):
        T5TextEncoder(folder, dtype="float16")


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path, folder: str) -> None:
    T5EncoderModel.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model 384: files are missing"):
        T5TextEncoder(str(tmp_path), local_files_only=True)


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no T5 model at") as caught:
        T5TextEncoder(str(tmp_path), local_files_only=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("captions", [[], "a cat"])
def test_captions_must_be_a_list_of_strings(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="captions"):
        byte_encoder()(captions)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="dim 10"):
        ByteT5TextEncoder(dim=10, layers=1, heads=3, max_tokens=24)
    with pytest.raises(ValueError, match="max_tokens 1"):
        ByteT5TextEncoder(dim=16, layers=1, heads=2, max_tokens=1)


def test_ngrams_tell_words_apart_at_their_last_byte_and_ignore_the_rest() -> None:
    words = NgramEmbedding(lengths=[3, 4], codes=512, dim=8)
    ids, _ = byte_ids(["red cat", "big cat", "red cab"], 16)
    embedded = words(ids)
    assert embedded.shape == (*ids.shape, 8)
    assert torch.equal(embedded[0, 6], embedded[1, 6])  # " cat" ends both
    assert not torch.equal(embedded[0, 6], embedded[2, 6])
    assert torch.equal(embedded[0, :6], embedded[2, :6])


def test_padding_changes_nothing_with_ngrams_either() -> None:
    encoder = ByteT5TextEncoder(dim=8, layers=1, heads=2, max_tokens=64, ngrams=[3], ngram_codes=64)
    alone, mask = encoder(["a cat"])
    together, _ = encoder(["a cat", "a very much longer caption than the other"])
    length = int(mask.sum())
    torch.testing.assert_close(alone[0, :length], together[0, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [{"lengths": [1]}, {"codes": 0}])
def test_impossible_ngrams_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="n-gram"):
        NgramEmbedding(**{"lengths": [3], "codes": 4, "dim": 2} | bad)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", [""]),
        ("a red heart, 3d style", ["a", " red", " heart", ", 3d", " style"]),
        ("  two\tspaces ", ["  two", "\tspaces", " "]),
        ("AZaz09", ["AZaz09"]),
        ("[@`{/:", ["[@`{/:"]),
        ("naïve 心臓", ["na", "ïve", " 心", "臓"]),
    ],
)
def test_words_begin_after_letters_digits_and_characters(caption: str, words: list[str]) -> None:
    ids, mask = byte_ids([caption], 64)
    starts = word_starts(ids)[0, : int(mask.sum())].tolist()
    starts[0] = True
    where = [place for place, is_start in enumerate(starts) if is_start]
    data = caption.encode()
    pieces = [data[one:two].decode() for one, two in zip(where, where[1:], strict=False)]
    assert (pieces or [""]) == words
    assert where[-1] == len(data)  # the end token


def word_encoder() -> ByteT5TextEncoder:
    return ByteT5TextEncoder(
        dim=16, layers=2, heads=2, max_tokens=64, ngrams=[3], ngram_codes=64, pool_words=True
    )


def test_with_pooled_words_a_token_is_a_word() -> None:
    hidden, mask = word_encoder()(["a red heart, 3d style", "a", ""])
    assert hidden.shape == (3, 8, 16)
    assert mask.sum(1).tolist() == [6, 2, 1]  # words and the end
    assert mask[:, 0].all() and hidden.isfinite().all()


def test_a_word_is_the_sum_of_its_bytes_over_the_root_of_its_length() -> None:
    encoder = word_encoder()
    seen: list[torch.Tensor] = []
    encoder.model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    encoder(["a cat", "an orange ca"])
    ids, _ = byte_ids(["a cat", "an orange ca"], 64)
    embedded = encoder.model.embed_tokens(ids) + encoder.words(ids)
    assert seen[0].shape == (2, 8, 16)
    torch.testing.assert_close(seen[0][0, 1], embedded[0, 1:5].sum(0) / 4**0.5)
    torch.testing.assert_close(seen[0][1, 1], embedded[1, 2:9].sum(0) / 7**0.5)
    assert not seen[0][0, 3:].any()  # nothing but "a", " cat" and the end


def test_longer_neighbours_do_not_change_pooled_words() -> None:
    encoder = word_encoder()
    alone, mask = encoder(["a cat"])
    together, both = encoder(["a cat", "a much longer caption than the other one it is with"])
    assert mask.sum() == both[0].sum() == 3
    assert together.shape[1] > alone.shape[1]
    torch.testing.assert_close(alone[0, :3], together[0, :3], rtol=1e-4, atol=1e-5)


def test_pooled_words_are_never_more_than_max_tokens() -> None:
    encoder = ByteT5TextEncoder(dim=8, layers=1, heads=2, max_tokens=21, pool_words=True)
    hidden, mask = encoder(["心" * 50 + " a" * 50, "é" * 400])
    assert hidden.shape[1] <= 21 and mask.sum(1).tolist() == [8, 11]


def test_pooled_words_train_every_weight() -> None:
    encoder = word_encoder()
    encoder(["a cat, flat style"])[0].square().sum().backward()
    assert all(weight.grad is not None for weight in encoder.parameters())


@pytest.mark.parametrize("pool_words", [False, True])
@pytest.mark.parametrize("max_tokens", [2, 3, 21, 64, 96])
def test_no_caption_has_more_tokens_than_most_tokens(pool_words: bool, max_tokens: int) -> None:
    encoder = ByteT5TextEncoder(
        dim=8, layers=1, heads=2, max_tokens=max_tokens, pool_words=pool_words
    )
    assert encoder(["a " * 100])[0].shape[1] == encoder.most_tokens <= max_tokens


def test_embeddings_start_with_the_spread_that_is_asked_for() -> None:
    encoder = ByteT5TextEncoder(
        dim=64, layers=1, heads=2, max_tokens=64, ngrams=[3, 4], embedding_std=3.0
    )
    ids, _ = byte_ids(["the quick brown fox jumps over the lazy dog"], 64)
    assert encoder.words is not None
    for embedded in (encoder.model.embed_tokens.weight, encoder.words(ids)):
        assert float(embedded.std()) == pytest.approx(3.0, rel=0.1)


def test_a_caption_is_known_to_be_cut(folder: str) -> None:
    """By what is read of it: only the words that count change the embeddings."""
    for encoder in (byte_encoder(), T5TextEncoder(folder, max_tokens=12)):
        room = next(n for n in range(1, 99) if encoder.cuts("a" * n)) - 1
        whole, longer = (encoder(["a" * (room - 1) + end])[0] for end in ("b", "c"))
        assert not torch.equal(whole, longer)
        cut, other = (encoder(["a" * room + end])[0] for end in ("b", "c"))
        assert torch.equal(cut, other) and encoder.cuts("a" * room + "b")
