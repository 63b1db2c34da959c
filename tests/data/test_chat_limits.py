"""A chat template without end, or with endless text, is one line after a moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from dtron.data import chat_limits
from dtron.data.chat_samples import samples_of
from dtron.data.chat_template import ChatTemplate
from tests.helpers.paths import ROOT
from tests.helpers.texts import one_line

TALK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
STEPS, VALUE, TEXT, BITS = "steps", "a value of more", "characters", "bits"
FORMAT, INPUT, TIME = "a format has a width", "has an input of more", "seconds"


def repeated(value: str, start: str = "'aa'", before: str = "") -> str:
    """Return a template that computes ``n.s`` from ``n.s`` again and again."""
    begin = "{% set n = namespace(s=" + start + ") %}{% for i in range(90) %}"
    return begin + before + "{% set n.s = " + value + " %}{% endfor %}{{ n.s }}"


FOR = "{% for i in range(100000) %}"
END = "{% endfor %}"
ENDLESS = {
    FOR + FOR + END + END: STEPS,
    FOR + "{% for j in range(100000) if j < 0 %}" + END + END: STEPS,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}": STEPS,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% block a %}{{ self.a() }}{% endblock %}": "recursion",
    "{% set work = 1 %}{% set environment = 1 %}" + FOR + FOR + END + END: STEPS,
    FOR + "{% set x = range(100000) | list %}" + END: TEXT,
    FOR + "{% set x = range(100000) | select('odd') | list %}" + END: STEPS,
    "{{ range(100000) | map('replace', '', 'y' * 1000) | sort }}": TEXT,
    "{{ range(100000) | groupby('x', default='y' * 1000) }}": VALUE,
    "{% set n = namespace(l='y' * 10000) %}{{ ([n] * 10000) | sort(attribute='l') }}": VALUE,
    "{{ 'a' * 10 ** 10 }}": VALUE,
    "{{ [0] * 10 ** 10 }}": VALUE,
    "{{ 2 ** (10 ** 9) }}": BITS,
    repeated("n.s * n.s", "3"): BITS,
    repeated("n.s ~ n.s"): VALUE,
    repeated("n.s + n.s"): VALUE,
    repeated("[n.s, n.s]"): VALUE,
    repeated("(n.s, n.s)"): VALUE,
    repeated("{1: n.s, 2: n.s}.values()"): VALUE,
    repeated("dict(a=n.s, b=n.s)"): VALUE,
    repeated("dict.fromkeys([1, 2], n.s)"): VALUE,
    repeated("n.s.replace('a', n.s)"): VALUE,
    repeated("n.s | replace('a', n.s)"): VALUE,
    repeated("n.s.join(n.s)"): VALUE,
    repeated("n.s | join(n.s)"): VALUE,
    repeated("'{0}{0}'.format(n.s)"): VALUE,
    repeated("'{a}{a}'.format_map({'a': n.s})"): VALUE,
    repeated("'%s%s' % (n.s, n.s)"): VALUE,
    repeated("'%s%s' | format(n.s, n.s)"): VALUE,
    repeated("n.s.translate({97: n.s})"): VALUE,
    repeated("x", before="{% set x %}{{ n.s }}{{ n.s }}{% endset %}"): VALUE,
    FOR + "x" * 60000 + END: VALUE,
    "{% set y %}" + FOR + "x" * 60000 + END + "{% endset %}": TEXT,
    "{% set s = 'a' * 10 ** 7 %}" + FOR + "{% set x = s[i:] %}" + END: TEXT,
    "{% set x = ['a' * 10 ** 6] %}{% set y %}" + FOR + "{{ x }}" + END + "{% endset %}": TEXT,
    "{{ 'a' | center(10 ** 10) }}": VALUE,
    "{{ 'a'.zfill(10 ** 10) }}": VALUE,
    "{{ '\t\t'.expandtabs(10 ** 7) }}": VALUE,
    "{{ ('a\n' * 10 ** 4) | indent('b' * 10 ** 4) }}": VALUE,
    "{{ [1] | batch(10 ** 10, 'x') | list }}": VALUE,
    "{{ [1] | slice(10 ** 9) | list }}": VALUE,
    "{{ 1 | round(10 ** 9, 'ceil') }}": VALUE,
    "{{ (1).to_bytes(10 ** 10, 'big') }}": VALUE,
    "{{ [1] | tojson(indent=10 ** 10) }}": VALUE,
    "{{ range(10000) | list | tojson(indent='x' * 10 ** 6) }}": VALUE,
    "{{ '{:9999999999}'.format(1) }}": FORMAT,
    "{{ '{:{}}'.format(1, 9999999999) }}": FORMAT,
    "{{ '%9999999999d' % 1 }}": FORMAT,
    "{{ '%*d' % (9999999999, 1) }}": FORMAT,
    "{{ '%.9999999999f' | format(1) }}": FORMAT,
    "{{ ('a' * 10 ** 7) | wordwrap(1) }}": INPUT,
    "{{ (('<!-- ' * 10 ** 6) | e).striptags() }}": INPUT,
    "{{ strftime_now('%c' * 10 ** 6) }}": INPUT,
    "{{ ([[1]] * 10 ** 5) | sum(start=[]) }}": VALUE,
    "{% set n = namespace(l=[1] * 10 ** 4) %}{{ ([n] * 10000) | sum('l', []) }}": VALUE,
    "{% set n = namespace(l='a' * 10 ** 7) %}{{ ([n] * 10000) | join(attribute='l') }}": VALUE,
    "{{ (('a' * 10 ** 6) | e).join(['x'] * 100000) }}": VALUE,
    "{{ 'a'.encode().replace('a'.encode(), ('b' * 10 ** 7).encode()) * 9 }}": VALUE,
    "{{ lipsum(n=10 ** 9) }}": "undefined",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "malformed",
    "{% for i in [1] %}" * 60 + END * 60: "malformed",
    "{% if a %}" + "{% elif a %}" * 8000 + "{% endif %}": "malformed",
    "x" * 300_000: "malformed",
}

ATTACKED = """
import json, resource, sys
from dtron.data import chat_limits
from dtron.data.chat_template import ChatTemplate
from dtron.errors import UserError

