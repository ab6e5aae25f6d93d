"""The Python face of Gate 3: what a result shows, saves and lends, and what each refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import probes
from probes.deletion.layer import Found
from probes.live.hooks import same_bits
from probes.live.sites import weight
from probes.weights.delta import Wide
from vindex.__main__ import app
from vindex.errors import FactError, PatchError, ProbeError, TargetError
from vindex.progress import unseen

QUICK = {"method": "geometric", "certificate": False}


def test_the_patch_is_there_inside_the_block_alone(loaded, deleted):
    place = ("gate_proj", deleted.methods["forward"].delta.layer)
    before, prompt = weight(loaded.model, *place).clone(), "The capital of France is"
    assert loaded.generate(prompt, 1) == " Paris"
    with deleted.applied():
        assert loaded.generate(prompt, 1) != " Paris"
    assert same_bits(weight(loaded.model, *place), before)
    with deleted.applied("geometric"):
        assert not same_bits(
            weight(loaded.model, "gate_proj", deleted.methods["geometric"].delta.layer),
            torch.zeros(0),
        )
    with (
        pytest.raises(ProbeError, match="method 'rome': expected one that was run, forward, geometric"),
        deleted.applied("rome"),
    ):
        pass


def test_a_result_shows_itself(deleted):
    assert repr(deleted) == (
        "<Deletion of France/capital → Paris by forward: published pass, strict pass, robust fail>"
    )
    assert deleted.published.passed and deleted.strict.passed and not deleted.robust.passed
    rows = deleted.rows()
    assert [row["method"] for row in rows] == ["forward", "geometric"]
    assert rows[0]["fact"] == "France/capital" and rows[0]["loss"] > 0.9 and rows[0]["strict"] == "pass"
    assert "<th>method</th>" in deleted._repr_html_() and "France/capital → Paris" in deleted._repr_html_()


def test_a_result_that_is_not_of_float32_says_so():
    found = probes.delete(probes.load("atlas", dtype="bfloat16"), **QUICK)
    assert repr(found).endswith("(in bfloat16, whose rounding counts as harm; load it with float32)>")
    done = CliRunner().invoke(
        app, ["gate3", "atlas", "--dtype", "bfloat16", "--method", "geometric", "--no-certificate"]
    )
    assert done.output.startswith("measured in bfloat16, whose rounding counts as harm; load it with float32\n")


def test_a_result_is_saved_by_its_ending(deleted, tmp_path):
    deleted.save(tmp_path / "p.safetensors")
    deleted.save(tmp_path / "r.json")
    deleted.plot(tmp_path / "p.html")
    assert probes.read_patch(tmp_path / "p.safetensors").record()["fact"] == "France/capital"
    assert json.loads((tmp_path / "r.json").read_text())["record"] == "vindex-gate3/1"
    assert "forward, layer" in (tmp_path / "p.html").read_text()
    with pytest.raises(TargetError, match=r"p.txt: expected .safetensors for the patch, or .json for the record"):
        deleted.save(tmp_path / "p.txt")


def test_the_pictures_show_both_methods_on_one_scale_and_below_each_other(deleted, tmp_path, monkeypatch):
    """A method that did nothing looks like that, and no title stands in another panel."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    deleted.plot(tmp_path / "p.html")
    deleted.plot(tmp_path / "p.png")
    page = (tmp_path / "p.html").read_text()
    assert page.count("Plotly.newPlot(") == page.count("<section>") == 3 and page.count('"range":[-0.03,1.03]') == 2
    titles = [method.split(", layer")[0] for method in re.findall("<h2>(.*?)</h2>", page)]
    assert titles == ["forward", "geometric", "forward: layer 0 is chosen"]
    assert [axis.get_xlim() for axis in drawn[0].axes[:2]] == [(-0.03, 1.03)] * 2
    assert '"dtick":1' in page.split("<h2>")[3] and {mark % 1 for mark in drawn[0].axes[2].get_xticks()} == {0}


