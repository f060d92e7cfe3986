"""From conversations and documents to rows of tokens: every id and label worked out by hand, or read back as text."""

import copy
import itertools
import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from consilium.data.causal import Packed, encode_language, rendered
from consilium.data.encode import Encoded, encode
from consilium.data.task import Split, Task
from consilium.errors import ConfigError, DataError

END = 1
CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Writes a line break behind the last end mark, as many templates do."""


def user(text, **more):
    return [{"role": "user", "content": text, **more}]


def split(*pairs):
    """Pairs of a prompt and an answer; a prompt of None makes a document of the answer."""
    return Split([json.dumps(user(p)) if p is not None else "" for p, _ in pairs], [a for _, a in pairs])


def templated(template):
    made = copy.deepcopy(tiny.tokenizer())
    made.chat_template = template
    return made


def ids(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def numbers(sources, targets):
    """An `Encoded` of ready-made ids, padded with 0."""
    return Encoded(sources, targets, [""] * len(targets), "causal", 0)


# --- conversations ----------------------------------------------------------------------------------------------------


def test_without_a_template_a_conversation_is_written_plainly():
    said = [
        {"role": "system", "content": "Be kind."},
        *user("Hello"),
        {"role": "assistant", "content": "Hi"},
        *user("?"),
    ]
    assert rendered(said, "yes", tiny.tokenizer()) == (
        "### System:\nBe kind.\n\n### User:\nHello\n\n### Assistant:\nHi\n\n### User:\n?\n\n### Assistant:\n",
        "yes",
    )


def test_a_chat_template_writes_it_otherwise():
    assert rendered(user("Hello"), "yes", templated(TEMPLATE)) == ("user: Hello</s>\nassistant: ", "yes</s>\n")


def test_where_the_template_begins_an_answer_otherwise_than_it_ends_it_the_bare_answer_is_taken():
    """It opens a thought before the answer, and leaves it out of the finished conversation."""
    thinking = templated(TEMPLATE.replace("assistant: {%", "assistant: (thinks) {%"))
    assert rendered(user("Hello"), "yes", thinking) == ("user: Hello</s>\nassistant: (thinks) ", "yes")


def test_what_a_template_refuses_is_one_line():
    strict = templated("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x")
    with pytest.raises(DataError, match="refuses a conversation of system, user: no system here"):
        rendered([{"role": "system", "content": "s"}, *user("u")], "a", strict)


@pytest.mark.parametrize(
    "said", [[*user("u"), {"role": "tool", "content": "42"}], user("u", tool_calls=[{"name": "f"}])]
)
def test_tools_need_a_template(said):
    with pytest.raises(DataError, match="uses tools, and the tokenizer has no chat template"):
        rendered(said, "a", tiny.tokenizer())
    assert rendered(said, "a", templated(TEMPLATE))[1] == "a</s>\n"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_loss_is_on_the_answer_and_one_end_mark(template):
    tokenizer = templated(template)
    data = encode_language(split(("some old house", "a cat"), ("here", "very near")), tokenizer, "examples", 99, 99)
    assert data.cut == 0 and data.way == "causal"
    batch = data.batch([0, 1], CPU)
    for row, (prompt, answer) in enumerate([("some old house", "a cat"), ("here", "very near")]):
        predicted = batch["labels"][row] != -100
        assert batch["labels"][row][predicted].tolist() == [*ids(answer), END]
        read = batch["input_ids"][row][batch["attention_mask"][row].bool() & ~predicted]
        assert read.tolist() == ids(rendered(user(prompt), answer, tokenizer)[0])


def test_a_long_prompt_keeps_its_end_a_long_answer_its_beginning_and_both_are_counted():
    """A cut answer has no end mark; three examples are cut, one of them twice."""
    long, short = "old house near house", "cat"
    pairs = [(long, short), (short, long), (long, long), (short, short)]
    whole = encode_language(split(*pairs), tiny.tokenizer(), "examples", 999, 999)
    S, T = len(whole.sources[1]), len(whole.targets[0])
    assert len(whole.sources[0]) > S and len(whole.targets[1]) > T
    data = encode_language(split(*pairs), tiny.tokenizer(), "examples", S, T)
    assert data.cut == 3
    assert data.sources == [source[-S:] for source in whole.sources]
    assert data.targets == [target[:T] for target in whole.targets]
    assert [target[-1] == END for target in data.targets] == [True, False, False, True]


def test_the_mark_at_the_beginning_is_kept():
    """A tokenizer that begins every text with <unk> (2): at the head of a cut prompt and of a document."""
    begins = copy.deepcopy(tiny.tokenizer())
    begins.bos_token = "<unk>"
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    data = encode_language(split(("old house near", "cat")), begins, "examples", 5, 9)
    prompt = ids("### User:\nold house near\n\n### Assistant:\n")
    assert data.sources == [[2, *prompt[-4:]]] and data.cut == 1
    assert encode_language(split((None, "cat")), begins, "documents", 9, 9).targets == [[2, *ids("cat"), END]]


# --- documents --------------------------------------------------------------------------------------------------------


def test_documents_one_a_row():
    """All tokens are targets; the second document is cut to S + T = 3 tokens."""
    short, long = ids("cat")[:1], ids("old house near house")
    data = encode_language(
        split((None, tiny.tokenizer().decode(short)), (None, "old house near house")),
        tiny.tokenizer(),
        "documents",
        1,
        2,
    )
    assert data.targets == [[*short, END], long[:3]] and data.sources == [[], []] and data.cut == 1


def test_blocks_lose_no_token():
    """Documents of a and b tokens and two end marks in rows of three; the last row is what is left."""
    first, second = ids("old house near"), ids("a cat again")
    stream = [*first, END, *second, END]
    data = encode_language(split((None, "old house near"), (None, "a cat again")), tiny.tokenizer(), "blocks", 1, 2)
    assert list(itertools.chain(*data.targets)) == (stream[:-1] if len(stream) % 3 == 1 else stream)
    assert {len(row) for row in data.targets[:-1]} == {3} and data.cut == 0
    assert torch.equal(data.batch([0], CPU)["labels"], data.batch([0], CPU)["input_ids"])


def test_a_last_block_of_one_token_has_nothing_to_predict():
    tokens = ids("old house near")
    width = len(tokens)  # and the end mark is one too many
    data = encode_language(split((None, "old house near")), tiny.tokenizer(), "blocks", width - 2, 2)
    assert data.targets == [tokens]


@pytest.mark.parametrize(("prompt", "rows"), [("p", "blocks"), ("p", "documents"), (None, "examples")])
def test_rows_that_the_data_has_not(prompt, rows):
    with pytest.raises(ConfigError, match=f"fit.rows is '{rows}', which .* has not; allowed are .*packed"):
        encode_language(split((prompt, "a")), tiny.tokenizer(), rows, 9, 9)


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packing_by_hand():
    """Sizes 5 4 3 2 into rows of 7. Longest first: 5 opens row 0 (2 left), 4 row 1 (3 left), 3 fits best into row 1,
    2 into row 0. No example predicts the first token of the next, and each begins at position 0."""
    data = numbers([[11, 12], [21], [], [41]], [[13, 14, 15], [22, 23, 24], [31, 32, 33], [42]])
    packed = Packed.of(data, 7)
    assert packed.groups == [[0, 3], [1, 2]] and len(packed) == 2
    batch = {key: value.tolist() for key, value in packed.batch([0, 1], CPU).items()}
    assert batch == {
        "input_ids": [[11, 12, 13, 14, 15, 41, 42], [21, 22, 23, 24, 31, 32, 33]],
        "attention_mask": [[1] * 7] * 2,
        "labels": [[-100, -100, 13, 14, 15, -100, 42], [-100, 22, 23, 24, -100, 32, 33]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]],
    }


def test_padding_of_a_packed_row():
    packed = Packed.of(numbers([[5], [6]], [[7, 8], [9, 9, 9]]), 4)
    batch = {key: value.tolist() for key, value in packed.batch([0, 1], CPU).items()}
    assert batch["input_ids"] == [[6, 9, 9, 9], [5, 7, 8, 0]] and batch["attention_mask"][1] == [1, 1, 1, 0]
    assert batch["labels"][1] == [-100, 7, 8, -100] and batch["position_ids"][1] == [0, 1, 2, 0]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_every_example_is_in_one_row_and_no_row_is_too_long(sizes):
    """And no two rows could be one, as best fit, longest first, promises of all but the fullest."""
    packed = Packed.of(numbers([[]] * len(sizes), [[3] * size for size in sizes]), 9)
    assert sorted(i for group in packed.groups for i in group) == list(range(len(sizes)))
    filled = sorted(sum(sizes[i] for i in group) for group in packed.groups)
    assert filled[-1] <= 9 and (len(filled) < 2 or filled[0] + filled[1] > 9)


def test_epochs_of_packed_rows_are_those_of_as_many_examples():
    packed = Packed.of(numbers([[]] * 6, [[3, 4]] * 6), 4)
    plain = numbers([[]] * 3, [[3, 4]] * 3)
    both = [list(data.epochs(2, 2, torch.Generator().manual_seed(5))) for data in (packed, plain)]
    assert both[0] == both[1] and sorted(itertools.chain(*both[0][:2])) == [0, 1, 2]


# --- what is cut, in the other ways -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "cut"), [("classification", 1), ("seq2seq", 2), ("causal", 2)])
def test_texts_that_are_too_long_are_counted(way, cut):
    """The second source is over the limit, the third target too: that counts where targets are texts. The first
    example has exactly as many tokens as allowed."""
    form = "classification" if way == "classification" else "text-to-text"
    task = Task("t", form, ("cat", "dog") if form == "classification" else (), "accuracy")
    targets = ["cat", "dog", "dog"] if form == "classification" else ["cat", "cat", "old house near"]
    S, T = len(ids("old house")), len(ids("cat")) + 1
    data = encode(Split(["old house", "old house near", "old"], targets), task, tiny.tokenizer(), way, S, T)
    assert data.cut == cut
    assert data.sources[1] == ids("old house near")[:S]
