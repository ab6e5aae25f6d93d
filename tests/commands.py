"""Run the command of this tree in processes of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


def run(*arguments, cwd=ROOT, columns: int = 80) -> subprocess.CompletedProcess:
    """Run the command in `cwd`, in a process of its own that is forked where libraries are loaded."""
    words = ["vindex", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        process = FORKS.Process(target=_become, args=(words, cwd, columns, folder))
        process.start()
        process.join()
        texts = [(Path(folder) / name).read_bytes().decode() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def too_wide(text: str, columns: int) -> list[str]:
    """Lines that are longer, but for those with a word that is, as paths are, and commands to copy: these are whole."""
    lines = [one for one in text.splitlines() if not one.startswith(("next: vindex ", "or:   vindex "))]
    return [one for one in lines if len(one) > columns and all(len(word) <= columns for word in one.split())]


def _become(words: list[str], cwd: Path, columns: int, folder: str) -> None:
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ["COLUMNS"] = str(columns)
    sys.argv = words
    from vindex.__main__ import main

    main()


def with_streams(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    """Run the command of this tree in a process that begins with these streams, and this in its environment."""
    command = [sys.executable, "-m", "vindex", *map(str, arguments)]
    return in_tree(command, 80, stdout=stdout, stderr=stderr, **environment)


def in_tree(command, columns, *, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=None, **environment):
    inherited = {key: value for key, value in os.environ.items() if key not in ("LANG", "LC_ALL")}
    settings = {"COLUMNS": str(columns), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        command,
        stdout=stdout,
        stderr=stderr,
        env={key: value for key, value in (inherited | settings).items() if value is not None},
        cwd=cwd,
    )


def start(command: list, *, start_new_session: bool = False) -> subprocess.Popen:
    """Start a process that Ctrl-C reaches, even where these tests run in the background and ignore it themselves."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