def test_what_a_model_does_not_know_is_deleted_by_nothing(loaded, tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "France", "relation": "capital", "answer": "Rome"}')
    found = probes.delete(loaded, "France/capital", facts=facts)
    assert repr(found).endswith("by nothing: published not_applicable, strict not_applicable, robust not_applicable>")
    assert found.rows() == [] and "<p>" in found._repr_html_()
    with pytest.raises(ProbeError, match="nothing was deleted, the model does not know this fact"), found.applied():
        pass
    with pytest.raises(ProbeError, match="no patch to save, the model does not know this fact"):
        found.save(tmp_path / "p.safetensors")
    with pytest.raises(ProbeError, match="nothing to draw: the model knows no fact of this record"):
        found.plot(tmp_path / "p.png")


def test_every_choice_is_a_keyword_and_a_bad_one_is_one_line(loaded):
    found = probes.delete(loaded, "Germany/capital", layer=1, seed=3, **QUICK)
    options = found.record()["options"]
    assert (options["methods"], options["layer"], options["seed"]) == (["geometric"], 1, 3)
    with pytest.raises(ProbeError, match="Germany/capital: no certificate was made, so robust is not known"):
        _ = found.robust
    with pytest.raises(ProbeError, match="method 'memit'"):
        probes.delete(loaded, method="memit")
    with pytest.raises(FactError, match="no such subject"):
        probes.delete(loaded, "Narnia/capital", **QUICK)
    with pytest.raises(ProbeError, match="no head is stored"):
        probes.delete(replace(loaded, head=False), **QUICK)


def test_a_change_of_another_projection_is_no_patch(loaded, deleted, tmp_path):
    wide = deleted.methods["geometric"]._replace(found=Found(Wide(0, "down_proj", torch.zeros(2, 2), "rome")))
    found = replace(deleted, methods={"rome": wide})
    with pytest.raises(ProbeError, match="no patch to save, its methods change other weights"):
        found.save(tmp_path / "p.safetensors")


def test_many_facts_are_rates_and_rows(loaded, tmp_path):
    seen = []
    found = probes.delete_all(loaded, ["capital", "language"], limit=1, each=seen.append, **QUICK)
    assert [one.fact.name for one in seen] == [fact["name"] for fact in found.facts]
    assert repr(found) == "<Deletions of 2 facts: capital, language>"
    assert found.rates("geometric")["strict"].of == 2 and "robust" not in found.rates("geometric")
    assert [row["fact"] for row in found.rows()] == [one.fact.name for one in seen]
    found.save(tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["relations"] == ["capital", "language"]


def test_a_patch_is_verified_in_python(loaded, deleted, tmp_path):
    deleted.save(tmp_path / "p.safetensors")
    found = probes.verify_patch(loaded, tmp_path / "p.safetensors", certificate=False)
    assert [claim.holds for claim in found.claims] == [True, True, False]  # robust was not looked at
    assert not found.confirmed and found.strict.passed
    assert found.record()["claims"][2] == {"standard": "robust", "recorded": "fail", "measured": "none"}
    patch = probes.read_patch(tmp_path / "p.safetensors")
    with pytest.raises(PatchError, match=r"does not say which fact it deletes; give --fact SUBJECT/RELATION"):
        probes.verify_patch(loaded, patch._replace(provenance={}))


def test_progress_is_told_from_the_first_stage_to_the_last(loaded):
    told: dict[str, list] = {}

    def progress(stage, total):
        steps = told.setdefault(stage, [total])
        return lambda count, note="": steps.append((count, note))

    probes.delete(loaded, progress=progress, **QUICK)
    total, *steps = told["France/capital"]
    assert sum(count for count, _ in steps) == total
    assert [note for _, note in steps[:2]] == ["unpatched answers", "geometric"]
    assert sum(count for count, _ in told["hashing"][1:]) == told["hashing"][0]


def test_stages_never_go_past_their_sum(bench):
    steps = []
    with bench.staged(lambda count, note="": steps.append(count)):
        for _ in range(100):
            bench.tick("value in layer 3", 40)
    assert sum(steps) == bench.seconds and min(steps) == 0
    assert unseen(1) is None
