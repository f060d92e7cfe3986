"""Files of instructions, conversations and plain text: what is read, how it is dealt, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
from test_textfile import write

from consilium.data.language import LanguageData
from consilium.errors import ConfigError, DataError

ROWS = [
    {"ask": f"question {i}", "answer": f"answer {i}", "about": f"story {i}" if i % 2 else None, "site": f"s{i % 2}",
     "topic": f"t{i % 3}"}
    for i in range(40)
]  # fmt: skip
PAIR = {"prompt": "ask", "response": "answer"}
CHAT = [
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"first {i}"},
                  {"role": "assistant", "content": f"one {i}"}, {"role": "user", "content": "and then"},
                  {"role": "assistant", "content": f"two {i}"}]}
    for i in range(12)
]  # fmt: skip


def every(federation, split="train"):
    """(given, target, row) of all examples of a split."""
    for client in federation.clients.values():
        part = getattr(client, split)
        yield from zip(map(json.loads, part.texts), part.targets, map(int, part.rows), strict=True)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_prompts_and_responses(tmp_path, ending):
    """The context goes before the prompt, where there is one; whoever holds a row is said by the column."""
    data = LanguageData(write(tmp_path / f"rows{ending}", ROWS), **PAIR, context="about", client="site")
    federation = data.load(0)
    assert list(federation.clients) == ["s0", "s1"] and federation.source["rows"] == 40
    task = federation.clients["s0"].task
    assert (task.name, task.form, task.labels, task.metric) == ("answer", "language", (), "token_accuracy")
    assert task.model_form == data.form == "text-to-text"
    for given, target, row in every(federation):
        asked = f"story {row}\n\nquestion {row}" if row % 2 else f"question {row}"
        assert given == [{"role": "user", "content": asked}] and target == f"answer {row}"
    sizes = {name: len(split) for name, split in federation.clients["s0"].splits()}
    assert sizes == {"train": 16, "validation": 2, "test": 2}
    assert federation.fingerprint == LanguageData(data.path, **PAIR, context="about", client="site").load(0).fingerprint


def test_a_system_column(tmp_path):
    federation = LanguageData(write(tmp_path / "a.csv", ROWS), **PAIR, system="about", client="site").load(0)
    for given, _, row in every(federation):
        assert [turn["role"] for turn in given] == (["system", "user"] if row % 2 else ["user"])


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
def test_every_answer_of_a_conversation_is_an_example_in_the_same_split(tmp_path, ending):
    rows = [{"messages": json.dumps(row["messages"])} for row in CHAT] if ending == ".csv" else CHAT
    path = write(tmp_path / f"chat{ending}", rows)
    federation = LanguageData(path, messages="messages", clients=2).load(0)
    seen = Counter()
    for part in ("train", "validation", "test"):
        examples = list(every(federation, part))
        held = Counter(row for *_, row in examples)
        assert set(held.values()) == {2} and not held.keys() & seen.keys()
        seen |= held
        for given, target, row in examples:
            length = 2 if target == f"one {row}" else 4
            assert given == CHAT[row]["messages"][:length] and target == CHAT[row]["messages"][length]["content"]
    assert len(seen) == 12
    last = LanguageData(path, messages="messages", clients=2, turns="last").load(0)
    assert {target.split()[0] for _, target, _ in every(last)} == {"two"}


def test_calls_of_tools_are_read_but_not_trained(tmp_path):
    turns = [
        {"role": "user", "content": "6 * 7"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "times"}]},
        {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."},
    ]  # fmt: skip
    federation = LanguageData(write(tmp_path / "a.jsonl", [{"m": turns}] * 1 + [{"m": t["messages"]} for t in CHAT]),
                              messages="m", clients=1).load(0)  # fmt: skip
    found = [
        (given, t) for part in ("train", "validation", "test") for given, t, row in every(federation, part) if not row
    ]
    assert [target for _, target in found] == ["It is 42."]
    assert [turn["role"] for turn in found[0][0]] == ["user", "assistant", "tool"]


def test_plain_text_is_all_target(tmp_path):
    federation = LanguageData(write(tmp_path / "a.csv", ROWS), text="answer", clients=3).load(0)
    for client in federation.clients.values():
        assert set(client.train.texts) == {""} and client.train.targets[0].startswith("answer ")


def test_rows_are_dealt_by_kind(tmp_path):
    data = LanguageData(
        write(tmp_path / "a.csv", ROWS), **PAIR, partition="pathological", kind="topic", clients=3, kinds_per_client=1
    )
    for name, client in data.load(0).clients.items():
        kinds = {int(row) % 3 for _, split in client.splits() for row in split.rows}
        assert len(kinds) == 1, name


def chat(*turns):
    return [{"m": [{"role": role, "content": content} for role, content in turns]}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (chat(("user", "u"), ("boss", "b")), r"column 'm' line 1 turn 1 has role 'boss'; allowed are system, devel"),
        (
            chat(("user", "u"), ("assistant", " ")),
            r"left out: 1 empty message\(s\); .*without an answer of the assistant",
        ),
        (chat(("user", "u")), r"1 of 1 rows of 'm' without an answer of the assistant, first line 1"),
        (chat(("assistant", "a")), r"without an answer of the assistant"),
        (chat(("user", [{"type": "image_url"}])), r"line 1 turn 0 has a part of type 'image_url'; only texts are read"),
        ([{"m": "[{"}], r"column 'm' line 1 is no JSON: "),
        ([{"m": 3}], r"column 'm' line 1 holds a int; it must be a list of \{role, content\}"),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as caught:
        LanguageData(write(tmp_path / "a.jsonl", rows), messages="m").load(0)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read(tmp_path):
    rows = [{**row, "answer": None if i in (3, 5) else row["answer"]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "a.csv", rows)
    notes = LanguageData(path, **PAIR).load(0).notes
    assert "left out: 2 rows of 40 without a value of 'answer' (empty 2), first line 5" in notes
    assert "columns that are not used: about, site, topic" in notes
    with pytest.raises(DataError, match=r"no column 'asks' \(did you mean 'ask'\?\); it has ask \| answer"):
        LanguageData(path, prompt="asks", response="answer").load(0)
    with pytest.raises(ConfigError, match=r"name the columns: --data.prompt and .*; a.csv has ask \| answer \| about"):
        LanguageData(path).load(0)
    with pytest.raises(DataError, match="no client has enough of them"):
        LanguageData(write(tmp_path / "b.csv", ROWS[:2]), **PAIR, clients=1).load(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a"}, "data.response is empty; name the columns of both"),
        ({"response": "a"}, "data.prompt is empty"),
        ({"messages": "m", **PAIR}, "data.messages stands alone; leave data.prompt, data.response empty"),
        ({"text": "t", "system": "s"}, "data.text stands alone; leave data.system empty"),
        ({"text": "t", "metric": "rouge2"}, "plain text has none: use token_accuracy"),
        ({"metric": "accuracy"}, "data.metric is 'accuracy'; it must be one of token_accuracy, token_f1, rouge2"),
        ({"turns": "first"}, "data.turns is 'first'"),
        ({"partition": "dirichlet"}, "needs --data.kind"),
        ({"partition": "packages"}, "data.partition is 'packages'"),
        ({"validation": 0.0}, "validation is 0.0"), ({"clients": 0}, "clients is 0"), ({"alpha": 0.0}, "alpha is 0.0"),
        ({"task": "a b"}, "use 1 to 58 of letters"),
    ],
)  # fmt: skip
def test_settings_are_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        LanguageData(Path("a.csv"), **changes)


def one(tmp_path, rows, **columns):
    """The first example of 12 equal rows but for a number, which ends what the rows hold as "?"."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(rows).replace("?", str(i)) + "\n" for i in range(12)))
    federation = LanguageData(path, clients=1, **columns).load(0)
    split = next(iter(federation.clients.values())).train
    target, row = split.targets[0], split.rows[0]
    given = [(turn["role"], turn["content"].replace(row, "?")) for turn in json.loads(split.texts[0] or "[]")]
    return given, target.replace(row, "?"), federation


