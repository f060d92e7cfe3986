"""Chat templates that do not end, or fill the memory, and one that does what it should."""

import copy
import os
import time

import pytest
import tiny

from consilium.data import template
from consilium.data.causal import rendered, renderings
from consilium.errors import DataError

SAID = [{"role": "user", "content": "a cat"}]
GOOD = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


def templated(text):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize(
    "text",
    [
        LOOPS,
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% if messages | length > 1 %}" + LOOPS + "{% endif %}x",
    ],
    ids=["loops", "recursion", "one operation", "a condition on the data"],
)
def test_a_template_without_an_end_is_ended(text, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    before = time.process_time()
    with pytest.raises(DataError, match=r"has not written a conversation of user(, assistant)? within 1 s of CPU time"):
        rendered(SAID, "yes", templated(text))
    assert time.process_time() - before < 1  # the work was done elsewhere
    assert rendered(SAID, "yes", templated(GOOD))[1] == "yes"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' * 10 ** 11 }}",
        "{{ '%099999999999d' % 1 }}",
        "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    ],
    ids=["times", "format", "doubling"],
)
def test_a_template_that_fills_the_memory_is_ended(text):
    with pytest.raises(DataError, match=r"needs more than 1\.1 GB for a conversation of user|refuses a conversation"):
        rendered(SAID, "yes", templated(text))


def test_a_template_that_writes_too_much_is_refused():
    with pytest.raises(DataError, match=r"writes 20,000,\d+ characters for a conversation of user; at most 16,777,216"):
        rendered(SAID, "yes", templated("{% for i in range(20000) %}{{ 'x' * 1000 }}{% endfor %}"))


def test_many_conversations_are_what_transformers_writes_and_the_process_serves_them_all():
    """More than fit in one request, with markup, line ends and characters of all planes; the process is one."""
    tokenizer = templated(GOOD)
    texts = [f"{i} <b>é\n\u2028\U0001f600 \ud7ff {{{{ x }}}}" for i in range(3 * template.AT_ONCE + 1)]
    pairs = [([{"role": "user", "content": text}], "so") for text in texts]
    first = rendered(*pairs[0], tokenizer)
    process = template._process._running.pid
    found = renderings(pairs, tokenizer)
    assert found[0] == first and template._process._running.pid == process
    assert [prompt for prompt, _ in found] == [
        tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) for said, _ in pairs
    ]
    assert {answer for _, answer in found} == {"so"}


def test_the_process_is_started_again_after_it_was_killed():
    rendered(SAID, "yes", templated(GOOD))
    os.kill(template._process._running.pid, 9)
    template._process._running.wait()
    assert rendered(SAID, "yes", templated(GOOD))[1] == "yes"
