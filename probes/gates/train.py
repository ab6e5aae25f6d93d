"""Train lambda gates: only the logits learn, the model's own weights are the teacher and the student.

1. logits ~ N(init_mean, init_std²), less init_ratio times the standard score of a neuron's |h| ratio; AdamW with a
   cosine from learning_rate to 0; both float32 whatever the model's dtype.
2. A step reads batch_size forget examples and retain_ratio times as many retain examples. An epoch is one pass over the
   forget data; the retain data starts over, reshuffled, whenever it runs out.
3. The base distribution comes from the same weights with the gates off, without gradient: there is no second model.
4. loss = λ_f · forget + λ_r · retain + w · nke + λ_c · context (losses.py), summed over micro-batches and processes.
   For the last, a step reads as many prompts that state an answer before they ask as it reads forget examples.
5. Every save_every steps, and at Ctrl-C, the state after the last whole step goes to one file. What a step sees follows
   from seed and step number alone, so that a resumed run ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.gates import losses, resume
from probes.gates.activations import mean_magnitude
from probes.gates.apply import gate_shape, gated
from probes.gates.data import Forget, Retain, Source, context_rows
from probes.gates.encode import Batch, Example, collate, forget_example, retain_example
from probes.gates.gates import Gates
from probes.gates.masks import rescaled
from probes.gates.options import TrainOptions
from probes.live.load import Loaded
from probes.live.match import describe
from probes.live.tokens import pad_token
from probes.records import head
from vindex.errors import FactError, ProbeError
from vindex.progress import Progress, silent

RATIO_ROWS = 200  # of each kind, for init_ratio


class Data(NamedTuple):
    """Encoded examples, and what identifies them in the record: {"forget": Source fields, "retain": …}."""

    forget: Sequence[Example]
    retain: Sequence[Example]
    sources: dict[str, Any]
    context: Sequence[Example] = ()


class Parts(NamedTuple):
    """The loss of one step and its unweighted terms, in nats."""

    loss: float
    forget: float
    retain: float
    nke: float
    context: float = 0.0

    def told(self, options: TrainOptions) -> str:
        """In a line for people; NKE where it counts."""
        terms = f"loss {self.loss:.3f} = forget {self.forget:.2f}, retain {self.retain:.3f}"
        terms += f", nke {self.nke:.3f}" if options.unmasked_retain_weight else ""
        return terms + (f", context {self.context:.3f}" if options.context_weight else "")


class Trained(NamedTuple):
    gates: Gates
    curves: dict[str, list[float]]
    seconds: float
    processes: int


class Plan(NamedTuple):
    """Which examples each step sees, for the whole run."""

    steps: int
    forget: list[list[int]]
    retain: list[list[int]]
    context: list[list[int]]


def encode(
    loaded: Loaded,
    forget: tuple[Sequence[Forget], Source],
    retain: tuple[Sequence[Retain], Source],
    options: TrainOptions,
    weights: dict[str, str],
) -> Data:
    """Rows as token ids. `weights` {file: SHA-256} identifies the model. Raises FactError naming the row that fails."""
    settings: dict[str, Any] = {"chat": options.chat, "max_tokens": options.max_tokens}
    sources = {"forget": forget[1]._asdict(), "retain": retain[1]._asdict(), "weights_sha256": weights}
    return Data(
        [forget_example(row, loaded.tokenizer, **settings) for row in forget[0]],
        [retain_example(row, loaded.tokenizer, **settings) for row in retain[0]],
        sources,
        [
            forget_example(row, loaded.tokenizer, chat=False, max_tokens=options.max_tokens)
            for row in (context_rows(forget[0], options.seed) if options.context_weight else ())
        ],
    )


def plan(options: TrainOptions, forget: int, retain: int, context: int = 0) -> Plan:
    """The order of `forget`, `retain` and `context` examples, from the seed. Raises FactError when there are none."""
    if not forget or not retain:
        raise FactError(f"{forget} forget and {retain} retain examples; expected at least one of each")
    size = min(options.batch_size, forget)
    per_epoch = math.ceil(forget / size)
    steps = per_epoch * options.epochs
    steps = min(steps, options.max_steps) if options.max_steps else steps
    facts = _shuffled(forget, options.seed * 2)
    chunks = ([next(facts) for _ in range(min(size, forget - size * (s % per_epoch)))] for s in range(steps))
    reasons = _shuffled(retain, options.seed * 2 + 1)
    stated = _shuffled(context, options.seed * 2 + 10**6)
    return Plan(
        steps,
        list(chunks),
        [[next(reasons) for _ in range(size * options.retain_ratio)] for _ in range(steps)],
        [[next(stated) for _ in range(size if context else 0)] for _ in range(steps)],
    )


def train(
    loaded: Loaded,
    data: Data,
    options: TrainOptions,
    *,
    directory: Path | None = None,
    save_every: int = 100,
    resuming: bool = False,
    progress: Progress = silent,
) -> Trained:
    """Train gates. `directory` takes the state every `save_every` steps, and at Ctrl-C.

    Under `accelerate launch` each process takes its share of every batch. Raises ProbeError on a mixture of experts, on
    a loss that is not finite, and on resuming a run with other hyper-parameters or data.
    """
    accelerator = accelerator_on(loaded.model.device)
    model, pad = loaded.model.to(accelerator.device), pad_token(loaded.tokenizer)
    schedule, shape = plan(options, len(data.forget), len(data.retain), len(data.context)), gate_shape(model)
    first = initial_logits(shape, options)
    if options.init_ratio and not resuming:
        first -= options.init_ratio * ratio_scores(loaded, data, progress)
    logits = torch.nn.Parameter(first.to(accelerator.device))
    optimiser = torch.optim.AdamW([logits], lr=options.learning_rate, weight_decay=options.weight_decay)
    state = resume.State(0, {name: [] for name in (*Parts._fields, "lambda_std")}, {})
    if resuming and directory:
        state = resume.load(directory, shape, options, data.sources)
        resume.restore(state, logits, optimiser)
    saved, began, writes = state.step, time.monotonic(), directory if accelerator.is_main_process else None
    advance = progress("training", schedule.steps - state.step)
    try:
        for step in range(state.step, schedule.steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(options, step, schedule.steps)
            kinds = (data.forget, schedule.forget), (data.retain, schedule.retain), (data.context, schedule.context)
            forget, retain, context = ([examples[i] for i in order[step]] for examples, order in kinds)
            parts = gradient(model, logits, forget, retain, context, options, accelerator, pad)
            if not math.isfinite(parts.loss):
                raise ProbeError(f"step {step + 1}: the loss is {parts.loss}; lower learning_rate or use float32")
            optimiser.step()
            found = {**parts._asdict(), "lambda_std": float(torch.sigmoid(logits.detach()).std())}
            curves = {name: [*values, found[name]] for name, values in state.curves.items()}
            state = resume.taken(step + 1, curves, logits, optimiser)
            if writes and state.step % save_every == 0 and state.step < schedule.steps:
                resume.save(writes, state, options, data.sources)
                saved = state.step
            advance(1, parts.told(options))
    except KeyboardInterrupt:
        if writes and state.step > saved:
            resume.save(writes, state, options, data.sources)
        raise
    accelerator.wait_for_everyone()
    return Trained(Gates(logits.detach().cpu()), state.curves, time.monotonic() - began, accelerator.num_processes)


def initial_logits(shape: tuple[int, int], options: TrainOptions) -> Tensor:
    """(L, I) float32 ~ N(init_mean, init_std²), from the seed."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    return drawn * options.init_std + options.init_mean


