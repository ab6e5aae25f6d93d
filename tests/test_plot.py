"""`vindex plot`: saved records are drawn again, whatever made them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vindex.__main__ import app
from vindex.charts import COLOURS, SUFFIXES, Curve, draw_curves

RECORDS = Path(__file__).parents[1] / "docs" / "records"
DRAWN = (
    "atlas.json",
    "gates-atlas.json",
    "gates-atlas-training.json",
    "gate3-135m-france.json",
    "gate3-135m-capitals.json",
)


def plot(*arguments):
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


@pytest.mark.parametrize("name", DRAWN)
def test_records_of_every_kind_are_drawn_again(name, tmp_path):
    done = plot(RECORDS / name, "-o", tmp_path / "p.html")
    said = "".join(done.output.split())  # a long path stands in a line of its own
    assert done.exit_code == 0 and said == f"wrote{tmp_path / 'p.html'}:openitinabrowser", done.exception
    content = (tmp_path / "p.html").read_text()
    named = re.match(r'<!doctype html>\n<html lang="en"><head>.*?<title>(.*?)</title>', content)[1]
    assert json.loads((RECORDS / name).read_text())["model"]["name"] in named and f"<h1>{named}</h1>" in content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_are_marked_at_whole_numbers(suffix, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    page = tmp_path / f"p{suffix}"
    draw_curves([Curve("a & b", range(3), (0.1, None, 0.2), COLOURS[0])], page, "1 < 2", "layer", "rad")
    if drawn:
        assert {mark % 1 for mark in drawn[0].axes[0].get_xticks()} == {0}
    else:
        assert '"dtick":1' in page.read_text() and "<title>1 &lt; 2</title>" in page.read_text()


def test_each_panel_of_a_probe_names_its_curves_axes_and_colours(tmp_path):
    """Layers are marked at whole numbers; the heat map says what its colours are."""
    plot(RECORDS / "atlas.json", "-o", tmp_path / "p.html")
    panels = (tmp_path / "p.html").read_text().split("<h2>")[1:]
    assert len(panels) == 6 and all('"title":{"text":"layer"}' in panel and '"dtick":1' in panel for panel in panels)
    assert all('"showlegend":true' in panel for panel in panels[:5])
    assert '"showscale":false' not in panels[5] and panels[5].count('"title":{"text":"layer"}') == 2


def test_what_was_drawn_as_json(tmp_path):
    shown = json.loads(plot(RECORDS / DRAWN[0], "-o", tmp_path / "p.html", "--json").output)
    assert shown == {"record": "vindex-probe/1", "plot": str(tmp_path / "p.html")} and (tmp_path / "p.html").exists()


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    record = tmp_path / "r.json"
    for content, message in (
        (
            {"record": "vindex-training/1"},
            "its record is 'vindex-training/1', of which there is no picture; known",
        ),
        ({"record": "vindex-trace/1"}, "of which there is no picture; vindex report VINDEX --trace .*r.json shows it"),
        ({}, "its record is 'None', of which there is no picture"),
        (
            {"record": "vindex-comparison/1"},
            r"not a whole vindex-comparison/1 record \(KeyError: 'layers'\); write",
        ),
    ):
        record.write_text(json.dumps(content))
        with pytest.raises(Exception, match=message):
            raise plot(record).exception
    with pytest.raises(Exception, match="p.pdf: plots are written as .html or .png"):
        raise plot(record, "-o", tmp_path / "p.pdf").exception
    assert not list(tmp_path.glob("*.html"))
