"""dtron.data.chat_template: the environment of chat templates, against transformers."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dtron.data import chat_template
from tests.helpers import chats as styles
from tests.helpers.texts import one_line

TALK = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "é"}}


def rendered(template: Any, talk: list[dict], tmp_path: Path, tools: Any = None, **config) -> str:
    """Render in dtron, and assert that transformers writes the same."""
    from transformers import PreTrainedTokenizerFast

    folder = styles.folder_of(tmp_path / f"{len(list(tmp_path.iterdir()))}", "bytes", template)
    if config:
        entries = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(entries | config))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    want = theirs.apply_chat_template(talk, tools=tools, tokenize=False)
    ours = chat_template.template_beside(folder).render(talk, tools).text
    assert ours == want
    return ours


@pytest.mark.parametrize(
    "template, want",
    [
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "<é>\'&"}'),
        ("{{ [1, 'é'] | tojson(ensure_ascii=true) }}", '[1, "\\u00e9"]'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}", '{"a":[1,2]}'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for m in messages %}{% continue %}x{% endfor %}.", "."),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools is not none %}tools{% endif %}.", "."),
        ("{% if documents is not none %}documents{% endif %}.", "."),
        ("{{ tools is defined }}{{ date_string is defined }}", "TrueFalse"),
        ("{{ bos_token }}{{ pad_token is defined }}{{ unk_token }}", "<s>False<unk>"),
        ("{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + ns.self %}{{ ns.a }}", "3"),
        ("{{ dict(a=1) | length }}{{ dict.fromkeys('ab') | length }}", "12"),
        ("{% if true %}  a\n  {% endif %}  b\n", "  a\n  b"),
        ("{{ [1, 'a', 'b'] | join('-') }}{{ messages | join(', ', 'role') }}", None),
        ("{{ messages | map(attribute='role') | join }}{{ 'a-b'.split('-') | join(d='+') }}", None),
        (
            "{{ [[1], [2]] | sum(start=[0]) }}{{ [{'n': 1}] | sum('n', 5) }}{{ [1, 2] | sum }}",
            None,
        ),
        ("{% for r, of in messages | groupby('role') %}{{ r }}{{ of | length }}{% endfor %}", None),
        ("{% for r, of in messages | groupby('no', 7) %}{{ r }}{% endfor %}", None),
        ("{{ messages | sort(attribute='role,content') | map(attribute='role') | list }}", None),
        ("{{ 'cBa' | sort }}{{ 'aAb' | unique | list }}{{ [3, 1] | min }}{{ [] | max }}", None),
        (
            "{{ '%s|%5d|%-3s' % ('a', 2, 'b') }}{{ '%(a)s' % {'a': 1} }}{{ '%.2f' | format(2) }}",
            None,
        ),
        ("{{ '{:>4}{a!r}{0[0]}'.format('xy', a=[1]) }}{{ '{a}'.format_map({'a': 2}) }}", None),
        ("{{ ('<b>' | e) ~ '&' }}{{ ('<b>' | e).format(1) }}{{ '{}'.format('<' | e) }}", None),
        ("{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] * 2 + [2] }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 1 / 2 }}", None),
        ("{{ messages[1:] }}{{ 'abc'[::-1] }}{{ (1, 'a') }}{{ {'a': (2,)} }}{{ [] }}", None),
        (
            "{% for m in messages if m.role != 'x' %}{{ loop.index }}{{ loop.last }}{% endfor %}",
            None,
        ),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% else %}-{% endfor %}", None),
        (
            "{% macro f(a, b='x') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}"
            "{% call f(2, b='y') %}z{% endcall %}",
            None,
        ),
        (
            "{% set x %}a{% for i in [1, [2]] recursive %}{{ loop(i) if i is iterable else i }}"
            "{% endfor %}{% endset %}{{ x | upper | replace('A', 'bb') | indent(2, true) }}",
            None,
        ),
        (
            "{% filter upper %}a{{ 1 }}{% endfilter %}{% block b %}c{% endblock %}{{ self.b() }}",
            None,
        ),
        (
            "{{ 'a b' | title | center(9) }}{{ 3.14 | round(1) }}"
            "{{ [1, 2, 3] | batch(2, 0) | list }}",
            None,
        ),
        ("{{ messages[1].thinking is defined }}{{ 'name' in messages[1] }}", "FalseFalse"),
    ],
)
def test_the_environment_is_that_of_transformers(template, want, tmp_path):
    """``want`` None: whatever transformers writes."""
    talk = [
        {"role": "user", "content": "2 + 2?", "name": None},
        {"role": "assistant", "content": "<é>'&", "name": None},
    ]
    assert rendered(template, talk, tmp_path) == want or want is None


def test_reasoning_has_each_of_its_names(tmp_path):
    template = "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }} {% endfor %}"
    talk = [
        {"role": "assistant", "content": "", "thinking": "a"},
        {"role": "assistant", "content": "", "reasoning_content": "b"},
        {"role": "assistant", "content": "", "reasoning": "c", "thinking": None},
    ]
    assert rendered(template, talk, tmp_path) == "a/a b/b c/c "


def test_the_template_of_tools_is_taken_if_there_are_tools(tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    talk = [{"role": "assistant", "content": "4"}]
    assert rendered(named, talk, tmp_path) == "plain"
    assert rendered(named, talk, tmp_path, tools=[]) == "0 tools"
    assert rendered(named, talk, tmp_path, tools=[TOOL, TOOL]) == "2 tools"
    folder = styles.folder_of(tmp_path / "files", "bytes", "in the config")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (folder / "chat_template.jinja").write_text("in a file")
    (more / "tool_use.jinja").write_text("of tools, in a file")
    for tools in (None, [TOOL]):
        want = styles.transformers_of(folder).apply_chat_template(talk, tools, tokenize=False)
        assert chat_template.template_beside(folder).render(talk, tools).text == want
    (folder / "chat_template.jinja").unlink()
    alone = chat_template.template_beside(folder)
    one_line(lambda: alone.render(talk), "tool_use", "none is named default")


def test_the_clock_stands_still(monkeypatch):
    class Clock(datetime):
        ticks = 0

        @classmethod
        def now(cls, tz=None):
            cls.ticks += 1
            return datetime(2026, 1, 1, 0, 0, cls.ticks)

    monkeypatch.setattr(chat_template, "datetime", Clock)
    template = chat_template.ChatTemplate({"default": "{{ strftime_now('%S') }}"})
    assert {template.render(TALK).text for _ in range(3)} == {"01"}


def test_a_template_runs_nothing():
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='assistant') }}",
        "{{ raise_exception('no') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{% include '/etc/passwd' %}",
    ):
        template = chat_template.ChatTemplate({"default": attack})
        one_line(lambda t=template: t.render(TALK), "cannot render it", "simple template")
    malformed = chat_template.ChatTemplate({"default": "{% if %}"})
    one_line(lambda: malformed.render(TALK), "malformed", "simple template")
