"""Delete facts from a loaded model, and measure a patch again: what `vindex gate3` does, as three functions.

Each leaves the model as it was. Work tells of itself through `progress`, from the first seconds on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probes.deletion import record
from probes.deletion.bench import Bench, Options
from probes.deletion.experiment import run
from probes.deletion.methods import named
from probes.deletion.results import Deletion, Deletions, Verification
from probes.deletion.stages import Stages, expected_seconds
from probes.deletion.verify import claimed, verify
from probes.facts import Panel
from probes.live.load import Loaded
from probes.weights import patches
from probes.weights.patches import Patch
from vindex.errors import PatchError, ProbeError, QueryError
from vindex.progress import Progress, silent
from vindex.reader import Vindex, open_vindex
from vindex.schema import load_record

KNOWN_FROM = 0.2
"""Least probability of an answer before, for `delete_all` to delete its fact."""


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

    method: forward, geometric, rome, rome_plain, gradient, ultraedit or neurons, or several; "both" is forward and
    geometric, "all" every one. layer: the one to change, by default each method's own choice. vindex: whose directions
    `geometric` uses. facts: a JSON-lines file of your own, on top of the bundled ones. chat: ask in the model's chat
    template. seed: of the split and the controls. certificate: whether to attack what was deleted (`robust`).
    Raises ProbeError, FactError or QueryError, in one line, for what cannot be measured.
    """
    options = Options(named(method), seed, chat, layer, certificate=certificate)
    bench = Bench.of(model, facts, options, _gate(vindex), progress)
    return Deletion(bench, _told(bench, fact, progress, lambda found: run(bench, found)))


def delete_all(
    model: Loaded,
    relation: str | Sequence[str] = "capital",
    *,
    known_from: float = KNOWN_FROM,
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

    known_from: least P of the answer before; limit: at most so many facts of each relation. output: the record's file,
    written anew after every fact; resume: skip the facts that it has, of a run with the same options. each: called
    with every fact as soon as it is done. Anything else is as for `delete`.
    Raises ProbeError where no such fact is known, QueryError where the record cannot be gone on with.
    """
    if resume and output is None:
        raise QueryError("there is nothing to resume without a record; name its file as output (-o)")
    options = Options(named(method), seed, chat, layer, certificate=certificate)
    bench = Bench.of(model, facts, options, _gate(vindex), progress)
    relations = [relation] if isinstance(relation, str) else list(relation)
    asked = {"relations": relations, "known_from": known_from}
    chosen = [fact for name in relations for fact, _ in bench.known(name, known_from)[:limit]]
    if not chosen:
        raise ProbeError(f"{model.name}: knows no fact of {', '.join(relations)} with P ≥ {known_from}")
    entries = _resumed(bench, asked, Path(output)) if resume and output else []
    left = [fact for fact in chosen if fact.name not in {entry["name"] for entry in entries}]
    advance = progress("facts", len(left) * expected_seconds(bench))
    for fact in left:
        bench.tick = stages = Stages(bench, advance, f"{fact.name}: ")
        result = run(bench, fact)
        stages.end()
        entries.append(record.entry(bench, result))
        if output:
            Deletions(bench, asked, tuple(entries)).save(output)
        each(Deletion(bench, result))
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
) -> Verification:
    """Measure a patch again from the unpatched model and the patch alone, beside the verdicts that it records.

    What is not given is as the patch says; without a certificate, `robust` is not confirmed.
    Raises PatchError when the patch was made for other weights, or does not say which fact it deletes.
    """
    found = patch if isinstance(patch, Patch) else patches.read(Path(patch))
    said = claimed(found)
    name = fact or said.fact
    if name is None:
        raise PatchError("the patch does not say which fact it deletes; give --fact SUBJECT/RELATION (fact=…)")
    seed, chat = said.seed if seed is None else seed, said.chat if chat is None else chat
    options = Options((), seed, chat, certificate=certificate)
    bench = Bench.of(model, facts, options, progress=progress)
    return Verification(bench, *_told(bench, name, progress, lambda fact: verify(bench, found, fact)))


def _told(bench: Bench, name: str, progress: Progress, work: Callable[[Any], Any]) -> Any:
    """Do the work on one fact, telling its stages."""
    fact = bench.panel.find(name)
    bench.tick = stages = Stages(bench, progress(fact.name, expected_seconds(bench)))
    done = work(fact)
    stages.end()
    return done


def _gate(vindex: Vindex | str | Path | None) -> Any:
    """(L, F, H) gate directions of a vindex, if there is one."""
    if vindex is None:
        return None
    return (vindex if isinstance(vindex, Vindex) else open_vindex(vindex)).gate


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
