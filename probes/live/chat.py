"""A conversation in a model's own chat template, thinking off, with every word of it standing there as it was said.

1. The messages are rendered with their content as text; where that fails, as a list of parts, which the templates of
   vision-language models want.
2. The same conversation with a marker in place of each content shows what the template itself says. Put back into that,
   the contents must give what was rendered, white space at their ends apart, and stand there letter by letter:
   a template that drops, cuts or rewrites what was said is refused.
3. A template is a stranger's program. Whatever it raises, its running longer than SECONDS, its asking for more than
   MEMORY, products past MOST_BITS and an output of more than LARGEST characters beside what was said end in one line.
"""

from __future__ import annotations

import ctypes
import operator
import re
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vindex.errors import ProbeError

SECONDS = 10.0
MEMORY = 1 << 30
MOST_BITS = 1 << 12
LARGEST = 1 << 15
SHOWN = 160
Message = Mapping[str, str]


class Rendered(NamedTuple):
    """A conversation as one text."""

    text: str
    starts: tuple[int, ...]
    """Where each message's content begins in it; of a message without words, where that could be."""


class _Unusable(Exception):
    """Why the template cannot be used in one way."""


class _Stopped(_Unusable):
    """Why it is not tried in another."""


def ask(question: str) -> list[Message]:
    """A conversation of one question. Raises ProbeError where nothing is asked."""
    if not question.strip():
        raise ProbeError(f"question {question!r}: it has no words; expected something to ask")
    return [{"role": "user", "content": question}]


def render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False, where: str = "") -> Rendered:
    """The conversation as the model reads it; with `prompt`, up to where the assistant's answer begins.

    Raises ProbeError where the template cannot say every message whole, with `where` it came from in front.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ProbeError(
            "this tokenizer has no chat template; use a chat model, or leave --chat (in training a chat_ preset) out"
        )
    failures = []
    for parts in (False, True):
        try:
            return _render(tokenizer, messages, prompt, parts)
        except _Unusable as why:
            failures.append(str(why))
            if isinstance(why, _Stopped):
                break
    second = f", and with the words as a list of parts {failures[1]}" if len(set(failures)) > 1 else ""
    raise ProbeError(
        f"{where}{': ' * bool(where)}the chat template {failures[0]}{second}; use another chat_template, or no chat"
    )


def _render(tokenizer: Any, messages: Sequence[Message], prompt: bool, parts: bool) -> Rendered:
    contents = [message["content"] for message in messages]
    markers = [f"Vindex{number}marker" if words.strip() else words for number, words in enumerate(contents)]
    limit = LARGEST + sum(map(len, contents))

    def rendered(contents: Sequence[str]) -> str:
        said = [
            {"role": message["role"], "content": [{"type": "text", "text": words}] if parts else words}
            for message, words in zip(messages, contents, strict=True)
        ]
        return _applied(tokenizer, said, prompt, limit)

    text, marked = rendered(contents), rendered(markers)
    return Rendered(text, tuple(_starts(text, marked, contents, markers)))


def _starts(text: str, marked: str, contents: Sequence[str], markers: Sequence[str]) -> Iterator[int]:
    """Where each content stands in `text`, given the same rendering with markers; _Unusable where one does not."""
    expected, at, seen = marked, 0, 0
    for words, marker in zip(contents, markers, strict=True):
        if words == marker:  # without words
            yield at
            continue
        before, found, _ = marked[seen:].partition(marker)
        if not found or re.search(r"""['"]text['"]:\s*['"]$""", before):
            raise _Unusable(f"drops or rewrites {_short(words)}")
        place = text.find(words.strip(), at + len(before.rstrip()))
        if place < 0:
            raise _Unusable(f"drops or rewrites {_short(words)}")
        yield place - (len(words) - len(words.lstrip()))
        at, seen = place + len(words.strip()), seen + len(before) + len(marker)
        expected = expected.replace(marker, words)
    if "".join(expected.split()) != "".join(text.split()):
        raise _Unusable(f"rewrites what stands around {_short(contents[-1])} with what is said there")


def _applied(tokenizer: Any, messages: list[dict[str, Any]], prompt: bool, limit: int) -> str:
    """What the template makes of the messages; _Unusable with the reason where that is no text within the limits."""
    import jinja2

    def apply() -> Any:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )

    try:
        with _bounded_memory(), _bounded_products():
            text = _within(SECONDS, apply)
    except TimeoutError:
        raise _Stopped(f"runs for more than {SECONDS:g} s") from None
    except MemoryError:
        raise _Stopped(f"asks for more than {MEMORY:,} bytes") from None
    except jinja2.TemplateSyntaxError as error:
        raise _Unusable(f"does not parse ({_short(error.message)}, line {error.lineno})") from error
    except Exception as error:  # a template can make any of them
        raise _Unusable(f"fails with {type(error).__name__}: {_short(str(error))}") from error
    if not isinstance(text, str) or len(text) > limit:
        found = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
        raise _Unusable(f"renders {found}, where text of at most {limit:,} is expected")
    return text


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Inside, this process gets no more than MEMORY more; one that has a tighter limit keeps it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # a system without it is left unbounded
        yield
        return
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound if soft == resource.RLIM_INFINITY else min(soft, bound), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _bounded_products() -> Iterator[None]:
    """Inside, a template that jinja compiles has products and powers within bounds, for as long as it is used.

    No thread of Python runs, and none can be stopped, while one product of huge integers is computed.
    """
    from jinja2.sandbox import SandboxedEnvironment as Sandbox

    before = Sandbox.intercepted_binops, Sandbox.default_binop_table
    bounded = {"*": _bounded(operator.mul), "**": _bounded(operator.pow)}
    Sandbox.intercepted_binops, Sandbox.default_binop_table = frozenset(bounded), before[1] | bounded
    try:
        yield
    finally:
        Sandbox.intercepted_binops, Sandbox.default_binop_table = before


def _bounded(of: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def product(left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if of is operator.mul else left.bit_length() * abs(right)
            if bits > MOST_BITS:
                raise OverflowError(f"a product of {bits:.3g} bits")
        return of(left, right)

    return product


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; TimeoutError after so many seconds, when its thread is told to stop."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _short(text: str | None) -> str:
    """One line of what others wrote."""
    return repr(" ".join((text or "").split())[:SHOWN])
