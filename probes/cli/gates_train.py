"""`vindex gates train`: learn gates, with a progress bar, and a run record beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from probes.cli.gates_options import ForgetFile, PanelDirectory, RetainFile, with_options
from probes.cli.model import Device, Dtype, Model, Revision, load_model
from probes.gates.options import OWN, PRESETS, TrainOptions
from vindex.cli import Json
from vindex.console import check_places, command, progress, put, say, say_places, stopped
from vindex.demo import or_bundled


@with_options(TrainOptions, PRESETS)
def train(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write the gates to.")],
    panel: PanelDirectory = None,
    forget: ForgetFile = None,
    retain: RetainFile = None,
    preset: Annotated[
        str, typer.Option(help=f"Settings to start from; {OWN} is ours, the others published: {', '.join(PRESETS)}.")
    ] = "baseline",
    forget_limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    retain_limit: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Save the state after this many steps.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the saved state, to the same result.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace gates or a stopped run at the target.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the loss curves to this .html or .png.")
    ] = None,
    json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    **options: Any,
) -> None:
    """Train gates; only they learn. Under `accelerate launch -m vindex` on several GPUs each takes its share.

    Ctrl-C saves the state after the last step; --resume goes on from there, to the same bits.
    """
    from probes.gates.learn import check_output, is_first_process, own_device, train_gates
    from probes.gates.options import from_preset

    check_places(None, plot)
    from_preset(preset, **options)  # what is out of range is told before the model is loaded
    check_output(output, [Path(or_bundled(model)), panel, forget, retain], resume=resume, force=force)
    with stopped(lambda: _kept(output)), progress(is_first_process()) as stages:
        loaded = load_model(model, device=own_device(device), dtype=dtype, revision=revision, progress=stages)
        gates = train_gates(
            loaded, preset=preset, output=output, panel=panel, forget=forget, retain=retain,
            forget_limit=forget_limit, retain_limit=retain_limit, save_every=save_every,
            resume=resume, force=force, progress=stages,
            **options,
        )  # fmt: skip
    if is_first_process():
        if plot:
            gates.plot(plot)
        if put(gates.training, json, None):
            return
        steps, seconds = gates.training["steps"], gates.training["wall_seconds"]
        say(f"wrote {output}: λ std {float(gates.values.std()):.3f} after {steps} steps, {seconds:.0f} s")
        say_places(plot=plot)
        asked, name = ("--panel", panel) if panel else (), output.name
        kept = "-o", f"{name}.json", "--plot", f"{name}.html"
        say(f"next: {command('gates', 'eval', model, output, *asked, *kept)}")


def _kept(output: Path) -> str:
    """What a training that was stopped leaves."""
    from vindex.kinds import STATE

    if (output / STATE).exists():
        return f"the state is in {output}: go on with the same command and --resume"
    return "no step was finished, nothing is saved"
