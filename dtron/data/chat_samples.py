"""From a conversation to samples: text, and the part of the text that is learned.

**The simple template.** ``chatml`` writes the markers itself, so it knows where each answer is.

**A tokenizer's own template** is a program. What it writes for an answer is found by rendering
prefixes of the conversation. The answer begins where the prefix before it ends, rendered with the
beginning of an answer (``add_generation_prompt``). The answer ends where the prefix with the answer
ends. So tool calls and reasoning are learned as the template writes them, with the token that
ends the turn. If the template has ``generation`` tags, the tags decide instead.

Many templates only add: the text of a prefix is a prefix of the text. Then a conversation is one
sample, in which all answers are learned. Other templates rewrite earlier turns: they drop the
reasoning of earlier answers, or end only the last answer in its own way. In the whole text the
earlier answers are then not what a model has to write. So each answer becomes a sample of its own:
the conversation up to this answer, rendered alone, with only this answer learned.

Left out: answers in a prefix that the template refuses to render. They are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from dtron.data.chat_limits import WorkLimit
from dtron.data.chat_template import ChatTemplate, Messages, Rendered, Span, Tools
from dtron.errors import UserError

START, END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class ChatSample:
    """The text of a conversation, or of its beginning.

    ``learned``: the stretches of the text that are learned, in order."""

    text: str
    learned: tuple[Span, ...]


def chatml(
    messages: Messages, start: str = START, end: str = END, learned_from: int = 0
) -> ChatSample:
    """Write messages with the simple template. An answer is learned with the marker after it.

    ``start``, ``end``: the markers.
    ``learned_from``: the number of messages at the beginning that are not learned."""
    text, learned = "", []
    for number, message in enumerate(messages):
        text += f"{start}{message['role']}\n"
        body = len(text)
        text += message["content"] + end
        if message["role"] == "assistant" and number >= learned_from:
            learned.append((body, len(text)))
        text += "\n"
    return ChatSample(text, tuple(learned))


def samples_of(
    template: ChatTemplate,
    messages: Messages,
    tools: Tools,
    counts: Counter[str],
    learned_from: int = 0,
) -> list[ChatSample]:
    """Return the samples of a conversation: one, or one for each answer if the template rewrites
    earlier turns. Raises UserError if the template fails.

    ``counts``: counts what is left out, and ``rewritten`` conversations.
    ``learned_from``: the number of messages at the beginning that are not learned."""
    whole = template.render(messages, tools)
    answers = _answers(messages, learned_from)
    turns = _turns(template, messages, tools, whole, answers)
    found = [turn for turn in turns if turn is not None]
    if turns and not found:
        template.render(messages[: answers[0] + 1], tools)  # raises the reason
        raise UserError(
            "the tokenizer's chat template does not show where an answer begins; give one that "
            "writes an answer's content"
        )
    counts["unfound"] += len(turns) - len(found)
    if not template.tagged(tools):
        counts["calls"] += len(answers) - len(turns)
    if all(whole.text.startswith(prefix.text) for prefix, _ in found):
        spans = whole.generated if template.tagged(tools) else tuple(_disjoint(found))
        if learned_from and found:
            spans = tuple(span for span in spans if span[1] > found[0][1])
        return [ChatSample(whole.text, spans)]
    counts["rewritten"] += 1
    samples = []
    for prefix, start in found:
        last: tuple[Span, ...] = ((start, len(prefix.text)),)
        if template.tagged(tools):
            last = tuple(span for span in prefix.generated if span[1] > start)
        samples.append(ChatSample(prefix.text, last))
    return samples


def notes_of(path: str, counts: Counter[str]) -> Iterator[str]:
    """Yield a line about each kind of thing that is left out.

    ``path``: of the conversations.
    ``counts``: as `samples_of` counts, and ``key NAME`` for keys that the simple template leaves
    out."""
    whose = "the tokenizer's template"
    if n := counts["rewritten"]:
        yield (
            f"{path}: {whose} changes earlier turns in {n:,} of {counts['conversations']:,} "
            "conversations; each answer of these is a sample of its own, which ends with it"
        )
    if n := counts["unfound"]:
        yield (
            f"{path}: {n:,} answers are not learned, because {whose} cannot render a conversation "
            "that ends with them"
        )
    if n := counts["calls"]:
        yield (
            f"{path}: {n:,} answers with tool calls are not learned, because {whose} does not "
            "write tool_calls"
        )
    if n := counts["tools"]:
        yield f"{path}: {whose} does not write the tools that {n:,} conversations have"
    keys = [key.removeprefix("key ") for key, n in counts.items() if n and key.startswith("key ")]
    if keys:
        yield (
            f"{path}: the simple template writes role and content, and leaves out "
            f"{', '.join(sorted(keys))}"
        )


Turn = tuple[Rendered, int]
"""A prefix that ends with an answer, and where in its text the answer begins."""


def _answers(messages: Messages, first: int) -> list[int]:
    """Return the numbers of the answers, from message ``first`` on."""
    return [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]


def _turns(
    template: ChatTemplate,
    messages: Messages,
    tools: Tools,
    whole: Rendered,
    answers: Sequence[int],
) -> list[Turn | None]:
    """Return the turn of each answer that is learned. None for an answer whose prefix the template
    refuses.

    ``answers``: the numbers of the answers."""
    calls = template.reads("tool_calls", tools)
    turns: list[Turn | None] = []
    for i in answers:
        if messages[i].get("tool_calls") and not calls:
            continue  # the template leaves out what the answer does
        last = i + 1 == len(messages)
        prefix = whole if last else _rendered(template, messages[: i + 1], tools)
        start = None
        if prefix is not None:
            start = _answer_start(template, messages[: i + 1], tools, prefix.text)
        turns.append(None if prefix is None or start is None else (prefix, start))
    return turns


def _disjoint(turns: list[Turn]) -> list[Span]:
    spans, done = [], 0
    for prefix, start in turns:
        spans.append((max(start, done), len(prefix.text)))
        done = len(prefix.text)
    return spans


def _rendered(
    template: ChatTemplate, messages: Messages, tools: Tools, prompt: bool = False
) -> Rendered | None:
    """Render a conversation; None if it is empty, or if the template refuses it. A template without
    end is not tried again with the next conversation."""
    try:
        return template.render(messages, tools, prompt) if messages else None
    except UserError as error:
        if isinstance(error.__cause__, WorkLimit):
            raise
        return None


def _answer_start(
    template: ChatTemplate, messages: Messages, tools: Tools, text: str
) -> int | None:
    """Return where in ``text`` the last message, an answer, begins.

    Mostly ``text`` begins with the prefix before the answer, rendered with the beginning of an
    answer. If it does not, the header is looked for. It ends at the latest where an answer of other
    words differs. None if the template refuses the other words too."""
    before = _rendered(template, messages[:-1], tools, prompt=True)
    if before is not None and text.startswith(before.text):
        return len(before.text)
    content = messages[-1].get("content")
    other = "#" if not str(content).lstrip().startswith("#") else "%"
    probe = _rendered(template, [*messages[:-1], {"role": "assistant", "content": other}], tools)
    if probe is None:
        return None
    latest = len(commonprefix([text, probe.text]))
    earlier = _rendered(template, messages[:-1], tools)
    if before is None or earlier is None:  # no message is before it, or the template refuses them
        before, earlier = _rendered(template, messages, tools, prompt=True), Rendered(text)
        same = 0
    else:
        same = len(commonprefix([text, earlier.text]))
    header = before.text.removeprefix(earlier.text) if before is not None else ""
    if before is None or header in ("", before.text):  # not written, or not written at the end
        return latest
    at = text.rfind(header, same, latest)
    return latest if at < 0 else at + len(header)
