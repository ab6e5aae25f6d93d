"""Chat templates and pickles that do harm, and an operating system that fails."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import torch

from vindex import targets

TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 10**(10**8) }}", "{{ 'x'|center(10**10) }}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{% set ns = namespace(s='xxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{{ raise_exception('\x1b[31mno\\n\\nno') }}", "{% for", "{{ messages[0]['content'][:3] }}", "",
    "{{ nothing.at.all }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/made') }}", "{% include '/etc/passwd' %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ '%10000000000d'|format(1) }}", "{{ 'a'.ljust(10**10) }}",
    "\x1b[31m{% for m in messages %}{{ m.content }}{% endfor %}", "{{ range(10**10)|list }}",
    "{{ messages|tojson }}" * 2000,
]  # fmt: skip
PAYLOADS: list[Callable[[], Any]] = [
    lambda: torch.eye(3).to_sparse(), lambda: torch.empty(3, 9, device="meta")[0],
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.qint8), lambda: torch.full((48,), float("nan")),
    lambda: torch.ones(48, dtype=torch.complex64), lambda: torch.ones(48, dtype=torch.int64), lambda: torch.ones(0),
    lambda: torch.ones(4, 12), lambda: [1, 2], lambda: {"a": {}}, lambda: "x" * 99, lambda: None, lambda: Payload(),
    lambda: torch.nn.Linear(2, 2), lambda: torch.ones(48)[::2], lambda: torch.ones((), dtype=torch.float64),
]  # fmt: skip


class Payload:
    """What no loading may run."""

    def __reduce__(self):
        return os.system, ("touch ../outside/made",)


def fail_at_step(number: int, code: int) -> None:
    left = iter(range(number + 1))

    def step(what: str) -> None:
        if next(left, None) == number:
            raise OSError(code, os.strerror(code))

    targets.step = step


def read_badly(few: int, number: int, code: int) -> None:
    """Files that are opened for reading give a few bytes at a time, and an error at the `number`-th read of all."""
    plain, reads = os.fdopen, iter(range(1 << 40))

    class Bad(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            if next(reads) == number:
                raise OSError(code, os.strerror(code))
            return super().readinto(memoryview(buffer)[: max(few, len(buffer) // 50)])

    def fdopen(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return io.BufferedReader(Bad(descriptor, "rb")) if mode == "rb" else plain(descriptor, mode, *rest, **options)

    os.fdopen = fdopen
