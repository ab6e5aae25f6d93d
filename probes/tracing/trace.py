"""`probes.trace`: a prompt through a model, layer by layer.

1. The prompt's tokens, its sinks, the position; the target is the model's own answer there, or a token that is given.
2. The trajectory (`probes.tracing.stream`): the lens at every stage, and what each stage adds to the target's logit.
3. With a vindex, what each FFN reads and writes along its directions (`probes.tracing.directions`), and what the
   strongest do when they are taken out of the live model (`probes.tracing.causal`).
4. `against` another prompt of as many tokens, differences are traced; a `patch` shows the trajectory before and after.

What must add up is checked on the way; the largest differences are part of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes.live import match
from probes.live.hooks import patched
from probes.live.load import Loaded, require_head
from probes.live.sites import Mixture, ffns
from probes.live.tokens import is_embedded, require_offsets
from probes.live.tokens import prompt as prompt_ids
from probes.tracing import causal, directions, stream
from probes.tracing.result import Directions, Token, Trace
from probes.tracing.stream import Stream
from probes.weights import patches
from vindex import scoring
from vindex.errors import ProbeError
from vindex.progress import Progress, silent
from vindex.reader import Vindex, as_vindex
from vindex.tokens import Vocabulary, parse_vocabulary


def trace(
    model: Loaded,
    prompt: str,
    *,
    vindex: Vindex | str | Path | None = None,
    target: str | int | None = None,
    against: str | None = None,
    patch: str | Path | None = None,
    check: int = 0,
    position: int = -1,
    text: Iterable[str] | str | None = None,
    progress: Progress = silent,
) -> Trace:
    """Trace a prompt through the model.

    vindex: one of the same model, opened or named; without it there are no reads and writes. target: a token's exact
    text or its id, by default what the model predicts. against: another prompt of as many tokens. patch: a file that
    `gate3` saved. check: how many directions of either side are taken out of the live model. position: from 0, or from
    the end if negative. text: bundled names or files, the generic text that reads are held against; by default all
    bundled ones.
    Raises ProbeError, PatchError or QueryError, in one line.
    """
    require_head(model)
    check, position = scoring.whole("check", check), scoring.whole("position", position)
    vindex = None if vindex is None else as_vindex(vindex)
    _require_sense(model, vindex, against, patch, check)
    digests = match.weights_sha256(model, progress)
    if vindex is not None:
        match.require_match(model, vindex, digests)
    vocabulary = _vocabulary(model.tokenizer) if vindex is None else vindex.vocabulary
    ids = prompt_ids(model.tokenizer, prompt)
    _require_room(model, len(ids))
    at = _place(position, len(ids))
    main = stream.run(model.model, ids, at)
    wanted = int(main.logits[-1].argmax()) if target is None else _target(model, vocabulary, target)
    frozen = stream.freeze(model.model, main, wanted)
    beside = None if against is None else stream.run(model.model, _aligned(model, against, ids), at)
    after = None if patch is None else _patched(model, Path(patch), ids, at)
    traced = main if beside is None else stream.less(main, beside)
    adds = traced.parts @ frozen.u
    sums = {
        "logit": frozen.gap,
        "stages": frozen.require_sum(adds[None], traced.end[None] @ frozen.u, "the stages"),
    }
    found = None
    if vindex is not None:
        about = directions.generic(model, vindex, text, progress)
        along = directions.along(vindex, traced.x, traced.y, frozen.u, about, difference=beside is not None)
        rows = np.concatenate([along.adds, along.outside[:, None]], axis=1)
        sums["writes"] = frozen.require_sum(rows, traced.grown @ frozen.u, "what the FFNs write")
        tested = causal.test(model.model, ids, main, frozen, vindex, along, check, progress)
        found = Directions(vindex, about, along, tested, directions.responses(vindex, along.excess, frozen.u))
    other = beside or after
    return Trace(
        match.describe(model, digests), prompt, against, None if patch is None else Path(patch).name,
        tuple(Token(place, each, vocabulary.piece(each), place in main.sinks) for place, each in enumerate(ids)),
        at, vocabulary, wanted, adds, stream.look(main, wanted),
        None if other is None else stream.look(other, wanted), sums, found,
    )  # fmt: skip


def _require_sense(
    model: Loaded, vindex: Vindex | None, against: str | None, patch: str | Path | None, check: int
) -> None:
    """Raise ProbeError where what is asked does not go together, before any work."""
    if against is not None and patch is not None:
        raise ProbeError("--against and --patch each show two trajectories side by side; give one of them")
    if check < 0:
        raise ProbeError(f"--check {check}: expected how many directions to take out, 0 or more")
    if check and vindex is None:
        raise ProbeError("--check takes directions of a vindex out of the model; give its --vindex")
    if vindex is not None and any(isinstance(ffn, Mixture) for ffn in ffns(model.model)):
        raise ProbeError(
            f"{model.name}: is a mixture of experts, of which only the trajectory is traced; leave --vindex out"
        )


def _require_room(model: Loaded, count: int) -> None:
    """Raise ProbeError where the prompt is longer than what the model was made to read."""
    most = getattr(model.model.config, "max_position_embeddings", None)
    if most is not None and count > most:
        raise ProbeError(f"the prompt has {count:,} tokens, {model.name} reads at most {most:,}; give a shorter one")


def _vocabulary(tokenizer: Any) -> Vocabulary:
    require_offsets(tokenizer)
    return parse_vocabulary(tokenizer.backend_tokenizer.to_str().encode(), "the model's tokenizer")


def _target(model: Loaded, vocabulary: Vocabulary, target: str | int) -> int:
    found = vocabulary.id_of(target) if isinstance(target, str) else scoring.whole("target", target)
    if found < 0 or not is_embedded(model.tokenizer, found):
        raise ProbeError(f"target {found}: the model has tokens 0 to {model.tokenizer.embedded - 1}")
    return found


def _place(position: int, count: int) -> int:
    place = position + count if position < 0 else position
    if not 0 <= place < count:
        raise ProbeError(f"position {position}: the prompt has tokens 0 to {count - 1}, or -1 to -{count} from the end")
    return place


def _aligned(model: Loaded, against: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The ids of the other prompt. Raises ProbeError unless it has as many tokens."""
    others = prompt_ids(model.tokenizer, against)
    if len(others) != len(ids):
        raise ProbeError(
            f"--against {against[:40]!r}: has {len(others)} tokens, the prompt {len(ids)}; expected as many, so that "
            "each token stands beside its own: choose words of as many tokens"
        )
    return others


def _patched(model: Loaded, file: Path, ids: Sequence[int], position: int) -> Stream:
    """The prompt through the model with the patch in it, which it has only meanwhile."""
    patch = patches.read(file)
    patches.require_base(model.path, patch)
    rounded = patches.stored_dtype(model.path, patch.delta.layer)
    with patched(model.model, patch.delta.edits(rounded)):
        return stream.run(model.model, ids, position)
