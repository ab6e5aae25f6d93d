"""What `vindex gate3` prints: one fact in full, or a relation's facts and their rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vindex.console import line, print_table, say, styled

if TYPE_CHECKING:
    from rich.text import Text

    from probes.deletion.bench import Bench
    from probes.deletion.certificate import Certificate
    from probes.deletion.experiment import MethodResult
    from probes.deletion.measure import SetChange
    from probes.deletion.results import Claim, Deletion, Deletions
    from probes.deletion.verdict import Verdict

COLOURS = {"pass": "green", "fail": "red", "not_applicable": "yellow"}
MARKS = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "yellow")}
PASSED = {"pass": MARKS[True], "fail": MARKS[False], "not_applicable": MARKS[None]}
LABELS = {
    "paraphrases": "paraphrases",
    "other_subjects": "other subjects",
    "same_subject": "its other facts",
    "same_answer": "same answer",
}


def show(found: Deletion | Deletions) -> None:
    """Everything about one fact, or the rates of many."""
    from probes.deletion.results import Deletion

    _notes(found.bench)
    if not isinstance(found, Deletion):
        rates(found)
        return
    fact(found)
    if found.claims is not None:
        claims(found.claims)


def fact(found: Deletion) -> None:
    """Everything about one fact, method by method."""
    bench, before = found.bench, found.before
    say(
        styled(f"{found.fact.name} → {found.fact.answer}", "bold"),
        f"   P = {before.probability:.3f}, rank {before.rank}",
    )
    if not found.known:
        say(_coloured("not_applicable"), ": the model does not know this fact; P ≥ 0.1 is needed")
        say("it says: " + _tops(bench, before.top))
        return
    for name, outcome in found.methods.items():
        _method(bench, found, name, outcome)
    _controls(found)
    if len(found.methods) > 1:
        _side_by_side(found)
    say(f"{found.seconds:.0f} s for this fact")


def short_lines(found: Deletion) -> None:
    """One line for each method, printed as soon as a fact of --all is done."""
    for name, outcome in found.methods.items():
        effect = outcome.effect
        say(
            f"{found.fact.name:22} {name:10} L{outcome.delta.layer:<2} {effect.headline.loss:6.3f} "
            f"others {_signed(effect.groups['other_subjects'].mean)}",
            *(part for key, one in outcome.verdicts.items() for part in (f" {key} ", _coloured(one.result))),
        )


def rates(found: Deletions) -> None:
    """Shares that pass, with intervals, and every failure of the forward method named."""
    rows = [
        (method, name, f"{rate.passed}/{rate.of}", f"{rate.share:.1%}", f"{rate.low:.1%} – {rate.high:.1%}")
        for method in found.bench.options.methods
        for name, rate in found.rates(method).items()
    ]
    print_table("Facts that pass", ["method", "verdict", ">passed", ">share", ">95 % Wilson"], rows)
    for fact in found.facts:
        verdicts = fact["methods"].get("forward", {}).get("verdicts", {})
        for name, verdict in verdicts.items():
            if name != "published" and verdict["result"] == "fail":
                say(styled(*MARKS[False]), f" {fact['name']}, {name}: {verdict['reason']}")
    seconds = sum(fact["seconds"] for fact in found.facts)
    say(f"{len(found.facts)} facts in {seconds:.0f} s, {seconds / len(found.facts):.0f} s each")


def claims(found: Sequence[Claim]) -> None:
    """The verdicts that a patch records, beside those measured."""
    rows = [(styled(*MARKS[one.holds]), one.standard, one.recorded, one.measured) for one in found]
    if rows:
        print_table("What the patch records", ["", "verdict", "recorded", "measured"], rows)
    else:
        say("the patch records no verdicts: nothing to confirm")


def _notes(bench: Bench) -> None:
    """What to hold against the figures, and which layers no method may use."""
    if bench.caution:
        say(f"measured {bench.caution}")
    zero = [f"{layer} ({', '.join(names)})" for layer, names in bench.null_layers.items()]
    if zero:
        say(f"layers that write nothing, since a projection is zero, are left out: {', '.join(zero)}")


def _method(bench: Bench, result: Deletion, name: str, outcome: MethodResult) -> None:
    effect, head = outcome.effect, outcome.effect.headline
    rows = [("the fact", "1/1", _p(head.before.probability), _p(head.after.probability), _signed(head.loss), "", "")]
    for key, group in list(effect.groups.items())[1:]:
        label = LABELS.get(key) or _short(result.sets.held_out.reference[0].name, result)
        rows.append((label, *_group(group, result, least=key == "paraphrases")))
    print_table(
        f"{name}: layer {outcome.delta.layer}, ‖ΔW‖/‖W‖ {outcome.relative_norm:.3f}, {outcome.seconds:.0f} s",
        ["held out", ">known", ">before", ">after", ">loss", ">worst", "prompt"],
        rows,
        caption="loss = (P − P′)/P, mean; worst: the largest loss, of paraphrases the smallest.",
    )
    say(f"neutral text: KL {effect.neutral_kl:.2g} nats per token over {effect.neutral_tokens} tokens")
    say(f"before: {_tops(bench, head.before.top)}")
    say(f"after:  {_tops(bench, head.after.top)}")
    for verdict in outcome.verdicts.values():
        _verdict(verdict)
    if outcome.certificate:
        _families(outcome.certificate)


def _verdict(verdict: Verdict) -> None:
    say(styled(f"{verdict.standard} ", "bold"), _coloured(verdict.result, "bold "), f": {verdict.reason}")
    limits = [f"{'≥' if one.relation == '>=' else '≤'} {one.limit:g}" for one in verdict.criteria]
    if verdict.standard == "robust":
        say(f"\n    {'attack':23} {'before':>6} {'after':>7} {'value':>9}  limit")
        for one, limit in zip(verdict.criteria, limits, strict=True):
            value, _, _, before, after = one.figure
            figures = f" {one.name:23} {_g(before):>6} {_g(after):>7} {_g(value):>9}  {limit}"
            say("  ", styled(*MARKS[one.holds]), figures)
        return
    rows = [
        (styled(*MARKS[one.holds]), one.name, _g(one.figure.value), limit, str(one.figure.counted))
        for one, limit in zip(verdict.criteria, limits, strict=True)
    ]
    print_table("", ["", "criterion", ">value", ">limit", ">n"], rows)


def _families(found: Certificate) -> None:
    """What is known of each family of prompts, and how often the model says the answer before and after."""
    greedy, sampled = found.said(sampled=False), found.said(sampled=True)
    rows = []
    for name in dict.fromkeys((*found.families, *greedy)):
        group = found.families.get(name)
        asked = (f"{len(group.changes)}/{group.asked}", _g(group.before), _g(group.after)) if group else ("", "", "")
        said = [f"{_g(one.before)} {_g(one.after)}" if one else "" for one in (greedy.get(name), sampled.get(name))]
        rows.append((name, *asked, *said))
    columns = ["family", ">known", ">P before", ">P after", ">says it", ">sampled"]
    print_table(
        "Asked otherwise, and writing freely", columns, rows, caption="says it: share of texts, before and after."
    )


def _side_by_side(found: Deletion) -> None:
    """What decides `strict`, a row for each method."""
    rows = []
    for row, outcome in zip(found.rows(), found.methods.values(), strict=True):
        losses = [row[key] for key in ("loss", "paraphrases", "other subjects", "its other facts", "same answer")]
        shown = ["–" if loss is None else f"{loss:.3f}" for loss in losses]
        verdicts = line(*(part for one in outcome.verdicts.values() for part in (styled(*PASSED[one.result]), " ")))
        rows.append((row["method"], str(row["layer"]), *shown, f"{row['neutral KL']:.0e}", verdicts))
    columns = ["method", ">L", ">fact", ">para", ">others", ">own", ">same", ">KL", "verdicts"]
    caption = (
        "Losses: the fact, paraphrases, other subjects (|loss|), its other facts, other facts with the answer. "
        f"Verdicts: {', '.join(found.verdicts)}."
    )
    print_table("Methods side by side", columns, rows, caption=caption)


def _controls(result: Deletion) -> None:
    rows = [
        (kind, name, _span([c.suppression for c in some]), _span([c.reference_loss for c in some]))
        for name, outcome in result.methods.items()
        for kind in dict.fromkeys(control.kind for control in outcome.controls)
        for some in [[control for control in outcome.controls if control.kind == kind]]
    ]
    print_table("Controls at equal ‖ΔW‖", ["control", "of", ">suppression", ">reference loss"], rows)


def _group(group: SetChange, result: Deletion, least: bool) -> tuple[str, str, str, str, str, str]:
    if not group.changes:
        return (f"0/{group.asked}", "", "", "", "", "the model knows none")
    extreme = group.least if least else group.worst
    assert extreme is not None, "a set with changes has a worst one"
    worst = _short(extreme.name, result)
    return (
        f"{len(group.changes)}/{group.asked}",
        _p(group.before),
        _p(group.after),
        _signed(group.mean),
        _signed(extreme.loss),
        worst,
    )


def _short(name: str, result: Deletion) -> str:
    """A prompt's name without what goes without saying: the fact's own subject and relation, and template 0."""
    own = result.sets.fact
    name = name.replace(f"{own.subject}/", "", 1) if name.startswith(f"{own.subject}/") else name
    return name.replace(f"/{own.relation}", "").removesuffix("#0")


def _coloured(result: str, also: str = "") -> Text:
    return styled(result, also + COLOURS[result])


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _g(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _span(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    return f"{found[0]:+.3f}" if len(found) == 1 else f"{min(found):+.3f} … {max(found):+.3f}"


def _tops(bench: Bench, top: Sequence[tuple[int, float]]) -> str:
    decode: Any = bench.loaded.tokenizer.decode
    return "  ".join(f"{decode([token])!r} {share:.2f}" for token, share in top)
