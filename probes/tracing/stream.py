"""One prompt through the live model: its residual stream at one position, and what the logit lens makes of it.

1. One forward pass of the whole model; hooks keep the stream before each block, after its attention and after its FFN,
   and what the FFN reads (x) and writes (y).
2. Every block must add y to the stream, bit for bit. A family that does otherwise (norms after the FFN, scaled
   residuals, attention beside the FFN) is refused: nothing would add up.
3. Logit lens (nostalgebraist 2020): the model's own final norm and head at every stage of the stream. At the last stage
   it takes the whole stream, as the model does, and must give the model's own logits bit for bit.
4. `Frozen`: with the final norm's scale held at what it is at the last stage, a logit is a linear function u · r of the
   stream r, so that it is the sum of u · (what was added). u · r must be the model's own logit, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.live.activation import AGREEMENT
from probes.live.hooks import capture, same_bits
from probes.live.sinks import sinks
from probes.live.sites import Site, ffns, sites
from vindex.errors import ProbeError

ROLES = ("stream", "attended", "mlp_in", "mlp_out", "residual")
UNIT = 100.0
"""What every entry of the vector is whose norm shows the final norm's weights; large beside its epsilon."""


class Stream(NamedTuple):
    """At one position of a prompt; L layers, H hidden size, V tokens. float64, but for the logits."""

    position: int
    sinks: tuple[int, ...]
    """Positions that are a sink in some layer."""
    start: np.ndarray
    """(H,) the stream before the first block."""
    attended: np.ndarray
    """(L, H) after each block's attention."""
    x: np.ndarray
    """(L, H) what each FFN reads: the stream, normed."""
    y: np.ndarray
    """(L, H) what each FFN writes."""
    after: np.ndarray
    """(L, H) after each block."""
    logits: Tensor
    """(1 + 2L, V) float32 of the lens: at the start, then after the attention and the FFN of each layer."""

    @property
    def end(self) -> np.ndarray:
        """(H,) the stream that the final norm takes."""
        return self.after[-1]

    @property
    def grown(self) -> np.ndarray:
        """(L, H) by how much the stream grew at each FFN: `y`, as it was rounded there."""
        return self.after - self.attended

    @property
    def parts(self) -> np.ndarray:
        """(1 + 2L, H): what the stream at the end is the sum of: the start, then what each stage added."""
        before = np.concatenate([self.start[None], self.after[:-1]])
        added = np.stack([self.attended - before, self.y], axis=1)  # (L, 2, H)
        return np.concatenate([self.start[None], added.reshape(-1, added.shape[-1])])


class Seen(NamedTuple):
    """What the lens says at each of the 1 + 2L stages."""

    rank: np.ndarray
    """Of the target among all tokens, 1 the most probable."""
    log_prob: np.ndarray
    """Of the target, in nats."""
    top: np.ndarray
    """Id of the most probable token."""


class Frozen(NamedTuple):
    """The target's logit as a linear function of the stream."""

    target: int
    u: np.ndarray
    """(H,) float64."""
    gap: float
    """How far u · r of the whole stream is from the model's own logit."""
    tolerance: float
    """How far sums may be from wholes: the share that rounding in the model's dtype explains of |u| times the largest
    |r| of a layer."""

    def require_sum(self, parts: np.ndarray, whole: np.ndarray, what: str) -> float:
        """How far the sums of `parts` (n, parts) are from `whole` (n,) at most. Raises ProbeError if too far."""
        gaps = np.abs(parts.sum(-1) - whole)
        if not (gaps <= self.tolerance).all():
            raise ProbeError(
                f"{what}: the parts differ from the whole by {np.nanmax(gaps):.1e}, where rounding explains "
                f"{self.tolerance:.1e}; trace does not know this model, or its directions are not finite"
            )
        return float(gaps.max())


