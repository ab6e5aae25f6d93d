"""The model card tells what the artifact's own records say."""

from __future__ import annotations

import json
import shutil

import pytest

import vindex
from vindex.card import rewrite_card
from vindex.errors import FormatError, QueryError
from vindex.verify import verify

MODEL = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "dtype": "float32"}
PROBE = {
    "record": "vindex-probe/1",
    "definition": "v1",
    "model": MODEL,
    "texts": [{}],
    "constants": {"C1": {"name": "FFN sparsity", "value": 0.12345, "definition": "fraction of |h| < 0.01"}},
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
    "verdicts": {"seed": VERDICT, "strict": VERDICT},
}


@pytest.fixture
def copy(built, tmp_path):
    return vindex.open(shutil.copytree(built, tmp_path / "copy.vindex"))


def card_with(v, tmp_path, probe=None, gate3=None) -> str:
    paths = []
    for name, record in (("probe.json", probe), ("gate3.json", gate3)):
        (tmp_path / name).write_text(json.dumps(record))
        paths.append(tmp_path / name if record else None)
    rewrite_card(v, *paths)
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
    ]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)
    assert vindex.open(built).id in text and "Not measured yet" in text and "Not evaluated yet" in text


def test_records_fill_their_sections(copy, tmp_path):
    text = card_with(copy, tmp_path, PROBE, GATE3)
    assert r"| FFN sparsity | C1 | 0.123 | fraction of \|h\| < 0.01 |" in text
    assert "| France/capital: ` Paris` | geometric | 1 | 0.9 | 0.89 | 0.011 | not measured |" in text
    assert "- **seed**: fail — suppression of the fact 0.01 < 0.7" in text
    assert all(check.holds for check in verify(vindex.open(copy.path)))


def test_a_fact_the_model_does_not_know(copy, tmp_path):
    text = card_with(copy, tmp_path, None, GATE3 | {"method": None})
    assert "Fact `France/capital`: the model does not know it." in text


def test_a_model_without_a_licence_says_so(tmp_path):
    from tests.checkpoints import write_checkpoint
    from tests.conftest import build_quietly

    source = write_checkpoint(tmp_path / "m")
    (source / "README.md").unlink()
    build_quietly(source, tmp_path / "out.vindex", embeddings=False)
    text = (tmp_path / "out.vindex" / "README.md").read_text()
    assert "license: other" in text and "The source checkpoint names no licence" in text
    assert "Built with `--no-embeddings`" in text


@pytest.mark.parametrize(
    "record, message",
    [
        (GATE3, "expected a record of kind vindex-probe/1, got 'vindex-gate3/1'"),
        (PROBE | {"model": MODEL | {"num_layers": 3}}, "measured on a model with num_layers 3, and this vindex has 2"),
    ],
)
def test_records_that_do_not_belong(copy, tmp_path, record, message):
    with pytest.raises(QueryError, match=message):
        card_with(copy, tmp_path, record)


@pytest.mark.parametrize(
    "text, message", [("{", "not valid JSON .*; write it with --json"), ("[]", "expected a JSON object, got list")]
)
def test_files_that_are_no_records(copy, tmp_path, text, message):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        rewrite_card(copy, tmp_path / "probe.json", None)
