"""The page says what the vindex and the records say, asks the network for nothing, and takes no text for markup."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from base64 import b64decode, b64encode
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

import vindex
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.vindex.damaged import LEFT_OUT, damaged
from tests.vindex.report.records import records, written
from tests.vindex.test_responses import add_made_up
from vindex.__main__ import app
from vindex.errors import FormatError, QueryError, TargetError, VindexError
from vindex.floor import floor_of
from vindex.report import directions as data_of
from vindex.report import panels, traced
from vindex.report.moved import beside
from vindex.report.page import trace_page

READERS = {"probe": panels.constants, "gate3": panels.deletion, "gates": panels.gates, "trace": traced.trace}


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory) -> str:
    """A page with every panel from a record."""
    v, directory = vindex.open(built), tmp_path_factory.mktemp("report")
    page = vindex.write_report(v, directory / "r.html", **written(v, directory))
    return page.read_text()


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.links, self.text, self.ids = [], [], "", set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.ids |= {value for name, value in attributes if name == "id"}

    def handle_data(self, data):
        self.text += data


def data_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def numbers(text: str, dtype: str = "<f4") -> np.ndarray:
    return np.frombuffer(b64decode(text), dtype)


def test_the_page_is_one_file_that_asks_for_nothing(whole):
    links = Seen(whole).links
    assert links and all(re.match(r"#|data:,$", link) for link in links)
    assert not re.search(
        r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", whole.replace("Content-Security-Policy", "")
    )
    script = re.search(r"<script>(.*?)</script>", whole, re.DOTALL)[1]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in whole


@pytest.mark.parametrize("which", ["built", "built_mixture"])
def test_cards_hold_what_the_vindex_says_of_each_direction(which, request):
    v = vindex.open(request.getfixturevalue(which))
    data = data_of.directions(v)
    rows, per = v.index.num_rows, 2 * data["pole"]
    sides = {
        side: (numbers(of["tokens"], "<u4").reshape(rows, per), numbers(of["scores"]).reshape(rows, per))
        for side, of in data["sides"].items()
    }
    sigma, coherence = numbers(data["sigma"]).reshape(2, rows), numbers(data["coherence"]).reshape(rows, 4)
    near = numbers(data["nearest"]["rows"], "<u4").reshape(rows, -1)
    for layer, (first, groups, features, experts) in enumerate(data["layers"]):
        for group, rank in ((group, rank) for group in range(groups) for rank in range(features)):
            row, expert = first + group * features + rank, group if experts else None
            found = v.feature(layer, rank, expert=expert)
            assert sigma[:, row] == pytest.approx([found.gate_sigma, found.down_sigma])
            for side, poles in (
                ("reads", (found.reads, found.reads_against)),
                ("writes", (found.writes, found.writes_against)),
            ):
                shown = [
                    (data["strings"][token], score)
                    for token, score in zip(*(of[row] for of in sides[side]), strict=True)
                ]
                assert shown == [(token.piece, np.float32(token.score)) for pole in poles for token in pole]
            assert coherence[row] == pytest.approx(
                [pole.z for pole in v.coherence(layer, rank, expert=expert)], abs=1e-4
            )
            hits = v.nearest_features(layer, rank, near.shape[1], expert=expert)
            cosines = numbers(data["nearest"]["cosines"]).reshape(rows, -1)[row]
            assert np.abs(cosines) == pytest.approx([abs(hit.cosine) for hit in hits], abs=2e-3)
            for side, together in v.clusters(layer, rank, expert=expert)._asdict().items():
                found_ = [c for c in data["clusters"][side] if c[0] <= row <= c[1]]
                assert found_ == ([[row - rank + together[0], row - rank + together[-1]]] if len(together) > 1 else [])


def test_responses_are_in_the_cards_where_the_vindex_has_them(built, tmp_path):
    add_made_up(vindex.open(shutil.copytree(built, tmp_path / "v.vindex")))
    v = vindex.open(tmp_path / "v.vindex")
    data = data_of.directions(v)
    assert "vindex respond MODEL tiny.vindex" in data_of.directions(vindex.open(built))["missing"]["response"]
    tokens = numbers(data["sides"]["response"]["tokens"], "<u4").reshape(v.index.num_rows, -1)
    stats = v.response_stats
    assert numbers(data["response"]["r2"]) == pytest.approx(stats.r2.reshape(-1))
    assert numbers(data["response"]["null"]) == pytest.approx(np.maximum(stats.null, stats.random).reshape(-1))
    assert "vindex respond MODEL tiny.vindex" in data_of.directions(vindex.open(built))["missing"]["snippets"]
    found, kept = data["snippets"], 3
    place, z = numbers(found["place"], "<i4").reshape(-1, 2 * kept), numbers(found["z"]).reshape(-1, 2 * kept)
    said = [data["strings"][token] for token in numbers(found["texts"], "<u4")]
    assert (found["names"], found["tokens"], len(said)) == (["story"], 256, 256)
    for layer, rank in ((0, 1), (1, 3)):
        row = v.row(layer, rank, None)
        there = [(said[at], score) for at, score in zip(place[row], z[row], strict=True) if at >= 0]
        assert there == [(one.token, one.z) for one in v.snippets(layer, rank)]
        found = v.response(layer, rank)
        shown = [data["strings"][token] for token in tokens[v.row(layer, rank, None)]]
        assert shown == [token.piece for token in (*found.writes, *found.writes_against)]


def test_a_page_of_very_many_directions_shortens_poles_and_leaves_neighbours_out(built, monkeypatch):
    monkeypatch.setattr(data_of, "MOST_TOKENS", 1)
    monkeypatch.setattr(data_of, "MOST_COMPARED", 5)
    v = vindex.open(built)
    data = data_of.directions(v)
    assert data["pole"] == 1 and data["nearest"] is None
    assert data["missing"]["nearest"].startswith(
        f"{v.index.num_rows} directions are too many to compare each with each"
    )
    assert (
        data["strings"][numbers(data["sides"]["reads"]["tokens"], "<u4")[1]] == v.feature(0, 0).reads_against[0].piece
    )


def test_every_panel_says_what_its_record_says(whole):
    text = " ".join(Seen(whole).text.split())
    for words in (
        "licence", "holds: all", "FFN sparsity", "0.1 … 0.15", "France/capital", "attack: few shot", "not measured",
        "+0.40 of area", "0.60 … 0.80", "“The capital of France is”", "outside the directions", "of the same ‖W‖",
        "patched with paris.safetensors", "1,234", "The answer dies at 0 FFN.", "RESPONSE", "−0.216", "+1.530",
        "beyond ±4.9", "384 tokens of generic text", "of a random vector 25 %", "to 4e−07 of a logit", "+0.008",
    ):  # fmt: skip
        assert words.lower() in text.lower(), words


def test_a_panel_without_a_record_says_what_gives_it_one(built, tmp_path):
    seen = Seen(vindex.write_report(vindex.open(built), tmp_path / "r.html").read_text())
    for command in (
        "probe MODEL",
        "gate3 MODEL",
        "gates eval MODEL",
        "trace MODEL",
        "report tiny.vindex --against OTHER",
    ):
        assert f"vindex {command}" in seen.text
    assert {"explore", "layers", "constants", "gate3", "gates", "trace", "beside"} <= seen.ids


def test_text_is_never_markup_and_a_damaged_vindex_says_so(built, tmp_path):
    bad = "</script><img src=x onerror=alert(1)>"
    copy = shutil.copytree(built, tmp_path / "v.vindex")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    held = vindex.open(built).feature(0, 0).reads[0].token_id
    pieces = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {bad if token_id == held else piece: token_id for piece, token_id in pieces.items()}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    v = vindex.open(copy)
    trace = records(v)["trace"] | {"prompt": bad, "target": {"id": 1, "piece": bad}}
    page = vindex.write_report(v, tmp_path / "r.html", trace=written(v, tmp_path, trace=trace)["trace"]).read_text()
    assert "img" not in Seen(page).tags and bad in Seen(page).text and bad in data_in(page)["strings"]
    assert "failed 1 of" in page


def test_no_text_of_a_record_turns_the_page_around(built, tmp_path):
    v = vindex.open(built)
    given = records(v)
    trace = given["trace"] | {"prompt": "of \u202egnp.\nFrance\u200b is"}
    gate3 = given["gate3"] | {"fact": {"name": "Fra\u202ence/capital", "answer": " Paris"}}
    report = vindex.write_report(v, tmp_path / "r.html", **written(v, tmp_path, trace=trace, gate3=gate3)).read_text()
    for page in (report, trace_page(trace)):
        assert not set("\u202e\u200b") & set(page) and r"of \u202egnp.\nFrance\u200b is".replace(r"\n", "\n") in page
    assert r"Fra\u202ence/capital" in report


def test_the_embedding_is_neither_attention_nor_ffn(built):
    record = records(vindex.open(built))["trace"]
    adds = traced.traced(record, None).adds
    assert [bar[4] for bar in adds.bars[:3]] == ["c2", "c1", "c0"]
    assert adds.legend == [("c2", "embedding"), ("c1", "attention"), ("c0", "FFN")]
    start, *rows = record["trajectory"]
    for layers, marks in ((30, ["start", "0", "2"]), (80, ["start", "6", "12"])):
        deep = record | {"trajectory": [start, *(rows[at % 2] | {"layer": at // 2} for at in range(2 * layers))]}
        ticks = traced.traced(deep, None).adds.x_ticks
        assert [words for _, words in ticks[:3]] == marks and ticks[1][0] - ticks[0][0] > 18


def test_a_long_prompt_is_cut_where_it_is_a_heading(built):
    trace = records(vindex.open(built))["trace"] | {"prompt": 200 * "word "}
    page = trace_page(trace)
    cut = (24 * "word ")[:119] + "…"
    assert f"<title>Trace: {cut}</title>" in page and f"<h1>{cut}</h1>" in page
    assert "<h1>The capital of France is</h1>" in trace_page(trace | {"prompt": "The capital of France is"})


def test_without_embeddings_the_cards_lack_coherence_and_say_why(checkpoint, tmp_path):
    build_quietly(checkpoint, tmp_path / "v.vindex", embeddings=False)
    data = data_of.directions(vindex.open(tmp_path / "v.vindex"))
    assert data["coherence"] is None and "--no-embeddings" in data["missing"]["coherence"]


@pytest.mark.parametrize("name", READERS)
def test_records_of_another_kind_or_other_weights(built, tmp_path, name):
    v = vindex.open(built)
    ours = records(v)
    other = ours["gates" if name == "probe" else "probe"]
    foreign = ours[name] | {"model": {"weights_sha256": {"model.safetensors": "ab" * 32}}}
    for record, message in ((other, "expected a record of kind vindex-"), (foreign, "this vindex was built from")):
        path = written(v, tmp_path, **{name: record})[name]
        with pytest.raises(QueryError, match=message):
            vindex.write_report(v, tmp_path / "r.html", **{name: path})
    assert not (tmp_path / "r.html").exists()


def places(value, at=()):
    """The path of every value in a record."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


