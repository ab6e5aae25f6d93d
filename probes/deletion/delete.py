"""Delete facts from a loaded model, and measure a patch again: what `vindex gate3` does, as three functions.

Each leaves the model as it was, and reports to `progress` from the first seconds on. One fact (`run`):

1. Split its prompts into what the methods see and what they do not (`probes.facts.sets`).
2. Run everything once unpatched. A fact with P < 0.1 ends here: there is nothing to delete.
3. Every method asked for (`methods`) computes a change of one weight, which is measured and judged (`experiment`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from probes.deletion import record
from probes.deletion.bench import Bench
from probes.deletion.certificate import Exam
from probes.deletion.experiment import METHODS, MethodResult, judged, named
from probes.deletion.layer import Found, Trial
from probes.deletion.measure import KNOWN
from probes.deletion.options import KNOWN_FROM, Options
from probes.deletion.results import Claim, Deletion, Deletions
from probes.facts import Fact, Panel
from probes.facts.sets import split
from probes.live.load import Loaded
from probes.weights import patches
from probes.weights.delta import Delta
from probes.weights.patches import Patch
from vindex import scoring
from vindex.errors import PatchError, ProbeError, QueryError
from vindex.progress import Progress, silent
from vindex.reader import Vindex
from vindex.schema import load_record


def delete(
    model: Loaded,
    fact: str = "France/capital",
    *,
    method: str | Sequence[str] = "both",
    layer: int | None = None,
    vindex: Vindex | str | Path | None = None,
    facts: Panel | str | Path | None = None,
    chat: bool = False,
    seed: int = 0,
    certificate: bool = True,
    progress: Progress = silent,
) -> Deletion:
    """Delete `fact` (SUBJECT/RELATION) by a rank-1 change of one gate_proj, and measure what else it changes.

    Load the model with dtype="float32", as the command does: the rounding of bfloat16 alone fails `strict`.
    method: forward, geometric, rome, rome_plain, gradient, ultraedit or neurons, or several; "both" is forward and
    geometric, "all" every one. layer: the one to change, by default each method's own choice. vindex: whose directions
    `geometric` uses. facts: a JSON-lines file of your own, on top of the bundled ones. chat: ask in the model's chat
    template. seed: of the split and the controls. certificate: whether to attack what was deleted (`robust`).
    Raises ProbeError, FactError or QueryError, in one line, for what cannot be measured.
    """
    options = Options(named(method), seed, chat, layer, certificate=certificate)
    bench = Bench(model, facts, options, vindex, progress)
    chosen = bench.panel.find(fact)
    with bench.staged(progress(fact, bench.seconds)):
        return run(bench, chosen)


def delete_all(
    model: Loaded,
    relation: str | Sequence[str] = "capital",
    *,
    known_from: float | None = None,
    limit: int | None = None,
    method: str | Sequence[str] = "both",
    layer: int | None = None,
    vindex: Vindex | str | Path | None = None,
    facts: Panel | str | Path | None = None,
    chat: bool = False,
    seed: int = 0,
    certificate: bool = True,
    output: str | Path | None = None,
    resume: bool = False,
    each: Callable[[Deletion], object] = lambda _: None,
    progress: Progress = silent,
) -> Deletions:
    """Delete every fact of a relation, or of several, that the model knows, each from the unchanged model.

    known_from: least P of the answer before, by default 0.2; limit: at most so many facts of each relation. output: the
    record's file, written anew after every fact; resume: skip the facts that it has, of a run with the same options.
    each: called with every fact as soon as it is done. Anything else is as for `delete`.
    Raises ProbeError where no such fact is known, QueryError where the record cannot be gone on with.
    """
    if resume and output is None:
        raise QueryError("there is nothing to resume without a record; name its file as output (-o)")
    options = Options(named(method), seed, chat, layer, certificate=certificate)
    bench = Bench(model, facts, options, vindex, progress)
    relations = [relation] if isinstance(relation, str) else list(dict.fromkeys(relation))
    limit = None if limit is None else scoring.positive("limit", limit)
    known_from = KNOWN_FROM if known_from is None else known_from
    asked = {"relations": relations, "known_from": known_from}
    chosen = [fact for name in relations for fact in bench.known(name, known_from)[:limit]]
    if not chosen:
        raise ProbeError(f"{model.name}: knows no fact of {', '.join(relations)} with P ≥ {known_from}")
    entries = _resumed(bench, asked, Path(output)) if resume and output else []
    left = [fact for fact in chosen if fact.name not in {entry["name"] for entry in entries}]
    advance = progress("facts", len(left) * bench.seconds)
    for fact in left:
        with bench.staged(advance, f"{fact.name}: "):
            result = run(bench, fact)
        entries.append(record.entry(result))
        if output:
            Deletions(bench, asked, tuple(entries)).save(output)
        each(result)
    return Deletions(bench, asked, tuple(entries))


def verify_patch(
    model: Loaded,
    patch: Patch | str | Path,
    *,
    fact: str | None = None,
    facts: Panel | str | Path | None = None,
    chat: bool | None = None,
    seed: int | None = None,
    certificate: bool = True,
    progress: Progress = silent,
) -> Deletion:
    """Measure a patch again from the unpatched model and the patch alone, beside the verdicts that it records.

    For a third party, who has neither the run that made it nor the method. What is not given is as the patch says;
    without a certificate, `robust` is not confirmed.
    Raises PatchError when the patch was made for other weights, or does not say which fact it deletes.
    """
    found = patch if isinstance(patch, Patch) else patches.read(Path(patch))
    name = fact or _said(found, "fact", "")
    if not name:
        raise PatchError("the patch does not say which fact it deletes; give --fact SUBJECT/RELATION (fact=…)")
    seed = _said(found, "seed", 0) if seed is None else seed
    chat = _said(found, "chat", False) if chat is None else chat
    bench = Bench(model, facts, Options((), seed, chat, certificate=certificate), None, progress)
    patches.require_base(model.path, found)
    chosen = bench.panel.find(name)
    with bench.staged(progress(name, bench.seconds)):
        done = run(bench, chosen, found.delta)
    measured = {standard: verdict.result for standard, verdict in done.verdicts.items()}
    recorded = _said(found, "verdicts", {}).items()
    return replace(done, claims=tuple(Claim(name, str(said), measured.get(name, "none")) for name, said in recorded))


def run(bench: Bench, fact: Fact, given: Delta | None = None) -> Deletion:
    """Delete one fact by every method asked for, or by the change that is given, and measure it.

    The model is as before when this returns.
    """
    began = time.perf_counter()
    bench.tick("unpatched answers", 5)
    sets = split(bench.panel, fact, bench.encoder, bench.options.seed)
    before = bench.baseline.of([sets.headline])[0]
    results: dict[str, MethodResult] = {}
    if before.probability >= KNOWN:
        bench.baseline.prepare(sets)
        exam, trial = None, Trial(bench, fact, sets.fit)
        if bench.options.certificate:
            bench.tick("attacks on the unpatched model", 25)
            exam = Exam(bench.baseline, bench.encoder, bench.panel, sets, bench.options.attacks)
        for method in bench.options.methods if given is None else (given.method,):
            start = time.perf_counter()
            found = METHODS[method](trial) if given is None else Found(given)
            results[method] = judged(bench, sets, exam, found, start)
    return Deletion(bench, sets, before, results, time.perf_counter() - began)


def _said(patch: Patch, key: str, default: Any) -> Any:
    """What a patch says of itself, or else what `gate3` has by default. Raises PatchError on another type."""
    found = patch.provenance.get(key)
    if found is not None and type(found) is not type(default):
        kind = type(default).__name__
        raise PatchError(f"provenance: {key} is {found!r}, expected {kind}; the patch file was edited")
    return default if found is None else found


def _resumed(bench: Bench, asked: dict[str, Any], path: Path) -> list[record.Entry]:
    """The facts in the record of a run that was stopped. Raises QueryError unless it was one of the same options."""
    found = load_record(path)
    if found.get("record") != record.ALL:
        raise QueryError(f"{path}: expected the record of gate3 --all ({record.ALL}); name the file that -o gave it")
    for key, wanted in (record.choices(bench) | asked).items():
        if found.get(key) != wanted:
            theirs, ours = _differing(found.get(key), wanted), _differing(wanted, found.get(key))
            raise QueryError(f"{path}: made with {key} {theirs}, not {ours}; repeat its options, or name another file")
    return list(found["facts"])


def _differing(one: Any, other: Any) -> Any:
    """What `one` has otherwise than `other`."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _differing(value, other.get(key)) for key, value in one.items() if value != other.get(key)}
    return one
