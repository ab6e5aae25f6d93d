"""Commands that ask a vindex about tokens: score, search, feature. None of them loads torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vindex.cli import Json, Output, VindexPath, opened
from vindex.console import check_places, command, print_table, put, say, styled, typed, visible

if TYPE_CHECKING:
    from rich.text import Text

    from vindex.reader import Vindex
    from vindex.records import Coherence, Feature, FeatureHit, Response, Snippet, TokenScore
    from vindex.scores import Best

POLE_SHOWN = 4
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|HUB_ID",
        help="For a vindex without a tokenizer: that of its model, a directory, a Hub id or `atlas`.",
    ),
]


def score(
    path: VindexPath,
    tokens: Annotated[
        list[str] | None, typer.Argument(help='Words to score, quoted with their leading space: " Paris".')
    ] = None,
    ids: Annotated[list[int] | None, typer.Option("--id", help="A token's id; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Words, one a line, spaces kept; - reads standard input.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Order: z (largest |z|) or cosine (largest; as published).")] = None,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Features to show for each token.")] = 10,
    tokenizer: Tokenizer = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """Which gate directions read a token, beside what random directions reach.

    The cosine of the token's embedding with a direction; z is the cosine beside all tokens' on that direction. A word
    of several tokens is taken apart. Definitions: docs/scores.md.
    """
    check_places(output, reads=file)
    words = [*map(typed, tokens or ()), *(_lines_of(file) if file else ())]
    if not words and not ids:
        raise typer.BadParameter("give a word, --id or --file")
    with opened(path, tokenizer) as v:
        apart = [(word, v.vocabulary.take_apart(word)) for word in words]
        apart += [(None, [token_id]) for token_id in ids or ()]
        found = v.score([piece for _, pieces in apart for piece in pieces], k, by=by)
    named = [word for word, pieces in apart for _ in pieces]
    found = replace(found, top=tuple(replace(of, token=word) for word, of in zip(named, found.top, strict=True)))
    if put(found.record(), json, output):
        return
    left = iter(found.top)
    for word, pieces in apart:
        if len(pieces) > 1:
            shown = " ".join(repr(v.piece(piece)) for piece in pieces)
            say(styled(f"word {word!r} is {len(pieces)} tokens: {shown}{v.vocabulary.hint(word or '') or ''}", "bold"))
        for best in islice(left, len(pieces)):
            spaced = best.piece and v.family.can_spell and len(pieces) == 1
            other = v.vocabulary.hint(best.piece or "") if spaced else None
            hint = styled(f" ({other.removeprefix(', but ')})" if other else "", "dim")
            say(f"token {best.piece!r}, id {best.token_id}", hint)
            _print_best(v, best)


def search(
    path: VindexPath,
    text: Annotated[str, typer.Argument(help="A token; with and without its leading space.")],
    reads: Annotated[bool, typer.Option("--reads", help="Only gate directions.")] = False,
    writes: Annotated[bool, typer.Option("--writes", help="Only down directions.")] = False,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Directions of each side to show.")] = 10,
    tokenizer: Tokenizer = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """Directions that hold a token among the ten of a pole.

    Gate directions by cosine, down directions by logit-lens score, the largest first. --json has all of them.
    """
    from vindex.records import to_json

    check_places(output)
    text = typed(text)
    with opened(path, tokenizer) as v:
        found = v.search(text, reads=reads or not writes, writes=writes or not reads)
    if put(to_json(found), json, output):
        return
    shown = [one for side in ("reads", "writes") for one in [of for of in found if of.side == side][:k]]
    mixture = bool(v.index.num_experts)
    rows = [
        (
            one.side,
            one.layer,
            *([_expert_name(v, one.layer, one.expert)] if mixture else []),
            one.feature,
            f"{one.pole}{one.place}",
            f"{one.score:+.3f}",
            visible(one.piece),
        )
        for one in shown
    ]
    if rows:
        columns = ["side", ">layer", *([">expert"] if mixture else []), ">feature", ">pole", ">score", "token"]
        more = f"; {len(found) - len(shown)} more in --json or with -k" if len(found) > len(shown) else ""
        print_table("", columns, rows, f"pole: its sign and the token's place there; ␣ is a space{more}")
        first = shown[0]
        expert = ("--expert", first.expert) if first.expert is not None else ()
        down = ("--down",) if first.side == "writes" else ()
        say(f"next: {command('feature', path, first.layer, first.feature, *expert, *down)}")
    else:
        pole = v.index.down_top_k // (1 if v.family.one_pole else 2)
        say(f"no direction holds {text!r}, with or without a leading space, among the {pole} tokens of a pole")


def feature(
    path: VindexPath,
    layer: Annotated[int, typer.Argument(help="Layer, from 0.")],
    number: Annotated[int, typer.Argument(metavar="FEATURE", help="Feature, from 0: rank in the spectrum.")],
    expert: Annotated[
        int | None, typer.Option(help="Expert, from 0, where the layer has them; the shared one comes last.")
    ] = None,
    down: Annotated[
        bool, typer.Option("--down", help="Show the down direction of the same rank, which is another direction.")
    ] = False,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Nearest features to show.")] = 5,
    tokenizer: Tokenizer = None,
    json: Json = False,
    output: Output = None,
) -> None:
    """What one feature reads, what the model writes then, how alike these tokens are, and its neighbours.

    What is written is measured by vindex respond. Coherence is the mean cosine between the tokens of a pole, as z among
    the poles of random directions.
    """
    from vindex.errors import QueryError
    from vindex.format import SIGMA
    from vindex.records import to_json

    check_places(output)
    with opened(path, tokenizer) as v:
        found = v.feature(layer, number, expert=expert)
        nearest = v.nearest_features(layer, number, k, expert=expert)
        clusters = v.clusters(layer, number, expert=expert) if v.has(SIGMA) else None
        snippets = v.snippets(layer, number, expert=expert) if v.index.response_texts else None
        try:
            coherence, missing = v.coherence(layer, number, expert=expert), ""
        except QueryError as error:  # no statistics, no embeddings, or too many of them to fetch
            coherence, missing = None, str(error)
    more = {"coherence": to_json(coherence), "clusters": to_json(clusters), "nearest": to_json(nearest)}
    more |= {"snippets": to_json(snippets)}
    if put(to_json(found) | more, json, output):
        return
    _print_poles(v, found, coherence, down)
    for line in _of_responses(v, found):
        say(line)
    if snippets:
        _print_snippets(snippets)
    if missing:
        say(styled(f"no coherence: {missing}", "dim"))
    for side, together in clusters._asdict().items() if clusters else ():
        if len(together) > 1 and (down or side == "gate"):
            first, last = together[0], together[-1]
            say(f"{side} features {first} to {last} have nearly equal σ: single ones are arbitrary")
    say("nearest gate directions")
    _print_hits(v, [(v.stored_feature(hit.layer, hit.feature, expert=hit.expert), hit) for hit in nearest])


def _print_poles(v: Vindex, found: Feature, coherence: Coherence | None, down: bool) -> None:
    """The tokens of a feature's poles, and how alike they are."""
    likeness = coherence or (None,) * 4
    poles = [("reads +", likeness[0], found.reads), ("reads −", likeness[1], found.reads_against)]
    caption = "reads: cosine of embedding and gate direction; "
    if found.response:
        poles += [("writes +", None, found.response.writes), ("writes −", None, found.response.writes_against)]
        caption += "writes: logit lens of the response to + and, turned round, to −; "
    if v.family.neurons:
        poles += [("writes +", None, found.writes)]
        caption = "a neuron, not a direction; " + caption + "writes: LARQL's scores of what it adds; "
    elif down:
        poles += [("down +", likeness[2], found.writes), ("down −", likeness[3], found.writes_against)]
        caption += "down: logit lens of the down direction of the same rank, which is another direction; "
    place = f"layer {found.layer}" + (
        "" if found.expert is None else f", expert {_expert_name(v, found.layer, found.expert)}"
    )
    title = f"{place}, feature {found.feature}: gate σ {_sigma(found.gate_sigma)}"
    title += f", down σ {_sigma(found.down_sigma)}" if down else ""
    caption += "alike: z of the coherence of the tokens; ␣ is a space"
    rows = [(name, "–" if alike is None else f"{alike.z:+.1f}", _scored(tokens)) for name, alike, tokens in poles]
    print_table(title, ["pole", ">alike", "tokens (score)"], rows, caption)


