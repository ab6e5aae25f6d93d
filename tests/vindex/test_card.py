"""The model card tells what the artifact's own records say."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest

import vindex
from tests.vindex.damaged import LEFT_OUT, damaged
from vindex.card import render_card, write_card
from vindex.checks import verify
from vindex.checksums import load_sums
from vindex.errors import FormatError, QueryError, VindexError
from vindex.manifest import Source, SourceFile
from vindex.measured import read_gate3, read_gates, read_probe

MODEL = {"dtype": "float32"}
PROBE = {
    "record": "vindex-probe/1",
    "definition": "v1",
    "model": MODEL,
    "constants": {
        "C1": {
            "name": "FFN sparsity",
            "definition": "fraction of |h| < 0.01",
            "value": 0.9,
            "mean": 0.12345,
            "interval": [0.1, 0.15],
            "n": 8,
            "over": "texts",
            "null": 0.0116,
        },
        "C2": {
            "name": "top-8 mass",
            "definition": "d",
            "value": 0.7,
            "mean": 0.7,
            "interval": None,
            "n": 1,
            "over": "texts",
            "null": None,
        },
    },
}
VERDICT = {"result": "fail", "reason": "suppression of the fact 0.01 < 0.7"}
GATE3 = {
    "record": "vindex-gate3/1",
    "model": MODEL,
    "fact": {"name": "France/capital", "answer": " Paris"},
    "method": "geometric",
    "layer": 1,
    "before": 0.9,
    "after": 0.89,
    "suppression": 0.011,
    "reference_loss": None,
    "verdicts": {"published": VERDICT, "strict": VERDICT, "robust": VERDICT},
}


AREA = {"value": 0.41, "low": 0.41, "high": 0.41}
GATES = {
    "record": "vindex-gates-evaluation/1",
    "model": {},
    "gates": "g|1",
    "panels": {"source": "atlas, held out"},
    "choices": {"scoring": "teacher-forced"},
    "areas": {"gates": AREA | {"value": 0.81}, "random": AREA | {"low": 0.3, "high": 0.5}},
    "advantage": 0.4,
}
KINDS = {"probe": PROBE, "gate3": GATE3, "gates": GATES}


@pytest.fixture
def copy(built, tmp_path):
    return vindex.open(shutil.copytree(built, tmp_path / "copy.vindex"))


def of(v, record: dict) -> dict:
    """The record, measured on the weights that v was built from."""
    return record | {"model": record["model"] | {"weights_sha256": v.manifest.source.weights}}


def card_with(v, tmp_path, **records) -> str:
    """The card with records as they are given, under the names probe, gate3 and gates."""
    paths = {"probe": None, "gate3": None}
    for name, record in records.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(record))
    write_card(v, **paths)
    return (v.path / "README.md").read_text()


def test_sections_of_the_published_card_in_their_order(built):
    text = (built / "README.md").read_text()
    order = ["license: apache-2.0", "**Vindex short ID**", "## What This Is", "## What This Is NOT"]
    order += [
        "## Universal Constants",
        "## Gate 3 Status (DELETE Patch Test)",
        "## Files",
        "## How to Use",
        "## License",
        "## Citation",
    ]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)
    assert vindex.open(built).id in text and "Not measured yet" in text and "Not evaluated yet" in text


def test_the_card_ends_with_how_to_cite_it(copy):
    year = copy.manifest.finished_at[:4]
    entry = f"@misc{{vindex-{copy.id},\n  title = {{Vindex {copy.id} of {copy.index.model}}},\n  year = {{{year}}}"
    assert (copy.path / "README.md").read_text().endswith(f"```bibtex\n{entry}\n}}\n```\n")
    write_card(copy, repo="someone/tiny-vindex")
    address = "  url = {https://huggingface.co/someone/tiny-vindex}"
    assert (copy.path / "README.md").read_text().endswith(f"{entry},\n{address}\n}}\n```\n")
    odd = render_card(replace(copy.own_index, model="a_b {c}"), copy.manifest, load_sums(copy.path), copy.vocabulary)
    assert r"of a\_b \{c\}}," in odd


def test_every_row_of_a_table_has_the_columns_of_its_head(built):
    """What GitHub and the Hub leave out of a row is what an unescaped | cuts off."""
    rows = [line for line in (built / "README.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 10 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert any(r"largest \|z\| that 4096 tokens" in row for row in rows)


def test_records_fill_their_sections(copy, tmp_path):
    text = card_with(copy, tmp_path, **{name: of(copy, record) for name, record in KINDS.items()})
    assert r"| FFN sparsity | C1 | 0.123 [0.1, 0.15] | 8 texts | 0.0116 | fraction of \|h\| < 0.01 |" in text
    assert "| top-8 mass | C2 | 0.7 | 1 text | – | d |" in text and "0.9 |" not in text.partition("## Gate 3")[0]
    assert "| France/capital: ` Paris` | geometric | 1 | 0.9 | 0.89 | 0.011 | not measured |" in text
    assert "- **published**: fail — suppression of the fact 0.01 < 0.7" in text
    assert r"`g\|1` on atlas, held out, teacher-forced." in text and "Gates minus random: 0.4." in text
    assert "| gates | 0.81 | – |\n| random | 0.41 | 0.3 … 0.5 |" in text
    assert all(check.holds for check in verify(vindex.open(copy.path)))


def test_a_fact_the_model_does_not_know(copy, tmp_path):
    unknown = dict.fromkeys(("method", "layer", "after", "suppression", "reference_loss"))
    text = card_with(copy, tmp_path, gate3=of(copy, GATE3 | unknown))
    assert "Fact `France/capital`: the model does not know it." in text


def test_a_card_without_a_gates_record_has_the_published_sections_only(built):
    assert "Lambda Gates" not in (built / "README.md").read_text()


def test_a_model_without_a_licence_says_so(tmp_path):
    from tests.checkpoints import write_checkpoint
    from tests.conftest import build_quietly

    source = write_checkpoint(tmp_path / "m")
    (source / "README.md").unlink()
    build_quietly(source, tmp_path / "out.vindex", embeddings=False)
    text = (tmp_path / "out.vindex" / "README.md").read_text()
    assert "license: other" in text and "The source checkpoint names no licence" in text
    assert "Built with `--no-embeddings`" in text


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "weights, message",
    [
        (None, "does not say by their SHA-256 which weights it is of; make it again: vindex "),
        ({}, "does not say by their SHA-256 which weights it is of; make it again: vindex "),
        ("text", "does not say by their SHA-256 which weights it is of; make it again: vindex "),
        ({"other.safetensors": "ab" * 32}, "with SHA-256 none .no such file., and this vindex was built from"),
    ],
)
def test_records_of_other_weights(copy, tmp_path, name, weights, message):
    before = (copy.path / "README.md").read_bytes()
    with pytest.raises(QueryError, match=message):
        card_with(copy, tmp_path, **{name: KINDS[name] | {"model": {"dtype": "float32", "weights_sha256": weights}}})
    assert (copy.path / "README.md").read_bytes() == before


@pytest.mark.parametrize("name", KINDS)
def test_one_shard_of_a_fine_tune_is_enough(copy, tmp_path, name):
    record = of(copy, KINDS[name])
    shard = sorted(copy.manifest.source.weights)[-1]
    digests = copy.manifest.source.weights | {shard: "0123456789ab" + "0" * 52}
    with pytest.raises(QueryError, match=f"of {shard} with SHA-256 0123456789ab…, and this vindex was built from"):
        card_with(copy, tmp_path, **{name: record | {"model": record["model"] | {"weights_sha256": digests}}})


@pytest.mark.parametrize("name", KINDS)
def test_a_vindex_of_a_gguf_has_no_weights_that_a_record_could_be_of(tmp_path, name):
    source = Source("m", None, None, (SourceFile("m.gguf", 1, "ab" * 32, "vindex"),))
    (tmp_path / "r.json").write_text(json.dumps(KINDS[name] | {"model": {"weights_sha256": {"a.safetensors": "x"}}}))
    read = {"probe": read_probe, "gate3": read_gate3, "gates": read_gates}[name]
    with pytest.raises(QueryError, match="this vindex was built from none .no such file.; measure the checkpoint"):
        read(tmp_path / "r.json", source)


@pytest.mark.parametrize("name", KINDS)
def test_a_record_of_another_kind(copy, tmp_path, name):
    other = of(copy, KINDS["gate3" if name == "probe" else "probe"])
    with pytest.raises(QueryError, match=f"expected a record of kind {KINDS[name]['record']}, got 'vindex-"):
        card_with(copy, tmp_path, **{name: other})


WRONG = ([], {}, 3, "x", None, True)


def places(record: dict, at: tuple = ()):
    """The path of every value in a record."""
    for key, value in record.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


@pytest.mark.parametrize("name", KINDS)
def test_damaged_records_give_one_line(copy, tmp_path, name):
    """Every value of a record left out, or of another type: a card as before, or one line that names the place."""
    told = 0
    for path in places(KINDS[name]):
        for wrong in (LEFT_OUT, *WRONG):
            record = damaged(of(copy, KINDS[name]), path, wrong)
            try:
                card_with(copy, tmp_path, **{name: record})
            except VindexError as error:
                told += 1
                assert "\n" not in str(error) and str(error).startswith(str(tmp_path / f"{name}.json"))
    assert told > 3 * len(list(places(KINDS[name])))


def test_a_damaged_record_is_told_with_the_place(copy, tmp_path):
    record = of(copy, json.loads(json.dumps(PROBE)))
    record["constants"]["C1"] |= {"mean": "high", "interval": [1]}
    del record["constants"]["C2"]["n"]
    message = "constants.C1.interval: expected two numbers or null, got list; "
    message += "constants.C1.mean: expected a number or null, got 'high'; "
    with pytest.raises(FormatError, match=message + "constants.C2.n: missing, expected an integer from 0"):
        card_with(copy, tmp_path, probe=record)


@pytest.mark.parametrize(
    "text, message", [("{", "not valid JSON .*; write it with -o"), ("[]", "expected a JSON object, got list")]
)
def test_files_that_are_no_records(copy, tmp_path, text, message):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        write_card(copy, tmp_path / "probe.json", None)


def test_what_is_not_given_stays_as_the_card_has_it(copy, tmp_path):
    measured = card_with(copy, tmp_path, **{name: of(copy, record) for name, record in KINDS.items()})
    write_card(copy, licence="mit", base_model="someone/model", repo="someone/model-vindex")
    text = (copy.path / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n") and "\nbase_model: someone/model\n---" in text
    assert "vindex.open('hf://someone/model-vindex').top_features(" in text
    assert "`mit`, as its publisher says." in text
    for title in ("## Universal Constants", "## Gate 3 Status", "## Lambda Gates"):
        assert text.partition(title)[2].partition("\n## ")[0] == measured.partition(title)[2].partition("\n## ")[0]
    write_card(copy)
    assert (copy.path / "README.md").read_text() == text
    assert verify(vindex.open(copy.path)).holds


@pytest.mark.parametrize(
    "given, message",
    [
        ({"licence": "mit\nx: y"}, r"licence 'mit\\nx: y': expected its name on the Hub, such as apache-2.0"),
        ({"base_model": "model"}, "base model 'model': expected a Hub id, OWNER/NAME"),
        ({"repo": "a/b/c"}, "repo 'a/b/c': expected a Hub id, OWNER/NAME"),
    ],
)
def test_what_would_be_no_line_of_a_card(copy, given, message):
    before = (copy.path / "README.md").read_bytes()
    with pytest.raises(QueryError, match=message):
        write_card(copy, **given)
    assert (copy.path / "README.md").read_bytes() == before
