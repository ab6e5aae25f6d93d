"""The command that measures C1–C5 on a live model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vindex.console import print_json, print_table, progress, say, styled, warn
from vindex.demo import or_bundled

if TYPE_CHECKING:
    from probes.live.load import Loaded
    from vindex.progress import Progress
    from vindex.reader import Vindex

# The curves that the tables thin out; all of them are in the record and on the plot.
LEFT_TO_THE_RECORD = {
    *(f"|h| < {threshold}" for threshold in ("0.002", "0.005", "0.02")),
    *(f"|h| < {threshold} no_sink" for threshold in ("0.001", "0.002", "0.005", "0.02", "0.05", "0.1")),
}


def probe(
    model: Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id such as Qwen/Qwen3-0.6B.")],
    vindex: Annotated[
        Path | None, typer.Option(help="A vindex of the same model: directions and spectra come from it.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A UTF-8 file, or the name of a bundled text; repeatable. Default: the eight bundled texts."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    attn: Annotated[str, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = "sdpa",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts to a forward pass; memory grows with it.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the whole record here; - prints it instead of the tables.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw curves, CKA and spectra to this .html or .png.")] = None,
) -> None:
    """Measure the constants C1–C5 on a live model.

    Each comes with its interval, its variants and its null.

    The first text gives the headline values; means and intervals are over all texts.
    """
    from transformers.utils.logging import disable_progress_bar

    from probes import texts
    from probes.charts import check_target
    from probes.live.load import load
    from probes.suite.plot import draw
    from vindex.targets import check_file, write_json

    to_stdout = json == Path("-")
    if json and not to_stdout:
        check_file(json, or_stdout=True)
    if plot:
        check_target(plot)
    disable_progress_bar()
    loaded = load(or_bundled(model), dtype=dtype, device=device, attn=attn, revision=revision)
    for note in loaded.notes:
        warn(f"note: {note}")
    record = measure(loaded, vindex, text or texts.BUNDLED, batch_size)
    if plot:
        draw(record, plot)
    if json and not to_stdout:
        write_json(json, record)
    if to_stdout:
        print_json(record)
        return
    print_record(record)
    for what, target in (("record", json), ("plot", plot)):
        if target:
            say(f"{what}: {target}")


def measure(loaded: Loaded, directory: Path | None, names: Sequence[str], batch_size: int) -> dict[str, Any]:
    """The record of one run, with a progress bar for each stage."""
    from probes.live import match
    from probes.live.sites import ffns
    from probes.suite import record
    from probes.suite import run as suite

    suite.encode(loaded, names)  # a bad text is told before any work
    opened = _open(directory)
    with progress() as stage:
        digests = hash_weights(loaded, stage)
        if opened is not None:
            match.require_match(loaded, opened, digests)
        results = suite.run(
            loaded,
            names,
            vindex=opened,
            batch_size=batch_size,
            on_text=stage("texts", len(names)),
            on_layer=stage("weights", len(ffns(loaded.model))),
        )
    return record.build(loaded, results, digests)


def hash_weights(loaded: Loaded, stage: Progress) -> dict[str, str]:
    """SHA-256 of each weight file by name, with a progress bar: every record says which weights it is of."""
    from probes.live import match

    size = sum(file.stat().st_size for file in match.weight_files(loaded))
    return match.weights_sha256(loaded, stage("hashing", size))


def print_record(record: Mapping[str, Any]) -> None:
    """C1–C5 with their variants, the spectra, and the published values, as three tables."""
    model, texts = record["model"], record["texts"]
    rows: list[Sequence[Any]] = []
    for symbol, entry in record["constants"].items():
        value, *others = _cells(entry)
        rows.append((*(styled(cell, "bold") for cell in (symbol, entry["name"], value)), *others))
        shown = ((name, variant) for name, variant in entry["variants"].items() if name not in LEFT_TO_THE_RECORD)
        rows.extend(("", f"  {name}", *_cells(variant)) for name, variant in shown)
    setting = f"{model['dtype']}, {model['attn_implementation']}, {model['device']}"
    print_table(
        f"C1–C5 of {model['name']} (definition {record['definition']}; {len(texts)} × {record['choices']['tokens']} "
        f"tokens; {setting})",
        ["", "constant", f">{Path(texts[0]['name']).stem}", ">mean", ">95 % interval", ">null"],
        rows,
        caption=f"mean and interval: over {len(texts)} text{'s' * (len(texts) > 1)}; C3 over adjacent layers. "
        + " ".join([_sinks(record), *_nulls(record)]),
    )
    if record["model"].get("num_experts"):
        print_routing(record)
    print_spectra(record["spectra"])
    print_published(record)


def print_routing(record: Mapping[str, Any]) -> None:
    """Which experts fired in the headline text, over the mixture layers."""
    model, text = record["model"], record["texts"][0]
    found = [layer for layer in record["layers"][0]["experts"] if layer]
    experts, top_k = model["num_experts"], model["top_k"]
    rows = []
    for name, key, null in (
        ("share of experts that fired", "fired", found[0]["fired_null"]),
        ("most frequent expert's share of firings", "largest_share", 1 / experts),
        ("effective experts (exp of entropy)", "effective", experts),
    ):
        values = [layer[key] for layer in found]
        cells = (sum(values) / len(values), min(values), max(values), null)
        rows.append((name, *(_number(float(value)) for value in cells)))
    shared = model["shared_intermediate_size"]
    print_table(
        f"Routing in {Path(text['name']).stem}: {experts} experts, top {top_k}{', and a shared one' if shared else ''}",
        ["", ">mean", ">lowest", ">highest", ">uniform"],
        rows,
        caption=f"over {len(found)} mixture layers of {model['num_layers']}; uniform: routers that choose at random. "
        f"Recomputed FFN outputs differ by at most {max(layer['mismatch'] for layer in found):.0e} of their norm.",
    )


def print_spectra(spectra: Mapping[str, Any]) -> None:
    """var@k of gate_proj and down_proj over layers, beside the Marchenko–Pastur floor."""
    rows = []
    for projection in ("gate_proj", "down_proj"):
        entry = spectra[projection]
        for shape, layers in _shapes(entry).items():
            for rank, every in entry["var"].items():
                floor = entry["marchenko_pastur"][rank]
                values = [every[layer] for layer in layers if every[layer] is not None]
                cells = (sum(values) / len(values), min(values), max(values)) if values else (None, None, None)
                cells += (floor[layers[0]] if entry["shape"] is None else floor,)
                shown = ("–" if value is None else f"{value:.3f}" for value in cells)
                rows.append((projection, "×".join(map(str, shape)), f"var@{rank}", *shown))
    print_table(
        f"Spectra (from {spectra['source']}): share of ‖W‖² in the leading singular values",
        ["weight", "shape", "", ">mean", ">lowest", ">highest", ">random floor"],
        rows,
        caption="over layers; floor: Marchenko–Pastur, a random matrix of this shape",
    )


def _shapes(entry: Mapping[str, Any]) -> dict[tuple[int, ...], list[int]]:
    """The layers of each shape: one, unless dense layers and mixtures differ."""
    shapes = entry.get("shapes") or [entry["shape"]] * len(entry["squared_norm"])
    found: dict[tuple[int, ...], list[int]] = {}
    for layer, shape in enumerate(shapes):
        found.setdefault(tuple(shape), []).append(layer)
    return found


def print_published(record: Mapping[str, Any]) -> None:
    """Ours beside the values on published cards."""
    published = record["published"]
    symbols = tuple(record["constants"])
    ours = [_number(record["constants"][symbol]["value"]) for symbol in symbols]
    own = (f"{record['model']['name']} (ours, {record['definition']})", *ours)
    rows: list[Sequence[Any]] = [(*(styled(cell, "bold") for cell in own), "")]
    for name, entry in published["constants"].items():
        rows.append((name, *(_number(entry.get(symbol)) for symbol in symbols), entry.get("remarks", "")))
    print_table(
        f"Published values ({published['status']}: texts and thresholds differ, not comparable)",
        ["model", *(f">{symbol}" for symbol in symbols), "remarks"],
        rows,
    )


def _open(directory: Path | None) -> Vindex | None:
    if directory is None:
        return None
    from vindex.reader import open_vindex

    return open_vindex(directory)


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    low_high = entry["interval"]
    several = entry["n"] > 1
    return (
        _number(entry["value"]),
        _number(entry["mean"]) if several else "–",
        f"{_number(low_high[0])} … {_number(low_high[1])}" if low_high else "–",
        _number(entry["null"]),
    )


def _sinks(record: Mapping[str, Any]) -> str:
    """What no_sink dropped besides token 0, in the headline text."""
    sinks = record["layers"][0]["sinks"]
    layers = Counter(position for dropped in sinks for position in dropped if position)
    others = [f"token {position} in {count} of {len(sinks)} layers" for position, count in sorted(layers.items())]
    return f"no_sink drops {', '.join(['token 0', *others])}."


def _nulls(record: Mapping[str, Any]) -> list[str]:
    """Which layers some means leave out, and why; nothing for a model without any."""
    found = record["null_layers"]
    said = [
        f"{name} is zero in {_places(found[name])}: no direction there{left_out}."
        for name, left_out in (("gate_proj", ", left out of C3 and var@k"), ("down_proj", ", left out of var@k"))
        if found[name]
    ]
    if found["hidden"]:
        said.append(f"h is zero in {_places(found['hidden'])}: left out of the thresholds relative to its rms.")
    if found["experts"]:
        experts = ", ".join(f"{layer}/{expert}" for layer, expert in found["experts"])
        said.append(f"gate_proj is zero in experts {experts} (layer/expert): left out of C3 of single experts.")
    return said


def _places(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:#.3g}".rstrip(".")