def run(model: Any, ids: Sequence[int], position: int) -> Stream:
    """Run the model on a prompt. Raises ProbeError where a block or the head is none that can be traced."""
    count, places = len(ffns(model)), sites(model, *ROLES)
    with torch.inference_mode(), capture(model, places) as seen:
        own = logits(model, ids)
    for layer in range(count):
        if not same_bits(seen["attended", layer] + seen["mlp_out", layer], seen["residual", layer]):  # type: ignore[index]
            raise ProbeError(
                f"layers.{layer}: the block does not add what its FFN writes to the stream (it norms or scales it, or "
                "attends beside it); trace takes blocks as Qwen3, Qwen2, Llama and Mistral have them"
            )

    def at(role: str) -> np.ndarray:
        return np.stack([seen[Site(role, layer)][0, position].double().cpu().numpy() for layer in range(count)])

    norms = [seen[Site("residual", layer)][0].float().norm(dim=1) for layer in range(count)]
    found = torch.stack([sinks(each) for each in norms]).any(0).nonzero().flatten().tolist()
    stages = torch.cat([seen[Site(role, layer)][:, position : position + 1] for role, layer in _stages(count)], 1)
    with torch.inference_mode():
        lens = torch.cat([_lens(model, stages)[0], _lens(model, seen[Site("residual", count - 1)])[0, position, None]])
    if not same_bits(lens[-1], own[position]):
        raise ProbeError(
            f"the lens after the last layer differs from the model's own logits by up to "
            f"{float((lens[-1] - own[position]).abs().max()):.1e}; expected the final norm and the head to make them, "
            "bit for bit: trace does not know this head"
        )
    start = seen[Site("stream", 0)][0, position].double().cpu().numpy()
    attended, x, y, after = map(at, ROLES[1:])
    return Stream(position, tuple(found), start, attended, x, y, after, lens.float().cpu())


def less(one: Stream, other: Stream) -> Stream:
    """The first, its vectors less those of the other."""
    vectors = {name: getattr(one, name) - getattr(other, name) for name in ("start", "attended", "x", "y", "after")}
    return one._replace(**vectors)


def logits(model: Any, ids: Sequence[int]) -> Tensor:
    """The model's own logits (tokens, V) in its dtype. Raises ProbeError where they are not finite."""
    found = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
    if not found.isfinite().all():
        raise ProbeError(f"logits: NaN or infinite in {found.dtype}; try --dtype float32")
    return found


def look(stream: Stream, target: int) -> Seen:
    """What the lens says of the target at every stage."""
    wanted = stream.logits[:, target, None]
    rank = 1 + (stream.logits > wanted).sum(1)
    log_prob = wanted[:, 0].double() - stream.logits.double().logsumexp(1)
    return Seen(rank.numpy(), log_prob.numpy(), stream.logits.argmax(1).numpy())


def freeze(model: Any, stream: Stream, target: int) -> Frozen:
    """The target's logit at the end of `stream` as u · r. Raises ProbeError where the head is none that allows it."""
    norm, head = model.get_decoder().norm, model.get_output_embeddings().weight[target]
    end = torch.tensor(stream.end, dtype=head.dtype, device=head.device)
    with torch.inference_mode():
        weights, normed = (norm(vector).double().cpu().numpy() for vector in (torch.full_like(end, UNIT), end))
    unscaled = weights * stream.end
    u = head.double().cpu().numpy() * weights * float(normed @ unscaled) / float(unscaled @ unscaled)
    own = float(stream.logits[-1, target])
    frozen = Frozen(target, u, abs(float(u @ stream.end) - own), _tolerance(head.dtype, u, stream))
    if not frozen.gap <= frozen.tolerance:
        raise ProbeError(
            f"the target's logit is {own:.4f}, and {u @ stream.end:.4f} with the final norm's scale frozen; expected a "
            "head without bias after an RMS norm: trace does not know this model"
        )
    return frozen


def _tolerance(dtype: torch.dtype, u: np.ndarray, stream: Stream) -> float:
    return AGREEMENT[dtype] * float(np.linalg.norm(u) * np.linalg.norm(stream.after, axis=1).max())


def _stages(count: int) -> list[Site]:
    """Where the lens is put but for the last stage."""
    return [Site("stream", 0), *(Site(role, layer) for layer in range(count) for role in ("attended", "residual"))][:-1]


def _lens(model: Any, stream: Tensor) -> Tensor:
    return model.get_output_embeddings()(model.get_decoder().norm(stream))
