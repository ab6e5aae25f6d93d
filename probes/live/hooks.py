"""Read, change and patch a live model, and leave no trace.

    with capture(model, sites(model, "hidden")) as seen:      # read activations
        model(ids)
    seen["hidden", 3]                                         # (batch, tokens, I)

    with edited(model, {("hidden", 3): lambda h: h * gate}):  # change activations on their way through
        model(ids)

    with patched(model, {("gate_proj", 3): lambda w: w + d.outer(u)}):  # change weights
        model(ids)

All three undo themselves in `finally`. A hook that never fired is an error: a module whose forward is bypassed (fused
experts, a compiled graph) would otherwise give no data and no warning. A patch restores a saved copy; subtracting what
was added would leave nearly half of the float32 entries changed in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probes.live.sites import EXPERT_ROLES, Site, locate, weight
from vindex.errors import PatchError, ProbeError

Edit = Callable[[Tensor], Tensor]
Observe = Callable[[Site, Tensor], None]


@contextmanager
def capture(
    model: nn.Module, sites: Iterable[tuple[str, int]], *, detach: bool = True, observe: Observe | None = None
) -> Iterator[dict[Site, Tensor]]:
    """Collect the tensors at `sites` from the forward passes run inside the `with` block.

    Yields a dict from site to the tensor (batch, tokens, width) of the latest pass, in the model's dtype and on its
    device. With `detach=False` the tensors keep their graph. With `observe`, each tensor is handed to it as it appears
    and none is kept, so that statistics can stream. The model's output is the same bit for bit.
    Raises ProbeError for an unknown site, and at the end if a site never fired.
    """
    kept: dict[Site, Tensor] = {}

    def keep(site: Site, value: Tensor) -> None:
        kept[site] = value

    receive = observe or keep

    def look(site: Site, value: Tensor) -> None:
        receive(site, value.detach() if detach else value)

    with _hooked(model, {Site(*site): look for site in sites}):
        yield kept


@contextmanager
def edited(model: nn.Module, edits: Mapping[tuple[str, int], Edit]) -> Iterator[None]:
    """Replace the tensor at each site by `edit(tensor)`, of the same shape, in the passes run inside the `with` block.

    Gradients flow through the edits. Raises ProbeError if a shape changes or a site never fired.
    """

    def look(edit: Edit) -> Callable[[Site, Tensor], Tensor]:
        def change(site: Site, value: Tensor) -> Tensor:
            changed = edit(value)
            if changed.shape != value.shape:
                raise ProbeError(
                    f"{_label(site)}: edit returned shape {tuple(changed.shape)}, not {tuple(value.shape)}"
                )
            return changed.to(value.dtype)

        return change

    with _hooked(model, {Site(*site): look(edit) for site, edit in edits.items()}):
        yield


@contextmanager
def patched(model: nn.Module, edits: Mapping[tuple[str, int], Edit]) -> Iterator[None]:
    """Replace weights inside the `with` block: `edits` maps (projection, layer) to a function of the weight.

    The function gets a float32 copy of the weight and returns the new one, which is rounded to the model's dtype. The
    saved copy goes back afterwards, also after an exception, and is compared bit for bit.
    Raises PatchError if the new weight has another shape or is not finite; then nothing has been changed.
    """
    saved: dict[tuple[str, int], Tensor] = {}
    changed: dict[tuple[str, int], Tensor] = {}
    for place, edit in edits.items():
        parameter = weight(model, *place)
        saved[place] = parameter.detach().clone()
        changed[place] = _checked(edit(saved[place].float().clone()), saved[place], place)
    try:
        with torch.no_grad():
            for place, new in changed.items():
                weight(model, *place).copy_(new)
        yield
    finally:
        with torch.no_grad():
            for place, old in saved.items():
                parameter = weight(model, *place)
                parameter.copy_(old)
                if not same_bits(parameter, old):
                    raise PatchError(
                        f"{_label(place)}: the restored weight differs from the saved copy; reload the model"
                    )


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Let parameters hold other tensors inside the block (`parameter.data = …`), of any dtype, and be trained.

    Afterwards, also after an exception, each holds its own tensor again, which nothing inside may have written to.
    """
    own = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, data, trained in own:
            parameter.data, parameter.grad = data, None
            parameter.requires_grad_(trained)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes: NaNs equal themselves, and 0.0 differs from -0.0."""
    one, other = one.detach().contiguous(), other.detach().contiguous()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@contextmanager
def _hooked(model: nn.Module, actions: Mapping[Site, Callable[[Site, Tensor], Tensor | None]]) -> Iterator[None]:
    """Run each action on its site's tensor; a tensor it returns takes that tensor's place."""
    handles: list[RemovableHandle] = []
    fired: set[Site] = set()
    try:
        for site, action in actions.items():
            handles.append(_attach(model, site, action, fired))
        yield
    finally:
        for handle in handles:
            handle.remove()
    silent = [_label(site) for site in actions if site not in fired]
    if silent:
        raise ProbeError(
            f"{', '.join(silent[:3])}: never fired ({len(silent)} of {len(actions)} sites); was the model run?"
        )


def _attach(
    model: nn.Module, site: Site, action: Callable[[Site, Tensor], Tensor | None], fired: set[Site]
) -> RemovableHandle:
    module, side = locate(model, site)

    position = EXPERT_ROLES.get(site.role, 0)

    def act(value: Any) -> Any:
        """Apply the action to a tensor, or to one entry of a tuple; None leaves all as it is."""
        fired.add(site)
        entry = value[position] if isinstance(value, tuple) and len(value) > position else value
        if not isinstance(entry, Tensor):
            raise ProbeError(
                f"{_label(site)}: {side} of {type(module).__name__} is no tensor but {type(entry).__name__}"
            )
        new = action(site, entry)
        if new is None:
            return None
        return (*value[:position], new, *value[position + 1 :]) if isinstance(value, tuple) else new

    if side == "output":
        return module.register_forward_hook(lambda _module, _args, output: act(output))
    return module.register_forward_pre_hook(lambda _module, args: act(args))


def _checked(new: Tensor, old: Tensor, place: tuple[str, int]) -> Tensor:
    if new.shape != old.shape:
        raise PatchError(f"{_label(place)}: patched weight has shape {tuple(new.shape)}, expected {tuple(old.shape)}")
    new = new.to(old.dtype)
    if not torch.isfinite(new).all():
        raise PatchError(f"{_label(place)}: patched weight is not finite in {old.dtype}")
    return new


def _label(place: tuple[str, int]) -> str:
    return f"layers.{place[1]} {place[0]}"
