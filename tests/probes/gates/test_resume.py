"""A training that was stopped goes on to the same bits."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save as to_bytes

from probes.gates import resume
from probes.gates.options import differences
from probes.gates.train import (
    train,
)
from probes.live.hooks import same_bits
from tests.probes.gates.progress import Told
from tests.probes.gates.short import SHORT
from vindex.errors import ProbeError


def test_a_run_stopped_before_there_were_more_options_is_gone_on_with():
    saved = {name: value for name, value in asdict(SHORT).items() if name not in ("init_mean", "context_weight")}
    assert differences(saved, SHORT) == []
    assert differences(saved, replace(SHORT, context_weight=1.0)) == ["context_weight: 0.0 there, 1.0 here"]


@pytest.mark.parametrize("where", ["after a step", "within the update"])
def test_ctrl_c_keeps_the_last_whole_step_and_a_resumed_run_ends_with_the_same_bits(
    atlas, plain, tmp_path, monkeypatch, where
):
    options = replace(SHORT, max_steps=5)
    straight = train(atlas, plain, options)
    update, updates = torch.optim.AdamW.step, []

    def cut_short(self, *arguments):
        update(self, *arguments)
        updates.append(self)
        if len(updates) == 4:
            raise KeyboardInterrupt  # the logits are those after step 4, the state is still that after step 3

    stop = Told({"training": 3})
    if where == "within the update":
        monkeypatch.setattr(torch.optim.AdamW, "step", cut_short)
        stop = Told()
    with pytest.raises(KeyboardInterrupt):
        train(atlas, plain, options, directory=tmp_path, progress=stop)
    monkeypatch.undo()
    told = Told()
    resumed = train(atlas, plain, options, directory=tmp_path, resuming=True, progress=told)
    assert told.total == told.done == {"training": 2}
    assert same_bits(resumed.gates.logits, straight.gates.logits)
    assert resumed.curves == straight.curves and len(straight.curves["loss"]) == 5


def test_the_state_is_saved_every_few_steps(atlas, plain, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(resume, "save", lambda directory, state, *rest: saved.append(state.step))
    train(atlas, plain, replace(SHORT, max_steps=5), directory=tmp_path, save_every=2)
    assert saved == [2, 4]


def test_resuming_another_run_is_refused(atlas, plain, tmp_path):
    with pytest.raises(ProbeError, match="nothing to resume; start without --resume"):
        train(atlas, plain, SHORT, directory=tmp_path, resuming=True)
    train(atlas, plain, SHORT, directory=tmp_path, save_every=2)
    with pytest.raises(
        ProbeError, match=r"another run's state \(beta: 4.0 there, 2.0 here; learning_rate: 0.01 there, 0.1 here"
    ):
        train(atlas, plain, replace(SHORT, learning_rate=0.1, beta=2.0), directory=tmp_path, resuming=True)
    with pytest.raises(ProbeError, match="the run used other data or another model"):
        train(atlas, plain._replace(sources={"rows": 3}), SHORT, directory=tmp_path, resuming=True)
    (tmp_path / resume.STATE).write_bytes(to_bytes({"logits": torch.zeros(2)}, {"state": "{}"}))
    with pytest.raises(ProbeError, match="damaged: no tensor exp_avg; start over with --force"):
        train(atlas, plain, SHORT, directory=tmp_path, resuming=True)
    (tmp_path / resume.STATE).write_bytes(b"cut")
    with pytest.raises(ProbeError, match="not valid JSON .*; start over with --force"):
        train(atlas, plain, SHORT, directory=tmp_path, resuming=True)
