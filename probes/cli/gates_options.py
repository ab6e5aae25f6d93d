"""What the commands of `vindex gates` share: their options, the classes these come from, and what they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from vindex.errors import ProbeError

if TYPE_CHECKING:
    from probes.gates.gates import Gates, Mask

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory of gates in the published layout.")]
Threshold = Annotated[float | None, typer.Option(help="Turn off the neurons with λ below this.")]
Off = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help="Turn off this share of the neurons, those of lowest λ: 25% or 0.25."),
]
Soft = Annotated[bool, typer.Option("--soft", help="Multiply by λ instead of masking.")]
Indices = Annotated[bool, typer.Option("--indices", help="Turn off what neuron_indices.json lists.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what this tool made there.")]
ForgetFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Facts as gate3 --facts takes, or rows (.jsonl, .parquet). Default: the atlas's."
    ),
]
RetainFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Reasoning: .jsonl or .parquet, NuminaMath's columns or ours. Default: the atlas's."
    ),
]
PanelDirectory = Annotated[
    Path | None, typer.Option("--panel", metavar="DIR", help="What `vindex gates panel` made, in place of files.")
]


def with_options(
    of: type, presets: Mapping[str, Mapping[str, Any]] = {}
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a handler that takes **options an option of the command line for every field of a dataclass.

    Type, default and help are the field's. An option that is not given is None: its default is the field's, or that of
    the preset, an option of the handler's own. presets: the fields that each of them changes.
    """
    types = get_type_hints(of)
    changed = {name for preset in presets.values() for name in preset}
    made = [
        _parameter(field, types[field.name], field.name in changed) for field in fields(of) if field.name != "preset"
    ]

    def give(handler: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(handler, eval_str=True)
        own = [given for given in signature.parameters.values() if given.kind is not given.VAR_KEYWORD]
        handler.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        return handler

    return give


def _parameter(field: Field[Any], kind: Any, changed: bool) -> inspect.Parameter:
    plain = next((part for part in get_args(kind) if part is not type(None)), kind) if _may_be_none(kind) else kind
    if get_origin(plain) is tuple:
        plain = list[get_args(plain)[0]]  # type: ignore[misc]
    elif get_origin(plain) is not None:  # a Literal, whose values the class checks
        plain = str
    help_text = field.metadata["help"]
    if field.default is not None:
        shown = "no" if field.default is False else str(field.default)
        help_text += f" [{shown}, or the preset's]" if changed else f" [{shown}]"
    option = typer.Option(help=help_text, show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[plain | None, option]
    )


def _may_be_none(kind: Any) -> bool:
    return type(None) in get_args(kind)


def chosen_of(
    gates: Gates, directory: Path, threshold: float | None, off: str | None, indices: bool, soft: bool
) -> Gates | Mask:
    """The gates themselves, soft, or the mask that exactly one of the other options asks for."""
    if soft and (threshold is not None or off is not None or indices):
        raise ProbeError("--soft with a mask: choose one of --soft, --threshold, --off, --indices")
    return gates if soft else mask_of(gates, directory, threshold, off, indices, " or --soft")


def mask_of(
    gates: Gates, directory: Path, threshold: float | None, off: str | None, indices: bool, more: str = ""
) -> Mask:
    """The mask that exactly one of the options asks for. more: other ways that the command has."""
    if (threshold is not None) + (off is not None) + indices != 1:
        raise ProbeError(
            f"which neurons? give exactly one of --threshold, --off, --indices{more}; "
            f"`vindex gates stats {directory}` lists thresholds"
        )
    if indices:
        return gates.listed(directory)
    return gates.below(threshold) if threshold is not None else gates.off(_share(str(off)))


def _share(text: str) -> float:
    """`25%` or `0.25` as 0.25."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ProbeError(f"--off {text}: expected a share such as 25% or 0.25") from error
