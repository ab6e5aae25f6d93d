"""Commands that take a vindex to the Hub and bring one from it: push, pull. Neither loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vindex.cli import Json, Output
from vindex.console import bytes_of, check_places, command, progress, put, say, stopped, styled


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A vindex, as built by `vindex build`.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="What it is called on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="For your eyes only, where it is new.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A branch; by default main.")] = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """Put a vindex on the Hub.

    It is verified first, and its card is written anew with that address. The token is HF_TOKEN's, or that of
    `hf auth login`.
    """
    import vindex

    check_places(output)
    with progress() as stage:
        verified = vindex.verify(vindex.open(directory), progress=stage)
    pushed = vindex.push(directory, repo, private=private, revision=revision, verified=verified, progress=stage)
    if put(pushed.record(), json, output):
        return
    say(styled(f"{pushed.url} holds {pushed.id}", "bold"), f": {pushed.files} files, {bytes_of(pushed.size_bytes)}")
    say(f"next: {command('info', f'hf://{repo}' + (f'@{revision}' if revision else ''))}")


def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="What it is called on the Hub.")],
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="Where to; by default NAME.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A branch, a tag or a commit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the vindex that is there.")] = False,
    json: Json = False,
    output: Output = None,
) -> None:
    """Bring a vindex from the Hub, every file checked by SHA256SUMS.

    A pull that was stopped goes on where it was. Where a command takes a VINDEX, `hf://OWNER/NAME` fetches only what it
    needs.
    """
    import vindex

    check_places(output)
    with stopped("what has come is kept: the same command goes on"), progress() as stage:
        v = vindex.pull(repo, directory, revision=revision, force=force, progress=stage)
    if put(v.info(), json, output):
        return
    of = f", of {v.index.model}" if v.index.model else ""
    say(styled(f"{v.path} holds {v.id}", "bold"), f", {bytes_of(v.size_bytes)}{of}")
    say(f"next: {command('audit', v.path, '--source', 'MODEL') if v.family.title else command('verify', v.path)}")
