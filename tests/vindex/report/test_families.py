"""Pages of the families that others publish: what each has, and what it lacks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

import vindex
from tests.foreign import FEATURES, HIDDEN, LAYERS, NEURONS, leading, weights, write_published
from tests.vindex.report.records import written
from tests.vindex.report.test_report import Seen, data_in, numbers
from vindex.__main__ import app
from vindex.demo import CHECKPOINT
from vindex.errors import LackingError
from vindex.report.directions import directions
from vindex.report.moved import beside


@pytest.mark.parametrize("family", ["published", "summary", "browse"])
def test_a_report_has_what_the_family_has_and_says_what_it_lacks(request, family, tmp_path):
    v = vindex.open(request.getfixturevalue(family))
    page = vindex.write_report(v, tmp_path / "r.html").read_text()
    seen, data = Seen(page), data_in(page)
    text = " ".join(seen.text.split())
    assert v.family.title in text and all(lack.what in text and lack.way_out in text for lack in v.lacks)
    assert "No spectra: " in text and "vindex build MODEL" in text and "probe.json" not in text
    assert data["sigma"] is data["coherence"] is data["response"] is data["snippets"] is None
    assert data["rows"] == v.index.num_rows and seen.text.count("singular values, which") == 1
    near = numbers(data["nearest"]["rows"], "<u4").reshape(v.index.num_rows, -1)
    best = v.hit(int(near[7, 0]), 0.0)
    place = v.hit(7, 0.0)
    expected = v.nearest_features(place.layer, place.feature, k=1, expert=place.expert)[0]
    assert (best.layer, best.expert, best.feature) == (expected.layer, expected.expert, expected.feature)


def test_a_report_of_a_browse_vindex_has_the_tokens_that_neurons_write(browse):
    v, data = vindex.open(browse), directions(vindex.open(browse))
    assert data["neurons"] and data["poles"] == 1 and list(data["sides"]) == ["writes"]
    tokens = numbers(data["sides"]["writes"]["tokens"], "<u4").reshape(v.index.num_rows, data["pole"])
    for layer, neuron in ((0, 3), (2, NEURONS - 1)):  # the last is a free place
        shown = [data["strings"][token] for token in tokens[v.row(layer, neuron, None)]]
        assert [piece for piece in shown if piece] == [token.piece for token in v.feature(layer, neuron).writes]


def test_a_report_sets_two_published_vindexes_side_by_side_without_noise(published, built, tmp_path):
    gate = np.stack([leading(weights(NEURONS, HIDDEN, seed=50 + layer), FEATURES) for layer in range(LAYERS)])
    other = write_published(tmp_path / "other", 3 * gate, gate, weights(9, HIDDEN))
    v = vindex.open(published)
    found = beside(v, vindex.open(other))
    assert len(found.moved) == 20 and {one.noise for one in found.moved} == {None} and found.moved[0].angle > 0.5
    assert 0 < found.moved[0].cosine < 1
    text = Seen(vindex.write_report(v, tmp_path / "r.html", against=vindex.open(other)).read_text()).text
    assert "nobody can say how much of it is noise" in text and "The 20 directions that moved most" in text
    record = written(vindex.open(built), tmp_path)["trace"]
    with pytest.raises(LackingError, match=r"trace.json: is of weights by their SHA-256, and published does not say"):
        vindex.write_report(v, tmp_path / "r.html", trace=record)


def test_a_tokenizer_that_is_given_names_the_tokens_of_both(published, tmp_path):
    other = shutil.copytree(published, tmp_path / "other")
    gates = np.memmap(other / "gate_vectors.bin", np.float16, "r+")
    gates[:HIDDEN] = gates[HIDDEN : 2 * HIDDEN]
    gates.flush()
    page = tmp_path / "r.html"
    asked = ["report", str(published), "--against", str(other), "-o", str(page)]
    for options, named in (([], False), (["--tokenizer", str(CHECKPOINT)], True)):
        assert CliRunner().invoke(app, [*asked, *options]).exit_code == 0
        assert ("<id" not in Seen(page.read_text()).text) is named
    assert CliRunner().invoke(app, ["report", str(published), "-o", str(page), "--tokenizer", "a/b/c"]).exit_code == 1


def test_numbers_that_are_not_finite_have_no_neighbours(published, tmp_path):
    directory = shutil.copytree(published, tmp_path / "v")
    numbers = np.memmap(directory / "gate_vectors.bin", np.float16, "r+")
    numbers[7] = np.nan
    numbers.flush()
    assert directions(vindex.open(directory))["nearest"] is None
