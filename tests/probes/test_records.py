"""What every result shares."""

from __future__ import annotations

import json

import numpy as np
import pytest

from probes.live.match import describe
from probes.records import Result, head, plain
from vindex.errors import TargetError


class Two(Result):
    def record(self):
        return plain({"values": np.array([1 / 3, np.nan])})

    def rows(self):
        return [{"name": "<b>", "value": 1 / 3}, {"name": "b", "value": None}]

    def __repr__(self):
        return "Two(<2>)"


def test_a_result_is_saved_as_its_record(tmp_path):
    Two().save(tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text()) == {"values": [0.333333, None]}
    with pytest.raises(TargetError):
        Two().save(tmp_path / "none" / "two.json")


def test_a_result_shows_itself_in_a_notebook_and_its_text_is_never_markup():
    html = Two()._repr_html_()
    assert html.startswith("<p>Two(&lt;2&gt;)</p><table><tr><th>name</th><th>value</th></tr>")
    assert "<td>&lt;b&gt;</td><td>0.3333</td>" in html and "<td>b</td><td>–</td>" in html


def test_every_record_begins_alike_and_names_its_model(tiny):
    assert list(head("vindex-x/1")) == ["record", "created", "libraries"]
    found = describe(tiny, {"model.safetensors": "0" * 64})
    assert (found["num_layers"], found["intermediate_size"]) == (3, 48)
    assert (found["hidden_size"], found["vocab_size"], found["dtype"]) == (32, 258, "float32")
    assert json.loads(json.dumps(found)) == found