chat_limits.STEPS = 1 << 16
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
templates, talk = json.load(sys.stdin)
for template in templates:
    try:
        print("no error:", len(ChatTemplate({"default": template}).render(talk).text), flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def test_endless_templates_end():
    """In a process of its own: a template that gets past the limits takes all memory or time."""
    done = subprocess.run(
        [sys.executable, "-c", ATTACKED],
        input=json.dumps([list(ENDLESS), TALK]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
    )
    said = done.stdout.splitlines()
    assert len(said) == len(ENDLESS), (list(ENDLESS)[len(said)][:200], done.stderr[-2000:])
    for line, (template, part) in zip(said, ENDLESS.items(), strict=True):
        assert part in line and "the tokenizer's chat template" in line, (template[:200], line)


def test_the_time_is_limited(monkeypatch):
    monkeypatch.setattr(chat_limits, "SECONDS", 0.01)
    slow = "{% set s = 'a' * 10 ** 7 %}" + FOR + "{% if 'b' in s %}{% endif %}" + END
    one_line(lambda: ChatTemplate({"default": slow}).render(TALK), "0.01 seconds")


def test_each_conversation_has_the_whole_limit(monkeypatch):
    monkeypatch.setattr(chat_limits, "STEPS", 1000)
    template = ChatTemplate({"default": "{% for i in range(600) %}a{% endfor %}"})
    assert {template.render(TALK).text for _ in range(5)} == {"a" * 600}
    longer = ChatTemplate({"default": "{% for i in range(1001) %}a{% endfor %}"})
    one_line(lambda: longer.render(TALK), "more than 1,000 steps")


def test_long_conversations_are_rendered():
    """A list that grows by each message, and a loop over the messages in a loop over them."""
    template = (
        "{% set n = namespace(all=[], text='') %}{% for m in messages %}"
        "{% set n.all = n.all + [m] %}{% for other in n.all %}{% endfor %}"
        "{% set n.text = n.text ~ m.content %}{% endfor %}{{ n.text }}"
    )
    talk = [{"role": "user", "content": "a" * 50}] * 1000
    assert ChatTemplate({"default": template}).render(talk).text == "a" * 50_000


def test_an_endless_answer_is_not_tried_with_each_conversation(monkeypatch):
    """The whole conversation is rendered, the beginning of an answer is not."""
    monkeypatch.setattr(chat_limits, "STEPS", 1000)
    loop = "{% if add_generation_prompt %}" + FOR + END + "{% endif %}"
    template = ChatTemplate({"default": "{{ messages[-1].content }}" + loop})
    one_line(lambda: samples_of(template, TALK, None, Counter()), "more than 1,000 steps")
    refusing = "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    template = ChatTemplate({"default": "{{ messages[-1].content }}" + refusing})
    assert samples_of(template, TALK, None, Counter())[0].text == "4"


@pytest.mark.parametrize("limit, method", [("STEPS", "step"), ("CHARACTERS", "_spend")])
def test_mutants_of_the_limits_are_caught(limit, method, monkeypatch):
    monkeypatch.setattr(chat_limits, limit, 1000)
    template = ChatTemplate({"default": "{% for i in range(2000) %}{{ i }}{% endfor %}"})
    one_line(lambda: template.render(TALK), "more than 1,000", limit.lower())
    monkeypatch.setattr(chat_limits.Work, method, lambda *_: True)
    assert len(template.render(TALK).text) == 6890
