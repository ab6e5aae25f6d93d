"""`vindex gates train`: learn gates, with a progress bar, and a run record beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.cli.gates_options import Device, Dtype, ForgetFile, Model, RetainFile, Revision
from probes.cli.model import load_model
from vindex.console import progress, say, warn
from vindex.demo import or_bundled
from vindex.errors import TargetError

if TYPE_CHECKING:
    from probes.gates.data import Forget, Retain, Source
    from probes.gates.options import TrainOptions
    from probes.gates.train import Parts
    from probes.live.load import Loaded
    from vindex.progress import Advance


def train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write the gates to.")],
    forget: ForgetFile = None,
    retain: RetainFile = None,
    preset: Annotated[
        str, typer.Option(help="baseline, nke_w1p0, nke_optA, nke_optB, chat_energy[_optA|_optB], chat_mean.")
    ] = "baseline",
    scale_mode: Annotated[str | None, typer.Option(help="Rescaling after gating: none, mean, energy.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--plain", help="Wrap texts in the chat template.")] = None,
    beta: Annotated[float | None, typer.Option(help="Cross-entropy at which an entity is forgotten [4.0].")] = None,
    lambda_f: Annotated[float | None, typer.Option(help="Weight of the forget loss [0.1].")] = None,
    lambda_r: Annotated[float | None, typer.Option(help="Weight of the distillation loss [0.5].")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the distillation loss [2.0].")] = None,
    unmasked_retain_weight: Annotated[float | None, typer.Option(help="Weight of NKE [0.0].")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the cosine [0.01].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's [0.01].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the forget data [3].")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many; the cosine ends there.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Forget examples to a step [16].")] = None,
    retain_ratio: Annotated[int | None, typer.Option(help="Retain batches to each forget batch [2].")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Examples to a forward pass; bounds memory [16].")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longer texts are cut here [256].")] = None,
    init_std: Annotated[float | None, typer.Option(help="Of the initial logits [0.1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial logits and order [0].")] = None,
    forget_limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    retain_limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Save the state after this many steps.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the saved state, to the same result.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the target.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
) -> None:
    """Train gates; only they learn. Under `accelerate launch -m vindex` on several GPUs each takes its share."""
    from probes.gates import resume as state
    from probes.gates.data import read_forget, read_retain
    from probes.gates.options import from_preset
    from vindex.kinds import TRAINED_GATES
    from vindex.places import check_directory

    options = from_preset(
        preset, scale_mode=scale_mode, chat=chat, beta=beta, lambda_f=lambda_f, lambda_r=lambda_r,
        temperature=temperature, unmasked_retain_weight=unmasked_retain_weight, learning_rate=learning_rate,
        weight_decay=weight_decay, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
        retain_ratio=retain_ratio, micro_batch=micro_batch, max_tokens=max_tokens, init_std=init_std, seed=seed,
    )  # fmt: skip
    if (output / state.STATE).exists() and not resume and not force:
        raise TargetError(
            f"{output}: holds a run that was stopped; add --resume to go on with it or --force to restart"
        )
    if resume and not (output / state.STATE).exists():
        raise TargetError(f"{output}: nothing to resume here; start without --resume")
    given = [path for path in (Path(or_bundled(model)), forget, retain) if path is not None and path.exists()]
    check_directory(output, force=force or resume, reads=given, kinds=TRAINED_GATES)
    rows = read_forget(forget, forget_limit), read_retain(retain, retain_limit)
    loaded = load_model(model, device=_own_device(device), dtype=dtype, revision=revision)
    try:
        run_training(loaded, *rows, options, output, save_every=save_every, resume=resume)
    except KeyboardInterrupt:
        kept = f"the state of the last {save_every} steps is kept; repeat with --resume" if (
            output / state.STATE).exists() else "nothing was saved yet"  # fmt: skip
        warn(f"stopped; {kept}")
        raise typer.Exit(130) from None


def run_training(
    loaded: Loaded,
    forget: tuple[list[Forget], Source],
    retain: tuple[list[Retain], Source],
    options: TrainOptions,
    output: Path,
    *,
    save_every: int,
    resume: bool,
) -> None:
    """Encode, train with a progress bar, write the gates and the run record; only the first process prints."""
    from probes.gates.files import write_gates
    from probes.gates.train import encode, record, train
    from probes.live.match import weights_sha256
    from vindex.kinds import GATE_FILES, TRAINED_GATES, TRAINING
    from vindex.places import new_directory
    from vindex.targets import write_json

    data = encode(loaded, forget, retain, options, weights_sha256(loaded))
    first = _is_first_process()
    with progress(first) as stage:
        advance: Advance | None = None

        def show(step: int, steps: int, parts: Parts) -> None:
            nonlocal advance
            terms = f"loss {parts.loss:.3f} = forget {parts.forget:.2f}, retain {parts.retain:.3f}"
            terms += f", nke {parts.nke:.3f}" if options.unmasked_retain_weight else ""
            advance = advance or stage("training", steps - step + 1)
            advance(1, terms)

        trained = train(loaded, data, options, directory=output, save_every=save_every, resuming=resume, on_step=show)
    if not first:
        return
    files, made = [*GATE_FILES, TRAINING], record(loaded, trained, options, data)
    with new_directory(output, files, making="directory of gates", force=True, kinds=TRAINED_GATES) as partial:
        write_gates(trained.gates, partial)
        write_json(partial / TRAINING, made)
    spread = float(trained.gates.values.std())
    say(f"wrote {output}: λ std {spread:.3f} after {len(trained.curves['loss'])} steps, {trained.seconds:.0f} s")


def _own_device(device: str) -> str:
    """Under `accelerate launch` each process has a GPU of its own; `auto` would load every copy onto the first."""
    import os

    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if device == "auto" and own is not None and torch.cuda.is_available() else device


def _is_first_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"