@pytest.mark.parametrize("name", READERS)
def test_damaged_records_are_one_line(built, tmp_path, name):
    """Every value of a record left out or of another type: a panel, or one line that names the file."""
    v, told = vindex.open(built), 0
    for path in places(records(v)[name]):
        for wrong in (LEFT_OUT, "x", []):
            record = damaged(records(v)[name], path, wrong)
            file = tmp_path / "record.json"
            file.write_text(json.dumps(record))
            try:
                READERS[name](file, v)
            except VindexError as error:
                told += 1
                assert "\n" not in str(error) and str(error).startswith(str(file))
    assert told > 30


def test_a_damaged_record_is_told_in_words(built, tmp_path):
    v = vindex.open(built)
    trace = records(v)["trace"]
    del trace["trajectory"]
    path = written(v, tmp_path, trace=trace)["trace"]
    with pytest.raises(
        FormatError, match=r"trace.json: is not a whole vindex-trace record \(KeyError: 'trajectory'\); write it again"
    ):
        traced.trace(path, v)


def test_a_trace_of_an_earlier_version_shows_what_it_has(built, tmp_path):
    v = vindex.open(built)
    trace = {name: value for name, value in records(v)["trace"].items() if name not in ("checks", "sums", "fate")}
    trace["reads"] = [[{key: row[key] for key in ("feature", "z", "tokens")} for row in of] for of in trace["reads"]]
    page = vindex.write_report(v, tmp_path / "r.html", trace=written(v, tmp_path, trace=trace)["trace"]).read_text()
    text = Seen(page).text
    assert "+4.0" in text and "RESPONSE" not in text and "Taken out" not in text and "to – of a logit" in text


