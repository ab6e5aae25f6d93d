"""Published ways to change a fact, turned to erasing one, under the same trial, measurements and verdicts.

Each begins with the fit set's phrasings at the subject's last token, in one layer, and makes a change ΔW of one
projection (docs/gate3-method.md has formulas and sources):

- `rome`, `rome_plain`: ΔW = δ uᵀ on down_proj; u answers to the subject's key, δ takes the answer's probability away.
- `gradient`: descent on log P(answer) by gate_proj, no entry of ΔW larger than a bound.
- `ultraedit`: on gate_proj, the ridge regression of gradients on what it reads.
- `neurons`: the rows of gate_proj of neurons that fire more for the subject than for others become zero.

All but the last are scaled to the least strength that suppresses what they were made from enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from probes.deletion.layer import Found, Trial, asked, least_harmful, once_each
from probes.deletion.tail import Tail
from probes.facts.passes import kl_rows, unembed
from probes.facts.sets import Fit
from probes.weights.delta import Wide


@dataclass(frozen=True)
class BaselineOptions:
    """Free choices of the baselines; what names an author is that author's own number."""

    trial: tuple[int, int] = (8, 6)
    """Phrasings, at most, that a change is made from, and steps of Adam, in the trial of a layer."""
    whole: tuple[int, int] = (24, 25)
    """The same in the layer chosen; the steps are those of FT-L, as Meng et al. ran it (their ROME takes 20)."""
    ridge: float = 0.01
    """Share of its mean diagonal that is added to C, so that u stays small where little text was read."""
    neurons: tuple[int, ...] = (8, 32, 128)
    """How many neurons may be closed: the middle number in the trial of a layer, all of them in the layer chosen."""
    enough: float = 0.95
    """Mean suppression of what they were made from at which a descent ends, and to which the strength is brought."""
    halvings: int = 3
    """How often the last doubling of the strength is halved."""
    weakest: float = 0.02
    """‖ΔW‖/‖W‖ from which the strength is doubled until it is enough, or 1."""
    rome_rate: float = 0.5
    """Learning rate of δ (Meng et al.)."""
    rome_kl: float = 0.0625
    """Weight of the KL on the first two neutral sentences (Meng et al., who take one)."""
    rome_decay: float = 0.5
    """Weight of ‖δ‖/‖v‖², v being what down_proj writes at the subject (Meng et al.)."""
    rome_clamp: float = 4.0
    """Largest ‖δ‖/‖v‖ (Meng et al.)."""
    gradient_rate: float = 5e-4
    """Learning rate of `gradient` (FT-L of Meng et al.)."""
    gradient_bound: float = 5e-4
    """Largest entry of its ΔW before it is scaled (Zhu et al.; the number is FT-L's)."""


def response(key: Tensor, moment: Tensor | None = None, ridge: float = 0.0) -> Tensor:
    """The u (n,) with u·k = 1 for the key k: least in size or, with a `moment` C (n, n), in uᵀCu.

    u = C⁻¹k/(kᵀC⁻¹k), after `ridge` times its mean diagonal has been added to C's; without C it is k/kᵀk.
    """
    if moment is None:
        return key / key.dot(key)
    wide = moment.double()
    wide = wide + ridge * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    found = torch.linalg.solve(wide, key.double())
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

    tail: Tail
    fit: Fit
    options: BaselineOptions
    moment: Callable[[], Tensor]
    """(I, I) C of down_proj's inputs in generic text."""
    steps: int
    neurons: int

    def fallen(self, projection: str, added: Tensor) -> Tensor:
        """(B,) log(P′/P) of the answers after adding (T, out) to what a projection gives."""
        tail = self.tail
        down = projection == "down_proj"
        after = tail.last_hidden_of(tail.down_in(), added) if down else tail.last_hidden(added)
        return tail.answers(unembed(tail.model, after)) - tail.answers(tail.log_probs())

    def scaled(self, projection: str, change: Tensor, method: str) -> Wide:
        """The change at the least strength that suppresses the prompts enough, or at the one that does most."""
        whole = getattr(self.tail.at, projection).weight.float().norm()
        change = change * (whole / change.norm().clamp_min(1e-30))
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
        after = unembed(tail.model, tail.last_hidden_of(hidden, added))
        fallen = (tail.answers(after) - tail.answers(before))[:count]
        kl = kl_rows(before[neutral], after[neutral]).mean()
        kept = options.rome_kl * kl + options.rome_decay * delta.norm() / size**2
        return fallen.exp().mean() + kept, _suppressed(fallen)

    def clamp(delta: Tensor) -> Tensor:
        return delta * (options.rome_clamp * size / delta.norm()).clamp(max=1)

    delta = descend(
        loss, torch.zeros_like(tail.mlp_out[0]).float(), options.rome_rate, place.steps, clamp, options.enough
    )
    u = response(key, place.moment(), options.ridge) if whitened else response(key)
    return place.scaled("down_proj", torch.outer(delta, u), "rome" if whitened else "rome_plain")


def gradient(place: Place) -> Wide:
    """Adam on the answers' mean log-probability by gate_proj, every entry of ΔW kept within the bound."""
    inputs, bound = place.tail.mlp_in.float(), place.options.gradient_bound

    def loss(change: Tensor) -> tuple[Tensor, float]:
        fallen = place.fallen("gate_proj", inputs @ change.T)
        return fallen.mean(), _suppressed(fallen)

    start = torch.zeros_like(place.tail.at.gate_proj.weight, dtype=torch.float32)
    change = descend(
        loss, start, place.options.gradient_rate, place.steps, lambda at: at.clamp(-bound, bound), place.options.enough
    )
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


def baseline(
    name: str,
    trial: Trial,
    chosen: Sequence[int],
    moment: Callable[[int], Tensor],
    options: BaselineOptions,
    tick: Callable[[str], object] = lambda _: None,
) -> Found:
    """The change by the baseline of that name, in the layer among `chosen` (and with the number) that a trial favours.

    `moment` gives C for a layer.
    """
    middle = options.neurons[len(options.neurons) // 2]

    def make(fit: Fit, layer: int, effort: tuple[int, int] = options.trial, count: int = middle) -> Wide:
        prompts, most = asked(fit), min(effort[0], len(asked(fit)))
        spread = [prompts[index * len(prompts) // most] for index in range(most)]
        tail = Tail.of(trial.model, layer, spread)
        return BASELINES[name](Place(tail, fit, options, lambda: moment(layer), effort[1], count))

    layer, scan = trial.choose(chosen, make, tick)
    if name == "neurons":
        made = ((count, make(trial.seen, layer, count=count)) for count in options.neurons)
        sized = tuple(trial.judge(change, layer)._replace(size=count) for count, change in made)
        scan, middle = scan + sized, least_harmful(sized, trial.options.close).size or middle
    return Found(make(trial.fit, layer, options.whole, middle), scan)


def _suppressed(fallen: Tensor) -> float:
    """Mean of 1 − P′/P over prompts whose log(P′/P) is given."""
    return float(1 - fallen.detach().exp().mean())
