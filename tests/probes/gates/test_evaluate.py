"""Evaluations: areas, the record of every point and choice, and what a stopped one keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from probes.gates import plot
from probes.gates.controls import RANDOM_SEEDS
from probes.gates.evaluate import evaluate_gates
from probes.gates.evaluation import area, mean_of, retained
from probes.gates.gates import Gates
from probes.gates.options import EvalOptions
from tests.probes.gates.progress import Told
from vindex.errors import PatchError, ProbeError, TargetError


def test_the_area_is_one_when_facts_go_first_and_half_when_both_go_together():
    assert area([(0.0, 1.0)]) == 1 and area([(1.0, 0.0)]) == 0
    assert area([(0.25, 0.25), (0.75, 0.75)]) == pytest.approx(0.5)
    assert area([(0.5, 1.0)]) == pytest.approx(0.5 + 0.25)
    assert area([(1.3, 0.0)]) == 0  # clipped
    assert retained(0.3, 0.6) == 0.5 and math.isnan(retained(0.0, 0.0))


@pytest.fixture(scope="module")
def evaluation(atlas, random_gates, files):
    return evaluate_gates(atlas, random_gates, thresholds=random_gates.selected_thresholds()[:2], **files)


def without_time(result):
    return {key: value for key, value in result.record().items() if key != "created"}


def test_an_evaluation_holds_every_point_and_the_record_every_choice(evaluation, random_gates):
    result = evaluation
    assert len(result.entries) == 2 * (4 + RANDOM_SEEDS) and set(result.areas) == set(plot.FAMILIES) - {"smallest |h|"}
    assert result.advantage == result.areas["gates"].value - result.areas["random"].value
    chance = [entry for entry in result.entries if entry.family == "random" and entry.point.off_fraction < 0.1]
    assert mean_of(chance).scores.share("forget").value == pytest.approx(
        sum(e.scores.share("forget").value for e in chance) / RANDOM_SEEDS
    )
    made = result.record()
    assert json.loads(json.dumps(made)) == made and len(made["entries"]) == len(result.entries)
    assert set(EvalOptions.__dataclass_fields__) < set(made["choices"]) and made["choices"]["random_seeds"] == 5
    assert made["choices"]["thresholds"] == pytest.approx(random_gates.selected_thresholds()[:2])
    assert made["choices"]["soft_scale_mode"] == "none" and list(made["model"]["weights_sha256"]) == [
        "model.safetensors"
    ]


def test_an_evaluation_shows_itself(evaluation):
    rows = evaluation.rows()
    assert [row["mask"] for row in rows[:4]] == ["plain model", "soft gates", "gates", "random"] and len(rows) == 12
    assert rows[2]["off_fraction"] == pytest.approx(0.05, abs=1e-3) and rows[0]["knowledge_retained"] is None
    assert repr(evaluation).startswith(f"<gates on atlas: area {evaluation.area:.3f}, ")
    assert evaluation._repr_html_().count("<tr>") == 13


def test_a_saved_record_is_drawn_again(evaluation, tmp_path):
    evaluation.save(tmp_path / "eval.json")
    record = json.loads((tmp_path / "eval.json").read_text())
    evaluation.plot(tmp_path / "curves.png")
    plot.draw(record, tmp_path / "again.png")
    plot.draw(record, tmp_path / "curves.html")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    page = (tmp_path / "curves.html").read_text()
    assert "area between gates and random masks" in page and "soft gates" in page
    assert "good: facts gone, reasoning kept" in page
    with pytest.raises(TargetError, match="plots are written as"):
        evaluation.plot(tmp_path / "curves.pdf")


def test_a_model_that_knows_nothing_has_no_area(evaluation, tmp_path):
    knows = replace(evaluation.base, cells=tuple(c._replace(right=0) for c in evaluation.base.cells))
    entries = tuple(entry._replace(knowledge=math.nan) for entry in evaluation.entries)
    ignorant = replace(evaluation, base=knows, entries=entries)
    record = ignorant.record()
    assert record["advantage"] is None and record["soft"]["knowledge_retained"] is None
    for name in ("a.png", "a.html"):
        ignorant.plot(tmp_path / name)


def test_a_stopped_evaluation_goes_on_from_its_finished_masks(evaluation, atlas, random_gates, files, tmp_path):
    out, whole = tmp_path / "eval.json", len(evaluation.entries) + 2
    options = {"thresholds": random_gates.selected_thresholds()[:2], "output": out, **files}
    each = 3 + 3 + 2 + 1 + 1  # answers of the five panels
    with pytest.raises(KeyboardInterrupt):
        evaluate_gates(atlas, random_gates, progress=Told({"masks": whole + 7 * (each - 1) + 2}), **options)
    journal = out.with_name("eval.json.unfinished")
    assert not out.exists() and len(json.loads(journal.read_text())["scores"]) == 7
    stopped = journal.read_bytes()
    told = Told()
    done = evaluate_gates(atlas, random_gates, progress=told, **options)
    stage = f"masks (7 of {whole} kept from before)"
    assert done.reused == 7 and told.total[stage] == told.done[stage] == (whole - 7) * each
    assert told.total["activations"] == told.done["activations"] == 4
    assert without_time(done) == without_time(evaluation) and not journal.exists()
    assert json.loads(out.read_text()) == done.record()
    for change in ({"batch_size": 2}, {"chat": True}, {"neutral": None}):  # decides scores: nothing is taken over
        journal.write_bytes(stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_gates(atlas, random_gates, progress=Told({"masks": 1}), **options | change)
    for content, message in (
        (b"{", "eval.json.unfinished: not valid JSON.*remove it to evaluate from the beginning"),
        (b'{"mine": 1}', "is no stopped evaluation; move it away, or choose another place"),
        (stopped.replace(b"[[", b'["x",['), "is no stopped evaluation"),
    ):
        journal.write_bytes(content)
        with pytest.raises(TargetError, match=message):
            evaluate_gates(atlas, random_gates, **options)
        assert journal.read_bytes() == content


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count 0: expected at least 1"),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"generate": -1}, "generate -1: expected at least 0"),
        ({"soft_scale_mode": "rms"}, "scale mode 'rms': expected none, mean, energy"),
        ({"thresholds": [1.5]}, "threshold 1.5: expected a λ between 0 and 1"),
        ({"retain": None}, "--forget without --retain, or the reverse"),
    ],
)
def test_choices_out_of_range_are_refused(atlas, random_gates, files, change, message):
    with pytest.raises(ProbeError, match=message):
        evaluate_gates(atlas, random_gates, **{**files, **change})


def test_gates_of_another_size_are_refused(atlas):
    with pytest.raises(PatchError, match="the gates are 3 × 384"):
        evaluate_gates(atlas, Gates(torch.zeros(3, 384)))