PUBLISHED = [
    ({"instruction": "Do ?", "input": "it", "output": " a\n"}, {"prompt": "instruction", "response": "output"},
     [("user", "Do ?\n\nit")], " a\n"),
    ({"instruction": "Do ?", "input": "", "output": "a"}, {"prompt": "instruction", "response": "output"},
     [("user", "Do ?")], "a"),
    ({"instruction": "Do ?", "context": "story", "response": "a", "category": "qa"},
     {"prompt": "instruction", "response": "response"}, [("user", "story\n\nDo ?")], "a"),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q ?"},
                        {"from": "gpt", "value": "a"}]},
     {"messages": "conversations"}, [("system", "s"), ("user", "q ?")], "a"),
    ({"messages": [{"role": "developer", "content": "d"},
                   {"role": "user", "content": [{"type": "text", "text": "q ?"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
     {"messages": "messages"}, [("system", "d"), ("user", "q ?")], "a"),
    ({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "q ?"},
                   {"role": "assistant", "content": "no", "weight": 0}, {"role": "user", "content": "and"},
                   {"role": "assistant", "content": "a"}]},
     {"messages": "messages"}, [("user", "q ?"), ("assistant", "no"), ("user", "and")], "a"),
    ({"prompt": [{"role": "user", "content": "q ?"}], "completion": [{"role": "assistant", "content": "a"}]},
     {"prompt": "prompt", "response": "completion"}, [("user", "q ?")], "a"),
    ({"prompt": "def f?(x):\n", "completion": "    y = x\n"}, {"prompt": "prompt", "response": "completion"},
     [("user", "def f?(x):\n")], "    y = x\n"),
    ({"question": "q ?", "context": "story", "answers": {"text": ["a"], "answer_start": [3]}},
     {"prompt": "question", "response": "answers"}, [("user", "story\n\nq ?")], "a"),
    ({"question": "q ?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
     {"prompt": "question", "response": "answerKey"}, [("user", "q ?\n\nA. x\nB. y")], "B. y"),
    ({"question": "q ?", "choices": ["x", "y"], "answer": 1}, {"prompt": "question", "response": "answer"},
     [("user", "q ?\n\nA. x\nB. y")], "B. y"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "given", "target"), PUBLISHED)
def test_published_formats_are_recognised_whole(tmp_path, row, columns, given, target):
    """Alpaca with and without input, Dolly, ShareGPT, OpenAI, TRL's pairs of messages, code, SQuAD, ARC, MMLU."""
    assert one(tmp_path, row, **columns)[:2] == (given, target)


def test_what_is_recognised_is_said_and_can_be_left_out(tmp_path):
    row, named = PUBLISHED[0][:2]
    federation = one(tmp_path, row | {"source": "web"}, **named)[2]
    assert "column 'input' belongs to 'instruction' and is used; --data.input none leaves it out" in federation.notes
    assert "columns that are not used: source" in federation.notes
    assert one(tmp_path, row, **named, input="none")[0] == [("user", "Do ?")]


def test_an_empty_message_is_left_out_and_counted(tmp_path):
    assert "left out: 12 empty message(s)" in one(tmp_path, PUBLISHED[5][0], messages="messages")[2].notes


def test_preference_pairs_are_refused_with_a_word(tmp_path):
    with pytest.raises(ConfigError, match="preferences are not trained on: name the chosen answers"):
        one(tmp_path, {"prompt": "q ?", "chosen": "a", "rejected": "b"})


def test_plain_text_keeps_every_character(tmp_path):
    assert one(tmp_path, {"text": "\t y = ? \n"}, text="text")[1] == "\t y = ? \n"
