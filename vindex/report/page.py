"""`vindex.write_report`: gather, render, write.

1. Records are read and refused before any work; then the vindex is verified and its directions are gathered. One of
   another family (docs/families.md) fills what it has data for.
2. page.html is rendered: everything from a model or a record is text, escaped, as is what would hide or reorder text;
   the directions go in as JSON.
3. page.css and page.js stand in the page. Its content security policy allows that one script and no request at all.

A trace by itself is a page of the same make, without a script (`trace_page`).
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Any

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vindex import targets
from vindex.console import shown, visible
from vindex.distribution import version
from vindex.errors import TargetError
from vindex.files import ANY, opened
from vindex.progress import Progress, silent
from vindex.reader import Vindex
from vindex.report import panels, traced
from vindex.report.directions import directions
from vindex.report.masthead import masthead
from vindex.report.moved import beside
from vindex.report.strip import strip

MARK = b"<!doctype html>\n<!-- vindex report -->"


def write_report(
    v: Vindex,
    path: str | Path,
    *,
    probe: str | Path | None = None,
    gate3: str | Path | None = None,
    gates: str | Path | None = None,
    trace: str | Path | None = None,
    against: Vindex | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write v as one self-contained page, with what the given records measured. Returns its path.

    probe, gate3, gates, trace: files of those commands' records. against: a vindex to set beside v. force: replace a
    file that is no report. Raises TargetError where the page cannot be written, QueryError on a record of another kind
    or of other weights and on vindexes that cannot be compared, FormatError on a record that is damaged.
    """
    check_target(Path(path), force=force)
    found = {
        "constants": panels.constants(Path(probe), v) if probe else None,
        "deletion": panels.deletion(Path(gate3), v) if gate3 else None,
        "gates": panels.gates(Path(gates), v) if gates else None,
        "trace": traced.trace(Path(trace), v) if trace else None,
        "beside": beside(v, against, progress) if against else None,
    }
    targets.write_bytes(Path(path), render(v, found, progress).encode())
    return Path(path)


def check_target(path: Path, *, force: bool) -> None:
    """Raise TargetError unless a page can be written at `path`, over nothing or a report, or over any file by force."""
    targets.check_file(path)
    if path.suffix != ".html":
        raise TargetError(f"{path}: reports are written as .html")
    if path.is_file() and not force:
        with opened(path, ANY) as file:
            if file.read(len(MARK)) != MARK:
                raise TargetError(
                    f"{path} exists and is no report; choose another place, or replace it with --force (force=True)"
                )


def render(v: Vindex, found: dict[str, Any], progress: Progress = silent) -> str:
    """The page. found: the panels by name, None where there is no record."""
    head = masthead(v, progress)
    data = directions(v, progress)
    norms = found["constants"].norms if found["constants"] else None
    script = _part("page.js")
    return _rendered(
        "page.html",
        v=v,
        head=head,
        vindex_name=quote(v.path.name),
        created=datetime.now(UTC),
        strip=strip(v, data["clusters"], norms),
        **found,
        data=Markup(orjson.dumps(data).decode().replace("<", "\\u003c")),
        script=Markup(script),
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def trace_page(record: Mapping[str, Any]) -> str:
    """A page of one trace's record."""
    return _rendered("trace_page.html", trace=traced.traced(record, None))


def _rendered(template: str, **given: Any) -> str:
    environment = Environment(
        loader=PackageLoader("vindex.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {"visible": visible, "number": number}
    return environment.get_template(template).render(version=version(), style=Markup(_part("page.css")), **given)


def _part(name: str) -> str:
    return resources.files("vindex.report").joinpath(name).read_text()


def number(value: float | None, form: str = ".3g") -> str:
    """A number with a real minus, a space before its %; – for what was not measured."""
    return "–" if value is None else format(value, form).replace("-", "−").replace("%", "\N{NO-BREAK SPACE}%")
