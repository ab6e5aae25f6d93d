"""The Hugging Face Hub as this project meets it: snapshots in its cache, and every failure in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vindex.errors import CheckpointError, first_line

WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges*", "README.md", "LICENSE*"]
ADDRESS = re.compile(r",? for url:? \S+")  # in a message: it is long, and what signs it lets others in
UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


class Address(NamedTuple):
    """What `hf://owner/name[@revision][/FILE.gguf]` names."""

    repo: str
    revision: str | None
    file: str | None


def on_the_hub(place: str | Path) -> str | None:
    """The `hf://…` that a place is, or None. A Path has lost one of the slashes, which is put back."""
    text = str(place)
    return f"hf://{text[4:].lstrip('/')}" if text.startswith("hf:/") else None


def address_of(name: str) -> Address:
    """The parts of an address. Raises CheckpointError when it is none."""
    parts = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+|refs/[^/]+/[^/]+))?(?:/(.+\.gguf))?", name)
    if not parts or not is_hub_id(parts[1]):
        raise CheckpointError(f"{name}: expected hf://owner/name[@revision], or that and /FILE.gguf")
    return Address(*parts.groups())


class Cached(NamedTuple):
    """A snapshot in the Hub's cache."""

    repo: str
    revision: str
    """The commit."""


def cached(directory: Path) -> Cached | None:
    """The repository and commit of a path into the Hub's cache, `…/models--owner--name/snapshots/COMMIT`, or None."""
    path = directory.resolve()
    folder = path.parent.parent.name
    if not folder.startswith("models--") or path.parent.name != "snapshots":
        return None
    return Cached(folder.removeprefix("models--").replace("--", "/", 1), path.name)


def refuse_revision(name: str, revision: str | None) -> None:
    """Raise CheckpointError when a revision is asked of something on disk, which has none to choose from."""
    if revision is not None:
        raise CheckpointError(
            f"{name}: --revision {revision} chooses among the commits of a Hub model, and this is on disk; leave it out"
        )


def snapshot(repo: str, revision: str | None = None, *, wanted: Sequence[str] = WANTED) -> Path:
    """The directory of a repository in the Hub's cache, downloaded where it is missing; its name is the commit.

    wanted: patterns of the files. HF_HUB_OFFLINE is honoured. Raises CheckpointError.
    """
    from huggingface_hub import snapshot_download

    with explained(repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted], ignore_patterns=UNWANTED))


def one_file(repo: str, name: str) -> Path:
    """A file of a repository in the Hub's cache, downloaded where it is missing. Raises CheckpointError."""
    path = snapshot(repo, wanted=[name]) / name  # which, unlike a download of one file, does not try for half a minute
    if not path.is_file():
        raise CheckpointError(f"{repo} has no {name}; name a model that has one")
    return path


@contextmanager
def explained(repo: str, revision: str | None, doing: str = "download") -> Iterator[None]:
    """Turn what the Hub's client raises into a CheckpointError of one line that says the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        page = "/".join(repo.split("/")[:2])  # of a file, its repository
        reason = f"access is gated; accept its terms on https://huggingface.co/{page}, then run `hf auth login`"
        raise CheckpointError(f"{repo}: {reason}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: there is no revision {revision}; leave it out for the newest") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = (
            "no such directory here and no such model on the Hub; check the spelling, or log in if it is private "
            "(`hf auth login`, or HF_TOKEN)"
        )
        raise CheckpointError(f"{repo}: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = (
            "no such directory, not in the Hub cache, and the Hub cannot be reached; download it first or go online"
        )
        raise CheckpointError(f"{repo}: {reason}") from error
    except RemoteEntryNotFoundError as error:
        reason = f"{doing} failed: the Hub lists what it has not; ask its owner to push it again"
        raise CheckpointError(f"{repo}: {reason}") from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it to go on") from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            reason = f"{doing} is not allowed with this token ({error.response.status_code})"
            raise CheckpointError(f"{repo}: {reason}; `hf auth login` with one that may, or set HF_TOKEN") from error
        raise CheckpointError(f"{repo}: {doing} failed ({reason_of(error)}); try again") from error


def reason_of(error: BaseException) -> str:
    """The first line of what the Hub's client says, without the address that was asked."""
    return ADDRESS.sub("", first_line(error))
