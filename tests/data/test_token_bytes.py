"""How many bytes each token stands for: the sizes of a text's tokens add up to the text's, whatever the tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from consilium.data.encode import token_bytes

TEXTS = ["def f(x):\n\treturn x ** 2  # ä 漢字 \U0001f600\r\n", "naïve café", "a b c " * 5]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def like_llama() -> PreTrainedTokenizerFast:
    """Blanks are written as "▁", and what has no token of its own as bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    for piece in ["▁", "a", "b", "c", "n", "v", "e", "f", "d", "x", "r", "t", "u", "(", ")", ":", "*", "2", "#"]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, like_llama])
@pytest.mark.parametrize("text", TEXTS)
def test_the_sizes_add_up(make, text):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())


def test_special_tokens_stand_for_nothing():
    tokenizer = byte_level()
    assert int(token_bytes(tokenizer)[tokenizer.eos_token_id]) == 0


def test_continuations_of_words_have_no_marks():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert token_bytes(fast).tolist() == [0, 4, 3]