def _print_snippets(snippets: list[Snippet]) -> None:
    rows = []
    for one in snippets:
        before, after = (visible(text).replace("␣", " ") for text in (one.before, one.after))
        rows.append(
            (f"{one.z:+.1f}", f"{Path(one.text).stem} {one.position}", f"{before}»{visible(one.token)}«{after}")
        )
    print_table("", [">z", "text, token", "read most at »«"], rows, "z: of what is read there, among all of the texts")


def _response_in_words(response: Response) -> str:
    """R² beside its nulls."""
    nulls = f"random directions {response.random:.2%}, permuted {response.null:.2%}, n {response.tokens:,}"
    judged = "more than chance" if response.beyond else "chance explains it"
    return f"response R² {response.r2:.2%} (95 % of {nulls}): {judged}"


def _of_responses(v: Vindex, found: Feature) -> Iterator[str | Text]:
    """What there is to say of them, if anything: of a family that is not ours they cannot be measured."""
    if found.response:
        yield _response_in_words(found.response)
    elif not v.family.title:
        way_out = f"vindex respond MODEL {v.name} measures what is written when a direction is read"
        yield styled(f"no responses: {way_out}", "dim")


def _lines_of(file: Path) -> list[str]:
    """The lines of a file or, of `-`, of standard input that are not empty."""
    from vindex.errors import QueryError
    from vindex.files import Kind, read_text

    if str(file) == "-":
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise QueryError(f"standard input is not text: byte {error.start} is not UTF-8") from error
    else:
        text = read_text(file, Kind(QueryError, "give a text file with a word on each line"))
    return [word for word in (line.removesuffix("\r") for line in text.split("\n")) if word]


