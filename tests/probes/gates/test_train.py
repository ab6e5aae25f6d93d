"""Only the gates learn, against the ungated model, by the loss that is stated."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from probes.gates import losses, resume
from probes.gates.activations import mean_magnitude
from probes.gates.apply import gated
from probes.gates.data import context_rows, forget_row, read_forget, read_retain
from probes.gates.encode import collate
from probes.gates.gates import Gates
from probes.gates.learn import train_gates
from probes.gates.options import PRESETS, TrainOptions, from_preset
from probes.gates.train import (
    accelerator_on,
    base_logits,
    encode,
    gradient,
    initial_logits,
    learning_rate,
    plan,
    record,
    train,
)
from probes.live.hooks import same_bits
from probes.live.load import load
from tests.probes.gates.short import SHORT, data_for
from vindex.errors import FactError, ProbeError

ROOT = Path(__file__).parents[3]


def gradient_of(loaded, options, data, logits=None):
    logits = torch.nn.Parameter(initial_logits((4, 384), options) if logits is None else logits.clone())
    accelerator = accelerator_on(torch.device("cpu"))
    return gradient(loaded.model, logits, data.forget[:8], data.retain[:16], [], options, accelerator, 0), logits


def test_the_base_distribution_is_the_ungated_model(atlas, plain):
    batch = collate(plain.retain[:4], 0)
    with torch.no_grad():
        bare = atlas.model(input_ids=batch.ids, attention_mask=batch.real.long()).logits
    torch.testing.assert_close(base_logits(atlas.model, batch, batch.predicted), bare[:, :-1][batch.predicted])
    parts, _ = gradient_of(atlas, replace(SHORT, unmasked_retain_weight=1.0), plain, torch.full((4, 384), 30.0))
    assert parts.retain == pytest.approx(0, abs=1e-6) and parts.nke == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_terms(atlas, plain):
    options = replace(SHORT, unmasked_retain_weight=0.7, lambda_f=0.3, beta=3.0, temperature=1.5)
    parts, logits = gradient_of(atlas, options, plain)
    forget, retain = collate(plain.forget[:8], 0), collate(plain.retain[:16], 0)
    with torch.no_grad(), gated(atlas.model, torch.sigmoid(logits.detach())):
        on_forget, on_retain = (
            atlas.model(input_ids=b.ids, attention_mask=b.real.long()).logits for b in (forget, retain)
        )
    others = forget.predicted & ~forget.entity[:, 1:]
    expected_forget = losses.forget_sum(on_forget[:, :-1][forget.entities], forget, 3.0) / 8
    kept = base_logits(atlas.model, retain, retain.predicted)
    expected_retain = 1.5**2 * losses.kl_sum(kept, on_retain[:, :-1][retain.predicted], 1.5) / retain.predicted.sum()
    expected_nke = losses.kl_sum(base_logits(atlas.model, forget, others), on_forget[:, :-1][others]) / others.sum()
    assert parts.forget == pytest.approx(float(expected_forget), rel=1e-4)
    assert parts.retain == pytest.approx(float(expected_retain), rel=1e-4)
    assert parts.nke == pytest.approx(float(expected_nke), rel=1e-4)
    assert parts.loss == pytest.approx(0.3 * parts.forget + 0.5 * parts.retain + 0.7 * parts.nke, rel=1e-6)


def test_kl_where_the_text_states_the_answer_is_over_what_the_plain_model_reads_off_it(atlas):
    """By hand; and the prompts state the fact or another answer, and ask with no text between."""
    options = replace(SHORT, context_weight=2.0, lambda_f=0.0, lambda_r=0.0)
    data = encode(atlas, read_forget(None, 6), read_retain(None, 6), options, {})
    logits = initial_logits((4, 384), options)
    accelerator = accelerator_on(torch.device("cpu"))
    trained = torch.nn.Parameter(logits.clone())
    some = list(data.context[:4])
    parts = gradient(atlas.model, trained, [data.forget[0]], [data.retain[0]], some, options, accelerator, 0)
    total, count = 0.0, 0
    for example in some:
        with torch.no_grad():
            base = atlas.model(example.ids[None]).logits[0].double().log_softmax(-1)
            with gated(atlas.model, torch.sigmoid(logits)):
                changed = atlas.model(example.ids[None]).logits[0].double().log_softmax(-1)
        for place in example.entity.nonzero().flatten().tolist():
            count += 1
            if int(base[place - 1].argmax()) == int(example.ids[place]):
                total += float((base[place - 1].exp() * (base[place - 1] - changed[place - 1])).sum())
    assert total > 0 and parts.context == pytest.approx(total / count, rel=1e-3)
    assert parts.loss == pytest.approx(2 * parts.context, rel=1e-6) and float(trained.grad.abs().sum()) > 0


def test_rows_that_state_the_answer_first(atlas):
    facts = [forget_row(row, "x") for row in (
        {"text": "The capital of France is Paris.", "prop": "capital", "obj": "Paris"},
        {"text": "The capital of Italy is Rome.", "prop": "capital", "obj": "Rome", "shots": "A is B.\n"},
        {"text": "Oslo is the capital of Norway.", "prop": "capital", "obj": "Oslo"},
    )]  # fmt: skip
    made = context_rows(facts, 0)
    assert len(made) == 4 and [row.shots for row in made] == [""] * 4
    for row in made:
        start, end = row.spans[0]
        assert end == len(row.text) and row.text.count(row.text[start:end]) == 2 and row.text[:start].endswith(" is ")
    assert [row.text[slice(*row.spans[0])] for row in made][::2] == ["Paris", "Rome"] and made == context_rows(facts, 0)


def test_gates_begin_open_and_less_so_where_the_ratio_is_high(atlas, plain):
    options = replace(SHORT, init_mean=3.0, init_std=0.0, init_ratio=0.5, max_steps=1, learning_rate=1e-9)
    begun = train(atlas, plain, options).gates.logits
    said, worked = (mean_magnitude(atlas, rows, entity=e) for rows, e in ((plain.forget, True), (plain.retain, False)))
    ratio = (said / worked).log()
    score = ((ratio - ratio.mean(1, keepdim=True)) / ratio.std(1, keepdim=True)).clamp_min(0)
    torch.testing.assert_close(begun, 3.0 - 0.5 * score, rtol=1e-3, atol=1e-3)


def test_only_the_logits_receive_gradient_and_the_weights_never_change(tiny_checkpoint):
    loaded = load(tiny_checkpoint, dtype="bfloat16", device="cpu")
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    data = data_for(loaded, SHORT, 8)
    trained = train(loaded, data, SHORT)
    for name, parameter in loaded.model.named_parameters():
        assert parameter.grad is None and same_bits(parameter, before[name]), name
    assert not torch.equal(trained.gates.logits, initial_logits((3, 48), SHORT))


def test_adam_is_float32_whatever_the_models_dtype(tiny_checkpoint, tmp_path):
    loaded = load(tiny_checkpoint, dtype="bfloat16", device="cpu")
    train(loaded, data_for(loaded, SHORT, 8), SHORT, directory=tmp_path, save_every=2)
    with safe_open(tmp_path / resume.STATE, framework="pt") as file:
        for name in ("logits", "exp_avg", "exp_avg_sq"):
            assert file.get_tensor(name).dtype == torch.float32
            assert bool((file.get_tensor(name) != 0).all()), name


def test_every_gate_of_every_layer_gets_a_gradient_and_its_sign_is_right(atlas, plain):
    """Finite differences along the gradient, of the forget and the retain term alone."""
    for options in (replace(SHORT, lambda_r=0.0), replace(SHORT, lambda_f=0.0)):
        parts, logits = gradient_of(atlas, options, plain)
        assert bool((logits.grad.abs().sum(1) > 0).all())
        step = 1e-2 * logits.grad / logits.grad.norm()
        after, _ = gradient_of(atlas, options, plain, logits.detach() - step)
        assert parts.loss - after.loss == pytest.approx(float((step * logits.grad).sum()), rel=0.1)


def test_micro_batches_change_memory_and_not_the_gradient(atlas, plain):
    whole_parts, whole = gradient_of(atlas, replace(SHORT, micro_batch=64), plain)
    split_parts, split = gradient_of(atlas, replace(SHORT, micro_batch=3), plain)
    assert split_parts.loss == pytest.approx(whole_parts.loss, rel=1e-5)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-3, atol=1e-7)


def test_an_epoch_is_one_pass_over_the_forget_data_and_two_retain_batches_go_to_each_of_its():
    schedule = plan(TrainOptions(batch_size=4, epochs=3), forget=10, retain=7)
    assert schedule.steps == 9 and [len(batch) for batch in schedule.forget[:3]] == [4, 4, 2]
    for epoch in range(3):
        assert sorted(chain(*schedule.forget[3 * epoch : 3 * epoch + 3])) == list(range(10))
    assert all(len(batch) == 8 for batch in schedule.retain)
    assert sorted([*chain(*schedule.retain)][:7]) == list(range(7))
    assert plan(TrainOptions(batch_size=4, epochs=3), 10, 7) == schedule
    assert plan(TrainOptions(batch_size=4, epochs=3, seed=1), 10, 7) != schedule


def test_the_learning_rate_is_a_cosine_without_warm_up():
    options = TrainOptions(learning_rate=0.01)
    rates = [learning_rate(options, step, 100) for step in (0, 50, 99)]
    assert rates[:2] == pytest.approx([0.01, 0.005]) and 0 < rates[2] < 1e-5


def test_the_gates_start_at_half_with_the_published_spread():
    logits = initial_logits((28, 3072), TrainOptions())
    assert float(logits.std()) == pytest.approx(0.1, rel=0.01)
    assert float(torch.sigmoid(logits).std()) == pytest.approx(0.025, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(atlas, preset):
    options = from_preset(preset, batch_size=4, max_steps=3)
    data = data_for(atlas, options, 12)
    trained = train(atlas, data, options)
    curves = trained.curves
    assert all(value > 0 for value in curves["forget"] + curves["retain"])
    assert all((value > 0) == (options.unmasked_retain_weight > 0) for value in curves["nke"])
    assert options.chat == preset.startswith("chat_")
    assert options.scale_mode == {"chat_m": "mean", "chat_e": "energy", "readin": "energy"}.get(preset[:6], "none")
    made = record(atlas, trained, options, data)
    assert made["options"]["preset"] == preset and made["steps"] == 3 and json.dumps(made)


BOTH = """
import os, sys
import accelerate, torch, transformers, probes.gates.learn  # once: it takes longer than the training
from vindex.__main__ import main
other = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
try:
    main()
