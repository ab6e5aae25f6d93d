"""Vindexes to the Hub and from it, each one commit, whole and checked.

vindex.push("qwen3-0.6b.vindex", "someone/qwen3-0.6b-vindex")   # one commit, of nothing but the vindex
v = vindex.pull("someone/qwen3-0.6b-vindex")                    # the same bytes; what stands in SHA256SUMS
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vindex.card import write_card
from vindex.checks import verify
from vindex.checksums import sha256_of
from vindex.errors import CheckpointError, FormatError, QueryError, TargetError
from vindex.format import FILES, files_of
from vindex.hub import explained, is_hub_id, reason_of
from vindex.hub_files import listing_of
from vindex.hub_shelf import HubShelf
from vindex.kinds import VINDEX
from vindex.places import begin, check_directory, empty, held, partial_of, put, unfinished
from vindex.progress import Progress, silent
from vindex.reader import Vindex, open_vindex
from vindex.results import Result
from vindex.targets import explained as explained_target
from vindex.targets import sync
from vindex.verification import Verification

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTRIBUTES = ".gitattributes"  # says which files are large
OF_A_REPOSITORY = frozenset({ATTRIBUTES, *(spec.name for spec in FILES)})


@dataclass(frozen=True, repr=False)
class Pushed(Result):
    """A vindex that is on the Hub now."""

    id: str
    repo: str
    commit: str
    url: str
    files: int
    size_bytes: int

    def __repr__(self) -> str:
        return f"<vindex {self.id} on the Hub: {self.url}>"

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        return [self.record()]


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    verified: Verification | None = None,
    progress: Progress = silent,
) -> Pushed:
    """Put a vindex on the Hub as OWNER/NAME, in one commit; its card is written anew, with that address.

    private: the repository, where it is made now. revision: a branch, made where it is missing; by default main.
    verified: what `vindex.verify` said of this vindex, where it was asked just now; by default it is asked here, and
    that is what progress is told of. The Hub's client shows the upload itself, on a terminal.
    Raises FormatError where it does not hold, QueryError on a name that is none, CheckpointError when the Hub cannot be
    reached, does not let us, or holds something else under that name.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    v = open_vindex(directory)
    if not is_hub_id(repo):
        raise QueryError(f"{repo}: expected OWNER/NAME, such as someone/{v.path.name}")
    api = _logged_in(repo)
    there = _there(api, repo, private, revision)
    found = verified if verified and (verified.path, verified.id) == (v.path, v.id) else verify(v, progress)
    if not found.holds:
        raise FormatError(f"{directory} is not pushed: it {found.verdict}")
    write_card(v, repo=repo)
    v = open_vindex(directory)
    names = sorted(spec.name for spec in files_of(v.index))
    gone = sorted((there or set()) - set(names) - {ATTRIBUTES})
    with _uploading(repo, revision), _bars(shown=progress is not silent and sys.stderr.isatty()):
        if there is None:
            api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(  # upload_folder commits in parts where it takes long, or where a commit fails
            repo,
            [*(CommitOperationAdd(name, str(v.path / name)) for name in names), *map(CommitOperationDelete, gone)],
            commit_message=f"vindex {v.id} of {v.index.model}",
            revision=revision,
        )
    _require_same(v, repo, done.oid)
    return Pushed(v.id, repo, done.oid, f"{api.endpoint}/{repo}", len(names), v.size_bytes)


def _logged_in(repo: str) -> HfApi:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{repo}: HF_HUB_OFFLINE is set, so nothing is pushed; unset it to go on")
    if get_token() is None:
        raise CheckpointError(
            f"{repo}: there is no token to push with; run `hf auth login`, or set HF_TOKEN to one that may write"
        )
    return HfApi()


def _there(api: HfApi, repo: str, private: bool, revision: str | None) -> set[str] | None:
    """The files of the repository, None where it is to be made. Raises CheckpointError when it is none for a vindex."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with explained(repo, revision, "upload"):
        try:
            found = api.model_info(repo)
            names = {file.rfilename for file in found.siblings or ()}
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        if revision:
            with suppress(RevisionNotFoundError):  # then it will be a branch of main
                names = set(api.list_repo_files(repo, revision=revision))
    foreign = sorted(names - OF_A_REPOSITORY)
    if foreign:
        raise CheckpointError(f"{repo} holds {foreign[0]}, which is of no vindex; push under another name")
    if private and not found.private:
        raise CheckpointError(
            f"{repo} is there and public; make it private in its settings, or push under another name"
        )
    return names


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """The client's own bars, which know how far an upload is, where they are wanted; its state as it was afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _uploading(repo: str, revision: str | None) -> Iterator[None]:
    """The client raises RuntimeError for a file that did not get through, and ValueError for answers it cannot read."""
    try:
        with explained(repo, revision, "upload"):
            yield
    except (RuntimeError, ValueError) as error:
        reason = reason_of(error.__cause__ or error)
        raise CheckpointError(f"{repo}: upload failed ({reason}); nothing was committed, push again") from error


def _require_same(v: Vindex, repo: str, commit: str) -> None:
    """Raise CheckpointError unless the commit holds each file in its size, and large ones with their SHA-256."""
    there = listing_of(repo, commit).entries
    for name, digest in v.digests.items():
        entry = there.get(name)
        size = (v.path / name).stat().st_size
        if entry is None or entry.size != size or (entry.large and entry.etag != digest):
            raise CheckpointError(f"{repo}: {name} is not the same at commit {commit[:12]} as here; push again")


def pull(
    repo: str,
    directory: str | Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Vindex:
    """Bring a vindex from the Hub, OWNER/NAME, into a directory, by default NAME. Returns it, opened.

    Every file is checked by SHA256SUMS on the way. A pull that was stopped goes on where it was. revision: a branch, a
    tag or a commit. force: whether another vindex in that place may be replaced. Raises TargetError when the place is
    taken, CheckpointError when the Hub cannot be reached or a file is not what was pushed, FormatError when it is no
    vindex.
    """
    if not is_hub_id(repo):
        raise QueryError(f"{repo}: expected OWNER/NAME of a vindex on the Hub, such as someone/qwen3-8b-vindex")
    target = Path(directory or repo.partition("/")[2])
    check_directory(target, force=force, kinds=(VINDEX,))
    shelf = HubShelf(f"hf://{repo}" + (f"@{revision}" if revision else ""))
    names, making = shelf.files(), f"pull of {repo} at {shelf.commit}"
    before = unfinished(target)
    if before is not None and not before["making"].startswith("pull of "):
        raise TargetError(f"{partial_of(target)} is an unfinished {before['making']}; finish or remove it first")
    with held(target) as partial, explained_target(target, "run vindex pull again"):
        if before is None or before["making"] != making:
            empty(partial)
            begin(partial, making, names)
        advance = progress(f"pull {repo}", sum(map(shelf.size, names)))
        for name in names:
            path = partial / name
            if path.is_file() and sha256_of(path) == shelf.expected(name):
                advance(shelf.size(name), name)
            else:
                shelf.put(name, path, advance)
        sync(partial)
        open_vindex(partial)
        put(target, force=force, kinds=(VINDEX,))
    return open_vindex(target)
