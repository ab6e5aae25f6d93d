"""Published ways to change a fact, turned to erasing one, under the same trial, measurements and verdicts.

Formulas and sources are in docs/gate3-method.md. `geometric` reads only weights and chooses its layer itself, as it was
published. The others begin with the fit set's phrasings at the subject's last token, in one layer, and make a change ΔW
of one projection (`Place`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from probes.deletion.bench import Bench
from probes.deletion.keys import ridged
from probes.deletion.layer import Found, Trial, least_harmful, once_each
from probes.deletion.options import BaselineOptions
from probes.deletion.tail import Tail
from probes.facts.passes import kl_rows, unembed
from probes.facts.sets import Fit
from probes.live.sites import layers, weight
from probes.weights.delta import Delta, Wide, norm
from vindex.errors import ProbeError

FEATURES = 128
"""Leading directions of each gate_proj among which `geometric` chooses, where no vindex gives its own."""
RANK_TOLERANCE = 1e-5
"""σ/σ₁ up to which a direction is rounding: what the gate does not read is no direction of it."""


class Alignment(NamedTuple):
    """The best-aligned gate direction of one layer."""

    layer: int
    feature: int
    """Index by singular value, 0 = largest."""
    cosine: float


def geometric(trial: Trial) -> Found:
    """ΔW = −(W v) vᵀ closes the gate direction v most aligned with the embedding of the answer's first token.

    Layers whose FFN writes nothing are left out. Raises ProbeError where none is left.
    """
    bench, model = trial.bench, trial.bench.model
    bench.tick("geometric")
    count = len(layers(model))
    embedding = model.get_input_embeddings().weight[trial.given.phrasings[0].answer[0]].detach().float()

    def read(index: int) -> Tensor:
        if bench.vindex is None:
            return gate_directions(weight(model, "gate_proj", index), FEATURES)
        return torch.as_tensor(bench.vindex.layer(index).gate[0].astype("float32")).to(embedding.device)

    scan = []
    for layer in range(count) if bench.options.layer is None else (bench.options.layer,):
        if layer not in bench.null_layers:
            directions = read(layer)
            cosines = directions @ embedding / (directions.norm(dim=1) * embedding.norm()).clamp(min=1e-12)
            feature = int(cosines.abs().argmax())
            scan.append(Alignment(layer, feature, float(cosines[feature])))
    if not scan:
        raise ProbeError("no layer writes anything: a projection of each is zero; there is no direction to close")
    best = max(scan, key=lambda found: abs(found.cosine))
    direction = read(best.layer)[best.feature]
    direction = direction / direction.norm()
    removed = weight(model, "gate_proj", best.layer).detach().float() @ direction
    return Found(Delta(best.layer, -removed.cpu(), direction.cpu(), "geometric"), tuple(scan))


def gate_directions(gate: Tensor, features: int) -> Tensor:
    """(F, H) unit right singular vectors of a gate_proj weight (I, H), leading first; zero past its rank."""
    full = gate.detach().float()
    _, vectors = torch.linalg.eigh(full.T @ full)
    directions = vectors.flip(1).T[:features].contiguous()
    sizes = (directions @ full.T).norm(dim=1, keepdim=True)
    return directions.where(sizes > RANK_TOLERANCE * sizes[0], 0.0)


def response(key: Tensor, moment: Tensor | None = None, ridge: float = 0.0) -> Tensor:
    """The u (n,) with u·k = 1 for the key k: least in size or, with a `moment` C (n, n), in uᵀCu.

    u = C⁻¹k/(kᵀC⁻¹k), after `ridge` times its mean diagonal has been added to C's; without C it is k/kᵀk.
    """
    if moment is None:
        return key / key.dot(key)
    found = torch.linalg.solve(ridged(moment, ridge), key.double())
    return (found / found.dot(key.double())).to(key.dtype)


def descend(
    loss: Callable[[Tensor], tuple[Tensor, float]],
    start: Tensor,
    rate: float,
    steps: int,
    project: Callable[[Tensor], Tensor],
    enough: float,
) -> Tensor:
    """Adam on `loss` from `start`, brought back by `project` after every step.

    `loss` gives the value to descend on and the suppression reached, which ends the descent once it is `enough`.
    """
    found = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([found], lr=rate)
    for _ in range(steps):
        value, suppressed = loss(found)
        if suppressed >= enough:
            break
        (found.grad,) = torch.autograd.grad(value, found)
        optimiser.step()
        with torch.no_grad():
            found.copy_(project(found))
    return found.detach()


def regression(inputs: Tensor, values: Tensor) -> Tensor:
    """ΔW (out, in) with ΔWᵀ = (HᵀH + I)⁻¹HᵀV of inputs H (n, in) and values V (n, out).

    It is computed as Hᵀ(HHᵀ + I)⁻¹V, which is the same and n × n.
    """
    gram = inputs @ inputs.T + torch.eye(len(inputs), device=inputs.device)
    return torch.linalg.solve(gram, values).T @ inputs


def contrast(own: Tensor, others: Tensor, count: int) -> Tensor:
    """The `count` neurons whose mean |h| over the rows of `own` (n, I) exceeds that over `others` the most."""
    return (own.abs().mean(0) - others.abs().mean(0)).topk(min(count, own.shape[1])).indices


@dataclass(frozen=True)
class Place:
    """What a formula is made from: one layer of the unchanged model, in some prompts that ask for the fact."""

    bench: Bench
    tail: Tail
    fit: Fit
    steps: int
    neurons: int

    @property
    def options(self) -> BaselineOptions:
        return self.bench.options.baselines

    def fallen(self, projection: str, added: Tensor) -> Tensor:
        """(B,) log(P′/P) of the answers after adding (T, out) to what a projection gives."""
        tail = self.tail
        inputs = (tail.down_in(), added) if projection == "down_proj" else (tail.down_in(added),)
        return tail.answers(unembed(tail.model, tail.last_hidden(*inputs))) - tail.said

    def scaled(self, projection: str, change: Tensor, method: str) -> Wide:
        """The change at the least strength that suppresses the prompts enough, or at the one that does most."""
        change = change * (norm(getattr(self.tail.at, projection).weight) / max(norm(change), 1e-30))
        inputs = self.tail.mlp_in if projection == "gate_proj" else self.tail.down_in()
        added = inputs.float() @ change.T

        def gone(strength: float) -> float:
            with torch.no_grad():
                return _suppressed(self.fallen(projection, strength * added))

        felt, strength = {0.0: 0.0}, self.options.weakest
        while strength <= 1 and max(felt.values()) < self.options.enough:
            felt[strength] = gone(strength)
            strength *= 2
        best = max(felt, key=lambda tried: felt[tried])
        if felt[best] >= self.options.enough:
            low = best / 2
            for _ in range(self.options.halvings):
                middle = math.sqrt(low * best)
                low, best = (low, middle) if gone(middle) >= self.options.enough else (middle, best)
        return Wide(self.tail.at.number, projection, (best * change).cpu(), method)


def rome(place: Place, whitened: bool = True) -> Wide:
    """δ uᵀ on down_proj, δ being what must be added to its output at the subject for the answer to go."""
    asking, options = place.tail, place.options
    key = asking.at_subjects(asking.down_in()).mean(0)
    size = asking.at_subjects(asking.mlp_out).mean(0).norm()
    tail = Tail.of(asking.model, asking.at.number, [*asking.prompts, *place.fit.about[:2]])
    count, before, hidden = len(asking.prompts), tail.log_probs(), tail.down_in()
    neutral = tail.rows >= count
    subjects = tail.reads.nonzero()[:, 1]

    def loss(delta: Tensor) -> tuple[Tensor, float]:
        added = torch.zeros_like(tail.mlp_out).float().index_add(0, subjects, delta.expand(len(subjects), -1))
        after = unembed(tail.model, tail.last_hidden(hidden, added))
        fallen = (tail.answers(after) - tail.said)[:count]
        kl = kl_rows(before[neutral], after[neutral]).mean()
        kept = options.rome_kl * kl + options.rome_decay * delta.norm() / size**2
        return fallen.exp().mean() + kept, _suppressed(fallen)

    def clamp(delta: Tensor) -> Tensor:
        return delta * (options.rome_clamp * size / delta.norm()).clamp(max=1)

    start = torch.zeros_like(tail.mlp_out[0]).float()
    delta = descend(loss, start, options.rome_rate, place.steps, clamp, options.enough)
    moment = place.bench.generic_moments("hidden")[asking.at.number] if whitened else None
    u = response(key, moment, options.ridge)
    return place.scaled("down_proj", torch.outer(delta, u), "rome" if whitened else "rome_plain")


def gradient(place: Place) -> Wide:
    """Adam on the answers' mean log-probability by gate_proj, every entry of ΔW kept within the bound."""
    inputs, options = place.tail.mlp_in.float(), place.options

    def loss(change: Tensor) -> tuple[Tensor, float]:
        fallen = place.fallen("gate_proj", inputs @ change.T)
        return fallen.mean(), _suppressed(fallen)

    def bounded(change: Tensor) -> Tensor:
        return change.clamp(-options.gradient_bound, options.gradient_bound)

    start = torch.zeros_like(place.tail.at.gate_proj.weight, dtype=torch.float32)
    change = descend(loss, start, options.gradient_rate, place.steps, bounded, options.enough)
    return place.scaled("gate_proj", change, "gradient")