except SystemExit as done:
    sys.exit(done.code or (other and os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])))
"""


def test_two_processes_train_the_same_gates_as_one(tiny_checkpoint, tmp_path):
    """Through the command, in the surroundings that `accelerate launch` makes on several GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = ["gates", "train", str(tiny_checkpoint), "-o", str(tmp_path / "two")]
    command += "--max-steps 3 --batch-size 4 --forget-limit 20 --retain-limit 20".split()
    done = subprocess.run(
        [sys.executable, "-c", BOTH, *command], cwd=ROOT, env=os.environ | surroundings, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote") == 1
    loaded = load(tiny_checkpoint, device="cpu")
    one = train_gates(loaded, max_steps=3, batch_size=4, forget_limit=20, retain_limit=20)
    two = Gates.read(tmp_path / "two")
    assert two.training["processes"] == 2 and one.training["processes"] == 1
    torch.testing.assert_close(two.logits, one.logits, rtol=0, atol=1e-4)
    assert not torch.equal(one.logits, initial_logits((3, 48), SHORT))


def test_the_record_holds_every_option_and_gates_know_how_they_were_trained(tiny_checkpoint, tmp_path):
    loaded = load(tiny_checkpoint, device="cpu")
    changes = {"scale_mode": "energy", "max_steps": 1, "batch_size": 2, "seed": 7}
    made = train_gates(loaded, output=tmp_path / "g", forget_limit=4, retain_limit=4, **changes)
    read = Gates.read(tmp_path / "g")
    assert read.training == made.training and read.scale_mode == "energy" and read.name == made.name == "g"
    assert read.training["options"] == asdict(from_preset("baseline", **changes))
    assert read.training["data"]["forget"]["rows"] == 4 and read.training["model"]["dtype"] == "float32"
    assert torch.equal(read.factors(), read.factors("energy")) and not torch.equal(read.factors(), read.factors("none"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.0}, "learning_rate 0.0: expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan: expected more than 0"),
        ({"lambda_r": float("nan")}, "lambda_r nan: expected 0 or more"),
        ({"batch_size": 0}, "batch_size 0: expected more than 0"),
        ({"lambda_f": -1.0}, "lambda_f -1.0: expected 0 or more"),
        ({"max_steps": 0}, "max_steps 0: expected at least 1"),
        ({"max_tokens": 1}, "max_tokens 1: expected at least 2"),
        ({"scale_mode": "rms"}, "scale mode 'rms': expected none, mean, energy"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ProbeError, match=message):
        from_preset("baseline", **change)


def test_unknown_presets_and_empty_data_are_refused(atlas, plain):
    with pytest.raises(ProbeError, match="preset 'chat': expected one of baseline, nke_w1p0"):
        from_preset("chat")
    with pytest.raises(FactError, match="0 forget and 40 retain examples; expected at least one of each"):
        train(atlas, plain._replace(forget=[]), SHORT)


def test_a_loss_that_is_not_finite_stops_the_run(atlas, plain):
    with pytest.raises(ProbeError, match="step [123]: the loss is (nan|inf); lower learning_rate or use float32"):
        train(atlas, plain, replace(SHORT, lambda_f=float("inf")))