def test_pages_that_cannot_be_written(built, tmp_path):
    v, thesis = vindex.open(built), tmp_path / "thesis.html"
    thesis.write_text("my thesis")
    for place, message in (
        (tmp_path / "r.pdf", "r.pdf: reports are written as .html"),
        (tmp_path / "no" / "r.html", "the directory .* does not exist"),
        (thesis, "thesis.html exists and is no report; choose another place, or replace it with --force"),
    ):
        with pytest.raises(TargetError, match=message):
            vindex.write_report(v, place)
    assert thesis.read_text() == "my thesis"
    vindex.write_report(v, thesis, force=True)
    vindex.write_report(v, thesis)  # a report goes over a report
    assert v.id in thesis.read_text()


def test_what_moved_is_the_angle_to_the_other_subspace(built, tmp_path):
    v = vindex.open(built)
    assert beside(v, v).moved == ()
    same = vindex.write_report(v, tmp_path / "r.html", against=v).read_text()
    assert "No direction left the other's subspace" in Seen(same).text
    other = vindex.open(
        build_quietly(write_checkpoint(tmp_path / "m", seed=1), tmp_path / "other.vindex") and tmp_path / "other.vindex"
    )
    found = beside(v, other)
    assert len(found.moved) == 20 and found.moved[0].angle >= found.moved[-1].angle > found.moved[-1].noise
    top = found.moved[0]
    side = {"reads": "gate", "writes": "down"}[top.side]
    ours, theirs = (getattr(of.layer(top.layer), side)[0].astype(np.float64) for of in (v, other))
    best, *_ = np.linalg.lstsq(theirs.T, ours[top.feature], rcond=None)
    assert np.sin(top.angle) == pytest.approx(np.linalg.norm(ours[top.feature] - best @ theirs), abs=1e-3)
    page = vindex.write_report(v, tmp_path / "r.html", against=other).read_text()
    assert f"F{top.other}" in page and "The 20 directions that moved most" in page


def test_vindexes_that_cannot_be_compared(built, built_mixture, tmp_path):
    with pytest.raises(QueryError, match="cannot compare: "):
        vindex.write_report(vindex.open(built), tmp_path / "r.html", against=vindex.open(built_mixture))


def test_the_floor_is_the_spectrum_of_a_random_matrix():
    matrix = np.random.default_rng(0).standard_normal((600, 200))
    matrix *= np.sqrt(200 / (matrix**2).sum())
    assert floor_of((600, 200), 50) == pytest.approx(np.linalg.svd(matrix, compute_uv=False)[:50], rel=0.01)


def test_the_command_writes_the_page_and_says_what_is_next(built, tmp_path):
    page, trace = tmp_path / "r.html", written(vindex.open(built), tmp_path)["trace"]

    def report(*options) -> str:
        return CliRunner().invoke(app, ["report", str(built), "-o", str(page), *map(str, options)]).stdout

    said = " ".join(report("--trace", trace).split())
    assert "wrote " in said and "kB" in said and "--probe, --gate3, --gates would fill more of it" in said
    assert json.loads(report("--json"))["bytes"] == page.stat().st_size
