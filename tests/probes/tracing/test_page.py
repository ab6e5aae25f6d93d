"""The page and the tables of a trace."""

import json
import re
from html.parser import HTMLParser

import pytest

import probes
from tests.probes.test_command import run as command
from tests.probes.tracing.conftest import OTHER, PROMPT
from vindex.errors import ProbeError, QueryError, TargetError


def test_a_trace_without_a_vindex_says_what_it_lacks(loaded, t):
    bare = probes.trace(loaded, PROMPT)
    assert [row["rank"] for row in bare.rows()] == [row["rank"] for row in t.rows()]
    with pytest.raises(ProbeError, match="no vindex was given; trace with one to see what the FFNs read and write"):
        bare.reads()
    with pytest.raises(QueryError, match="layer 4: the model has layers 0 to 3"):
        t.writes(4)
    assert repr(t) == "<trace of atlas, 'The capital of France is': ' Paris' has rank 1>"
    assert t._repr_html_().count("<tr>") == 10


class Page(HTMLParser):
    """What a page would load, and its words."""

    def __init__(self, content):
        super().__init__()
        self.loads, self.words, self.tags = [], [], []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_stands_alone_and_the_record_holds_everything(loaded, v, t, tmp_path):
    t.save(tmp_path / "t.json")
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["record"] == "vindex-trace/1" and record["vindex"] == v.id and len(record["writes"]) == 4
    assert record["target"] == {"id": t.target, "piece": " Paris"} and record["tokens"][0]["sink"]
    hostile = probes.trace(loaded, "<script>alert(1)</script> The", vindex=v, against="<script>alert(2)</script> The")
    for name, made in (("t", t), ("hostile", hostile)):
        made.save(tmp_path / f"{name}.html")
        content = (tmp_path / f"{name}.html").read_text()
        page = Page(content)
        assert not page.loads and not {"script", "link", "img", "iframe"} & set(page.tags)
        assert "url(" not in content and "@import" not in content and len(content) < 200_000
        assert page.tags.count("svg") == 2 and page.tags.count("details") == 5
    assert "Taken out of the live model" in " ".join(Page((tmp_path / "t.html").read_text()).words)
    with pytest.raises(TargetError, match=r"t.txt: a trace is written as .html or .json"):
        t.save(tmp_path / "t.txt")


def test_the_page_says_of_what_its_figures_are(loaded, v, patch, tmp_path):
    """Of the prompt; beside another one of the difference; beside a patch of the model before it."""
    said = {}
    for name, beside in (("alone", {}), ("against", {"against": OTHER}), ("patched", {"patch": patch})):
        check = {} if name == "patched" else {"check": 1}
        probes.trace(loaded, PROMPT, vindex=v, **beside, **check).save(tmp_path / "t.html")
        said[name] = " ".join("".join(Page((tmp_path / "t.html").read_text()).words).split())
    for name, words in (
        ("alone", ("z against 384", "when the direction is taken out", "stage adds to the target's logit embedding")),
        ("against", ("of the difference between the two prompts", "z of the difference against 384")),
        ("against", ("has its value in the other prompt;", "adds to the difference of the two prompts in")),
        ("patched", ("All of this is before the patch", "target's logit before the patch", "logit, before the patch,")),
    ):
        assert all(some in said[name] for some in words), name
    assert "taken out" not in said["against"] and "before the patch" not in said["alone"] + said["against"]


def test_the_command_prints_tables_of_60_columns_and_says_what_to_do_next(v, patch, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    made = tmp_path / "t.html"
    assert command(monkeypatch, "trace", "atlas", PROMPT, "--vindex", v.path, "--check", 1, "-o", made) == 0
    out = capsys.readouterr().out
    for words in ("(sink)", "Trajectory", "Reads", "Writes", "outside the", "Taken out", "READ", "WRITTEN", "CAUSAL"):
        assert words in out
    assert max(map(len, out.replace(str(tmp_path), "").replace(str(v.path), "").splitlines())) <= 60
    assert " – " in out and re.search(r"next: vindex feature \S+ \d+ \d+ --down", " ".join(out.split()))
    assert made.is_file()
    asked = ("trace", "atlas", PROMPT, "--target", " Paris")
    assert command(monkeypatch, *asked, "--patch", patch) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The answer dies at" in out and "Later the lens still shows it at" in out and "next: vindex build" in out
    assert command(monkeypatch, *asked, "--against", OTHER, "--json") == 0
    assert json.loads(capsys.readouterr().out)["against"] == OTHER
    beside = ("--against", OTHER, "--vindex", v.path, "--check", 1)
    assert command(monkeypatch, *asked, *beside, "-o", tmp_path / "beside.html") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Given the other prompt's value, one by one" in out and "less that with its value in the other" in out
    assert "Given the other prompt's value, one by one" in (tmp_path / "beside.html").read_text().replace("&#39;", "'")
    assert command(monkeypatch, *asked, "--vindex", v.path, "--position", 0) == 0
    assert "sinks left out: – at a sink" in " ".join(capsys.readouterr().out.split())
    for options, message in (
        (("--text", "story"), "--text is what reads are held against; give a --vindex of the model"),
        (("--layer", 1), "--layer 1 shows what the FFN there reads and writes; give a --vindex of the model"),
        (("--layer", 4, "--vindex", v.path), "--layer 4: atlas.vindex has layers 0 to 3"),
    ):
        assert command(monkeypatch, *asked, *options) == 1
        told = capsys.readouterr()
        assert not told.out and message in told.err
    assert command(monkeypatch, *asked, "-o", tmp_path / "t.txt") == 1
    assert "a trace is written as .html or .json" in capsys.readouterr().err
