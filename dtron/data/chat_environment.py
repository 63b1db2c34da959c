"""The jinja environment in which a chat template runs: that of transformers, with limits.

Published templates rely on the environment of ``apply_chat_template``:

- the filter ``tojson``, which escapes no letter and no HTML, and its keyword arguments;
- the tags ``break`` and ``continue``, and the functions ``raise_exception`` and ``strftime_now``;
- the tag ``generation``, with which a template marks the text that the model generates.

jinja2's sandbox runs the template, so a template can read its input and nothing else. A template
makes a bounded amount of text in a bounded number of steps (chat_limits.py). The environment counts
each call, operator and filter. chat_meter.py adds the counts of loops and texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import update_wrapper, wraps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter, make_multi_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Namespace
from markupsafe import Markup

from dtron.data.chat_limits import Work, check_width, fits
from dtron.data.chat_meter import Generator, Meter

Span = tuple[int, int]

_KEYED = {
    "sort": ("reverse", "case_sensitive", "attribute"),
    "unique": ("case_sensitive", "attribute"),
    "min": ("case_sensitive", "attribute"),
    "max": ("case_sensitive", "attribute"),
    "groupby": ("attribute", "default", "case_sensitive"),
}
"""The filters that compare items, and their arguments."""


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template.

    ``now``: the time that the template reads.
    ``work``: what the template does, since ``work.begin()``.
    ``tag``: what the template marks."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, now: datetime) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )

        def fail(message: str) -> NoReturn:
            raise TemplateError(message)

        self.work = Work()
        self.code_generator_class = Generator
        self.filters |= {"tojson": _to_json, "join": _join, "sum": _sum}
        self.filters = {name: self._limited(name, f) for name, f in self.filters.items()}
        self.tests = {name: self._counted(f) for name, f in self.tests.items()}
        functions: dict[str, Callable[..., Any]] = {
            "raise_exception": fail,
            "strftime_now": now.strftime,
            "dict": _Dict(),
            "namespace": _PublicNamespace,
        }
        self.globals.update(functions)
        del self.globals["lipsum"]  # random text of any length

    @property
    def tag(self) -> GenerationTag:
        tag = self.extensions[GenerationTag.identifier]
        assert isinstance(tag, GenerationTag)
        return tag

    def template(self, source: str) -> Template:
        """Compile a template. Raises an error of jinja2 or Python if it is malformed."""
        tree = Meter().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self, __context: Context, __obj: Any, *args: Any, **named: Any) -> Any:
        # The names begin with underscores because a template may name its own arguments.
        work, owner = __self.work, getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        work.step()
        if name == "join" and isinstance(owner, (str, bytes)) and args:
            args = work.check_join(args[0], owner), *args[1:]
        elif isinstance(name, str) and owner is not None:
            work.check_call(name, owner, args, named)
        return work.made(super().call(__context, __obj, *args, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.work.check_operator(operator, left, right)
        return self.work.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        plain = super().wrap_str_format(value)
        if plain is None:
            return None
        pattern = value.__self__
        kind, formatter = type(pattern), _Formatter(self)
        if isinstance(pattern, Markup):
            formatter = _EscapeFormatter(self, escape=pattern.escape)

        def call(*args: Any, **named: Any) -> str:
            if value.__name__ == "format_map":
                (mapping,) = args
                return kind(formatter.vformat(pattern, (), mapping))
            return kind(formatter.vformat(pattern, args, named))

        return update_wrapper(call, value)

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that reports its work."""
        lead = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2 gives it a context first

        @wraps(function)
        def limited(*args: Any, **named: Any) -> Any:
            self.work.step()
            head, value, more = args[:lead], args[lead], args[lead + 1 :]
            if name in _KEYED:
                value = self._check_keys(name, value, more, named)
            self.work.check_call(name, value, more, named)
            return self.work.made(function(*head, value, *more, **named))

        return limited

    def _check_keys(self, name: str, value: Any, more: Any, named: dict[str, Any]) -> Any:
        """Look at what a filter compares. Return the items: an iterator can be read only once."""
        items = list(value)
        given = dict(zip(_KEYED[name], more, strict=False)) | named
        attribute, default = given.get("attribute"), given.get("default")
        get = (
            make_multi_attrgetter(self, attribute)
            if name == "sort"
            else make_attrgetter(self, attribute, default=default)
        )
        self.work.check_keys(items if attribute is None else list(map(get, items)))
        return items

    def _counted(self, function: Any) -> Callable[..., Any]:
        """Return a test that counts as a step."""

        @wraps(function)
        def counted(*args: Any, **named: Any) -> Any:
            self.work.step()
            return function(*args, **named)

        return counted


@pass_eval_context
def _join(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    """The filter ``join``, which looks at all items before it joins them."""
    environment = context.environment
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return FILTERS["join"](context, environment.work.check_join(items, d), d)


@pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    """The filter ``sum``, which looks at all items before it adds them."""
    get = None if attribute is None else make_attrgetter(environment, attribute)
    items = list(iterable if get is None else map(get, iterable))
    environment.work.check_sum(items, start)
    return FILTERS["sum"](environment, items, None, start)


class _Formatter(SandboxedFormatter):
    """A formatter of ``'{}'.format``, which checks each field."""

    def format_field(self, value: Any, format_spec: str) -> str:
        _check_spec(format_spec)
        return self._work.made(super().format_field(value, format_spec))

    @property
    def _work(self) -> Work:
        assert isinstance(self._env, ChatEnvironment)
        return self._env.work


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same for a text that escapes its fields."""


def _check_spec(format_spec: str) -> None:
    for width in re.findall(r"\d+", format_spec):
        check_width(width)


# ---------------------------------------------------------------------- functions and tags


class GenerationTag(Extension):
    """The tag ``{% generation %}...{% endgeneration %}``: writes its body, and records where.

    ``tagged``: whether the template has the tag."""

    tags = {"generation"}

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.tagged = False
        self.begin()

    def begin(self) -> None:
        """Forget the last rendered conversation."""
        self.pieces: list[str] = []
        self.spans: list[Span] = []
        self.length = 0

    def write(self, piece: str) -> None:
        """Add a piece of the text."""
        self.length += len(piece)
        fits(self.length)
        self.pieces.append(piece)

    def parse(self, parser: Parser) -> nodes.Node:
        self.tagged = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.length, self.length + len(text)))
        return text


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Dict:
    """Makes dicts, without the attributes of the type ``dict``."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """A namespace without names that begin with an underscore: some lead out of the sandbox."""

    def __init__(*args: Any, **values: Any) -> None:  # without self: it may be a key
        self, *rest = args
        entries = dict(*rest, **values)
        for name in entries:
            _check_public(name)
        Namespace.__init__(self, entries)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # without its values, which may hold this namespace many times


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no private names such as {name!r}")
