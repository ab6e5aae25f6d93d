"""C1–C5 of a record as tables, and what they say of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vindex.console import print_table, say, styled

# The curves that the tables thin out; all of them are in the record and on the plot.
LEFT_TO_THE_RECORD = {
    *(f"|h| < {threshold}" for threshold in ("0.002", "0.005", "0.02")),
    *(f"|h| < {threshold} no_sink" for threshold in ("0.001", "0.002", "0.005", "0.02", "0.05", "0.1")),
}


def print_record(record: Mapping[str, Any], everything: bool = False) -> None:
    """C1–C5 and what each of them says; or with `everything` their variants, routing, spectra and published values."""
    from probes.suite.words import choice_of_stages, meanings

    print_constants(record, everything)
    say()
    for symbol, sentence in meanings(record).items():
        say(styled(symbol, "bold"), f"  {sentence}")
    say()
    say(choice_of_stages(record))
    say()
    if everything:
        if record["model"].get("num_experts"):
            print_routing(record)
        print_spectra(record["spectra"])
        print_published(record)


def print_constants(record: Mapping[str, Any], variants: bool) -> None:
    """A row each, with their variants below where these are asked for."""
    model, texts = record["model"], record["texts"]
    rows: list[Sequence[Any]] = []
    for symbol, entry in record["constants"].items():
        value, *others = _cells(entry)
        rows.append((*(styled(cell, "bold") for cell in (symbol, entry["name"], value)), *others))
        more = entry["variants"].items() if variants else ()
        rows.extend(("", f"  {name}", *_cells(one)) for name, one in more if name not in LEFT_TO_THE_RECORD)
    setting = f"{model['dtype']}, {model['attn_implementation']}, {model['device']}"
    print_table(
        f"C1–C5 of {model['name']} (definition {record['definition']}; {len(texts)} × {record['choices']['tokens']} "
        f"tokens; {setting})",
        ["", "constant", f">{Path(texts[0]['name']).stem}", ">mean", ">95 % interval", ">null"],
        rows,
        caption=f"mean and interval: over {len(texts)} text{'s' * (len(texts) > 1)}; C3 over adjacent layers. "
        + " ".join([*([_sinks(record)] if variants else []), *_nulls(record)]),
    )


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