def ratio_scores(loaded: Loaded, data: Data, progress: Progress) -> Tensor:
    """(L, I), 0 or more: the standard score, in its layer, of the logarithm of a neuron's |h| ratio, over 200 rows."""
    said, worked = (rows[:: -(-len(rows) // RATIO_ROWS)] for rows in (data.forget, data.retain))
    advance = progress("activations", len(said) + len(worked))
    tiny = torch.finfo(torch.float32).tiny
    before, elsewhere = (
        mean_magnitude(loaded, examples, entity=entity, advance=advance).clamp_min(tiny).log()
        for examples, entity in ((said, True), (worked, False))
    )
    ratio = before - elsewhere
    return ((ratio - ratio.mean(1, keepdim=True)) / ratio.std(1, keepdim=True)).clamp_min(0)


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """The cosine at `step` of 0..steps-1."""
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))


def gradient(
    model: Any,
    logits: torch.nn.Parameter,
    forget: Sequence[Example],
    retain: Sequence[Example],
    context: Sequence[Example],
    options: TrainOptions,
    accelerator: Any,
    pad: int,
) -> Parts:
    """Put the gradient of one step's loss into logits.grad, and return its parts."""
    others = sum(int(collate([example], pad).others.sum()) for example in forget)
    predicted = sum(len(example.ids) - 1 for example in retain)
    read = sum(int(example.entity[1:].sum()) for example in context)
    sums = torch.zeros(4, device=logits.device)
    logits.grad = torch.zeros_like(logits)
    for batch in _share(forget, options.micro_batch, accelerator, pad):
        terms = _forget_terms(model, logits, batch, options)
        (
            options.lambda_f * terms[0] / len(forget) + options.unmasked_retain_weight * terms[1] / max(others, 1)
        ).backward()
        sums[0] += terms[0].detach() / len(forget)
        sums[2] += terms[1].detach() / max(others, 1)
    for batch in _share(retain, options.micro_batch, accelerator, pad):
        term = options.temperature**2 * _retain_term(model, logits, batch, options)
        (options.lambda_r * term / predicted).backward()
        sums[1] += term.detach() / predicted
    for batch in _share(context, options.micro_batch, accelerator, pad):
        places = model, batch, batch.entities
        term = losses.context_sum(base_logits(*places), _gated_logits(*places, logits, options), batch)
        (options.context_weight * term / read).backward()
        sums[3] += term.detach() / read
    logits.grad = accelerator.reduce(logits.grad, "sum")
    terms = accelerator.reduce(sums, "sum").tolist()
    weights = (options.lambda_f, options.lambda_r, options.unmasked_retain_weight, options.context_weight)
    return Parts(sum(weight * term for weight, term in zip(weights, terms, strict=True)), *terms)


def _forget_terms(model: Any, logits: Tensor, batch: Batch, options: TrainOptions) -> tuple[Tensor, Tensor]:
    """The sums of the forget term and of NKE; NKE is 0 and costs nothing when its weight is 0."""
    places = batch.entities | batch.others if options.unmasked_retain_weight else batch.entities
    student, said = _gated_logits(model, batch, places, logits, options), batch.entities[places]
    nke = torch.zeros((), device=logits.device)
    if options.unmasked_retain_weight:
        nke = losses.kl_sum(base_logits(model, batch, batch.others), student[~said])
    return losses.forget_sum(student[said], batch, options.beta), nke


def _retain_term(model: Any, logits: Tensor, batch: Batch, options: TrainOptions) -> Tensor:
    places = model, batch, batch.predicted
    return losses.kl_sum(base_logits(*places), _gated_logits(*places, logits, options), options.temperature)


def base_logits(model: Any, batch: Batch, wanted: Tensor) -> Tensor:
    """(N, V) of the ungated model at the places `wanted` (B, T - 1), without gradient."""
    with torch.no_grad():
        return _logits(model, batch, wanted)


def _gated_logits(model: Any, batch: Batch, wanted: Tensor, logits: Tensor, options: TrainOptions) -> Tensor:
    with gated(model, rescaled(torch.sigmoid(logits), options.scale_mode)):
        return _logits(model, batch, wanted)


def _logits(model: Any, batch: Batch, wanted: Tensor) -> Tensor:
    """(N, V) at the places `wanted`; the head runs only on columns that have one."""
    columns = wanted.any(0).nonzero()[:, 0]
    found = model(
        input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False, logits_to_keep=columns
    ).logits  # fmt: skip
    return found[wanted[:, columns]]


def _share(examples: Sequence[Example], size: int, accelerator: Any, pad: int) -> Iterator[Batch]:
    """This process's examples, in micro-batches of similar length."""
    mine = sorted(examples[accelerator.process_index :: accelerator.num_processes], key=lambda e: len(e.ids))
    for start in range(0, len(mine), size):
        yield collate(mine[start : start + size], pad).to(accelerator.device)


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """0..count-1 in a new order again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def accelerator_on(device: torch.device) -> Any:
    """That of accelerate, on the device where the model is."""
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu")


def record(loaded: Loaded, trained: Trained, options: TrainOptions, data: Data) -> dict[str, Any]:
    """The run record: everything needed to run it again, and its loss curves."""
    model = describe(loaded, data.sources.get("weights_sha256", {}))
    return {
        **head("vindex-gates-training/1"),
        "model": {**model, "attn_implementation": loaded.model.config._attn_implementation},
        "options": asdict(options),
        "data": data.sources,
        "steps": len(trained.curves["loss"]),
        "processes": trained.processes,
        "wall_seconds": round(trained.seconds, 1),
        "curves": {name: [float(f"{value:.5g}") for value in values] for name, values in trained.curves.items()},
    }