def ultraedit(place: Place) -> Wide:
    """H: what gate_proj reads at the subjects; V: ‖h‖² times the gradient of −log P(answer) in what it gives there."""
    added = torch.zeros_like(place.tail.gate).requires_grad_()
    (slope,) = torch.autograd.grad(-place.fallen("gate_proj", added).sum(), added)
    inputs = place.tail.at_subjects(place.tail.mlp_in)
    values = inputs.square().sum(1, keepdim=True) * place.tail.at_subjects(slope)
    return place.scaled("gate_proj", regression(inputs, values), "ultraedit")


def neurons(place: Place) -> Wide:
    """The gate rows of the neurons that stand out become zero."""
    at = place.tail.at
    others = Tail.of(place.tail.model, at.number, once_each(place.fit.others)[: place.options.whole[0]])
    own, theirs = (tail.at_subjects(tail.down_in()) for tail in (place.tail, others))
    closed, gate = contrast(own, theirs, place.neurons).cpu(), at.gate_proj.weight.float().cpu()
    return Wide(at.number, "gate_proj", torch.zeros_like(gate).index_copy(0, closed, -gate[closed]), "neurons")


BASELINES: dict[str, Callable[[Place], Wide]] = {
    "rome": rome,
    "rome_plain": partial(rome, whitened=False),
    "gradient": gradient,
    "ultraedit": ultraedit,
    "neurons": neurons,
}


def baseline(name: str, trial: Trial) -> Found:
    """The change by the baseline of that name, in the layer (and with the number) that the trial favours."""
    bench, options = trial.bench, trial.bench.options.baselines
    bench.tick(name)
    middle = options.neurons[len(options.neurons) // 2]

    def make(fit: Fit, layer: int, effort: tuple[int, int] = options.trial, count: int = middle) -> Wide:
        most = min(effort[0], len(fit.asked))
        spread = [fit.asked[index * len(fit.asked) // most] for index in range(most)]
        tail = Tail.of(trial.model, layer, spread)
        return BASELINES[name](Place(bench, tail, fit, effort[1], count))

    layer, scan = trial.choose(make)
    if name == "neurons":
        made = ((count, make(trial.parts[0], layer, count=count)) for count in options.neurons)
        sized = tuple(trial.judge(change, layer)._replace(size=count) for count, change in made)
        scan, middle = scan + sized, least_harmful(sized, bench.options.forward.close).size or middle
    return Found(make(trial.fit, layer, options.whole, middle), scan)


def _suppressed(fallen: Tensor) -> float:
    """Mean of 1 − P′/P over prompts whose log(P′/P) is given."""
    return float(1 - fallen.detach().exp().mean())
