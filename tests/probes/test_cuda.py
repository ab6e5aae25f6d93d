"""On a GPU the probes find what they find on the CPU, and leave no trace. Run by `pytest -m cuda`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes.atlas import panel as facts
from probes.deletion.bench import Bench
from probes.deletion.delete import run
from probes.deletion.keys import own_text
from probes.deletion.options import ForwardOptions, Options
from probes.gates.apply import gated
from probes.gates.data import read_forget, read_retain
from probes.gates.gates import Gates
from probes.gates.options import TrainOptions
from probes.gates.train import encode, train
from probes.live.hooks import capture, edited, patched, same_bits
from probes.live.load import load
from probes.live.sites import sites, weight
from probes.suite.run import constants
from vindex.demo import CHECKPOINT

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

CONSTANT = {"rel": 2e-3, "abs": 2e-4}  # of every constant and variant: float32 on both, summed in another order
SUPPRESSION = 0.02  # of a fitted patch, whose optimiser follows roundings for 126 steps
LOSS = 1e-3  # relative, of the first steps of training
SHORT = TrainOptions(batch_size=4, micro_batch=4, max_steps=3)


@pytest.fixture(scope="module")
def here():
    return load(CHECKPOINT, dtype="float32", device="cpu")


@pytest.fixture
def there():
    return load(CHECKPOINT, dtype="float32", device="cuda")


def ids_of(loaded, text: str = "The capital of France is") -> torch.Tensor:
    return torch.tensor([loaded.tokenizer(text)["input_ids"]], device=loaded.model.device)


def test_constants_are_those_of_the_cpu(here, there):
    ours, theirs = (constants(loaded, texts=["factual", "code"], batch_size=2) for loaded in (there, here))
    assert [constant.symbol for constant in ours] == ["C1", "C2", "C3", "C4", "C5"]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.headline.value == pytest.approx(other.headline.value, **CONSTANT), mine.symbol
        for name, variant in mine.variants.items():
            assert variant.value == pytest.approx(other.variants[name].value, **CONSTANT), (mine.symbol, name)
    for mine, other in zip(ours.geometry.gate, theirs.geometry.gate, strict=True):
        np.testing.assert_allclose(mine.singular_values, other.singular_values, rtol=1e-9)


def test_half_precision_is_measured(there):
    there.model.to(torch.bfloat16)
    assert all(np.isfinite(constant.headline.value) for constant in constants(there, texts=["factual"]))


def test_reading_changes_nothing(there):
    model, ids = there.model, ids_of(there)
    with torch.no_grad():
        before = model(ids).logits
        with capture(model, sites(model, "gate", "hidden", "residual")) as seen:
            during = model(ids).logits
    assert same_bits(before, during) and len(seen) == 12 and all(value.is_cuda for value in seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_and_edits_are_undone_bit_for_bit(there, dtype):
    model, ids = there.model.to(dtype), ids_of(there)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        said = model(ids).logits
        with patched(model, {("gate_proj", 1): lambda w: w + 0.1}):
            assert not same_bits(weight(model, "gate_proj", 1), before["model.layers.1.mlp.gate_proj.weight"])
            assert not same_bits(model(ids).logits, said)
        with pytest.raises(KeyError), edited(model, {("hidden", 2): lambda h: h * 0}):
            model(ids)
            raise KeyError
        assert same_bits(model(ids).logits, said)
    assert all(same_bits(parameter, before[name]) for name, parameter in model.named_parameters())


def test_its_own_text_is_the_same_on_both(here, there):
    ours, theirs = (own_text(loaded.model, loaded.tokenizer, 256) for loaded in (there, here))
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    assert same >= 15, f"{same} of {len(theirs)}"  # a draw may fall on the edge between two tokens


def test_gate_3_comes_to_the_same_verdicts(here, there):
    before = {name: parameter.detach().clone() for name, parameter in there.model.named_parameters()}
    results = []
    for loaded in (there, here):
        bench = Bench(loaded, facts.panel(), Options(forward=ForwardOptions(samples=512)))
        results.append(run(bench, bench.panel.find("France/capital")))
    ours, theirs = results
    assert ours.before.probability == pytest.approx(theirs.before.probability, abs=1e-4)
    for name, mine in ours.methods.items():
        other = theirs.methods[name]
        assert {key: found.result for key, found in mine.verdicts.items()} == {
            key: found.result for key, found in other.verdicts.items()
        }, name
        assert mine.effect.headline.loss == pytest.approx(other.effect.headline.loss, abs=SUPPRESSION), name
        assert mine.delta.layer == other.delta.layer and not mine.delta.gate_write.is_cuda
    assert all(same_bits(parameter, before[name]) for name, parameter in there.model.named_parameters())


def test_gates_train_and_apply(here, there, tmp_path):
    from accelerate.state import AcceleratorState

    rows = read_forget(None, 16), read_retain(None, 16)
    curves, gates = [], []
    for loaded in (there, here):
        AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device of the first run
        trained = train(loaded, encode(loaded, *rows, SHORT, {}), SHORT, directory=tmp_path / loaded.model.device.type)
        curves.append(trained.curves["loss"])
        gates.append(trained.gates)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(curves[0]) == 3
    np.testing.assert_allclose(curves[0], curves[1], rtol=LOSS)
    assert not gates[0].logits.is_cuda
    off = Gates(gates[1].logits).below(gates[1].threshold_at(0.25)).factors()
    with torch.no_grad():
        said = []
        for loaded in (there, here):
            with gated(loaded.model, off):
                said.append(loaded.model(ids_of(loaded)).logits.cpu())
    torch.testing.assert_close(said[0], said[1], rtol=1e-3, atol=1e-3)


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(there, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    data = encode(there, read_forget(None, 16), read_retain(None, 16), SHORT, {})
    whole = train(there, data, SHORT, directory=tmp_path / "whole", save_every=1)
    seen = []

    def stop(step, steps, parts):
        seen.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(there, data, SHORT, directory=tmp_path / "part", save_every=1, on_step=stop)
    again = train(there, data, SHORT, directory=tmp_path / "part", save_every=1, resuming=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    apart = (again.gates.logits - whole.gates.logits).abs()  # a gradient near 0 may change its sign by a rounding
    assert (apart > 1e-5).float().mean() < 0.01 and again.curves["loss"] == pytest.approx(
        whole.curves["loss"], rel=LOSS
    )
