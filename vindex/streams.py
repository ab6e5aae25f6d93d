"""A command's streams take any text, in any locale, and where they were closed, are full or have gone."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress

from vindex.console import warn


def open_streams() -> None:
    """Make stdout and stderr ones that any text can be written to: in any locale, and where the caller closed them.

    Where PYTHONUNBUFFERED is set, Python takes what a pipe or a full disk accepted for the whole; a buffer does not.
    What a caller in this process has put in their place is left as it is.
    """
    for number in (0, 1, 2):  # a closed one would be taken by the next file that is opened
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    out, err = (getattr(stream, "encoding", "utf-8") for stream in (sys.stdout, sys.stderr))
    if sys.stdout is sys.__stdout__:
        sys.stdout = open(1, "w", encoding=out, errors="replace", closefd=False)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:
        sys.stderr = _Lenient(open(2, "wb", 0, closefd=False), err, "replace", write_through=True)  # noqa: SIM115


class _Lenient(io.TextIOWrapper):
    """stderr. What cannot be written is let go: a full disk under a log is no reason to stop a build."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)


def close_stdout(status: int) -> int:
    """Write out what stdout still holds. Returns `status`, or 1 when it cannot be written.

    A reader that went away, as `head` does, is no more than that; where the disk is full a line says so.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing is tried again at exit
        if not status and error.errno != errno.EPIPE:
            warn(f"vindex: standard output: {error.strerror}")
        return status or 1
    return status