def _print_best(v: Vindex, best: Best) -> None:
    """The hits, those that chance explains dim, and what it all amounts to in words."""
    from vindex.chance import CHANCE
    from vindex.format import GATE_STATS

    _print_hits(v, best.features)
    if best.judged is None:
        say(styled(f"no z: {v.name} has no statistics; {v.family.lacks[GATE_STATS.name].way_out}", "dim"))
        return
    say(best.summary)
    beyond = sum(hit.chance is not None and hit.chance < CHANCE for hit in best.hits)
    if beyond:
        say(f"{beyond} of these {len(best.hits)} {'is' if beyond == 1 else 'are'} more than chance")
    else:
        say("chance explains all of these: random directions would read this token as much")


def _print_hits(v: Vindex, features: Sequence[tuple[Feature, FeatureHit]]) -> None:
    from vindex.chance import CHANCE
    from vindex.format import EMBEDDINGS
    from vindex.scores import read

    judged, mixture = any(hit.z is not None for _, hit in features), bool(v.index.num_experts)
    rows = []
    for found, hit in features:
        expert = (_expert_name(v, hit.layer, hit.expert),) if mixture else ()
        worth = (f"{hit.z:+.1f}", _percent(hit.chance)) if hit.z is not None and hit.chance is not None else ()
        words = _pieces(read(found, hit)), *((_written(found, hit),) if found.response else ())
        cells = (hit.layer, *expert, hit.feature, f"{hit.cosine:+.3f}", *worth, " → ".join(words))
        dim = hit.chance is not None and hit.chance >= CHANCE
        rows.append([styled(cell, "dim") for cell in cells] if dim else cells)
    columns = [
        ">layer",
        *([">expert"] if mixture else []),
        ">feature",
        ">cosine",
        *([">z", ">chance"] if judged else []),
    ]
    caption = (
        "the sign of z is the pole; chance: how often one of as many random directions reaches it; " if judged else ""
    )
    responses = bool(v.index.has_responses)
    caption += "after →: what is written then, R² beside that of 95 % of random directions; " if responses else ""
    if any(found.reads is None for found, _ in features):
        caption += "–: not stored" + ("; vindex feature computes it; " if v.has(EMBEDDINGS) else "; ")
    print_table("", [*columns, "reads → writes" if responses else "what it reads"], rows, f"{caption}␣ is a space")


def _written(found: Feature, hit: FeatureHit) -> str:
    """The tokens of the response at the pole of the feature that a hit is on, and R² beside its null."""
    from vindex.scores import written

    assert found.response
    null = max(found.response.null, found.response.random)
    return f"{_pieces(written(found, hit))} ({found.response.r2:.1%}, {null:.1%})"


def _percent(share: float) -> str:
    return "<0.1%" if share < 0.001 else f"{share:.1%}"


def _expert_name(v: Vindex, layer: int, expert: int | None) -> str:
    if expert is None:
        return "dense"
    return "shared" if expert >= (v.index.layers[layer].num_experts or 0) else str(expert)


def _sigma(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _pieces(tokens: list[TokenScore] | None) -> str:
    return "–" if tokens is None else "  ".join(visible(token.piece) for token in tokens[:POLE_SHOWN])


def _scored(tokens: list[TokenScore] | None) -> str:
    return "–" if tokens is None else "  ".join(f"{visible(token.piece)}\u00a0{token.score:+.2f}" for token in tokens)
