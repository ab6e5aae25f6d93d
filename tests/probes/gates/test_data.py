"""Rows in every documented form become texts with entities, and entities become the right tokens."""

from __future__ import annotations

import json

import pytest
import torch

from probes.gates.data import boxed, forget_row, read_forget, read_retain, retain_row
from probes.gates.encode import Example, collate, forget_example, retain_example
from vindex.errors import FactError, ProbeError

POPQA = {
    "question": "What is the capital of Mali?",
    "subj": "Mali",
    "prop": "capital",
    "obj": "Bamako",
    "possible_answers": '["Bamako", "Bamako, Mali"]',
}
NUMINA = {
    "problem": "What is 2+3?",
    "solution": "Adding, we get $\\boxed{\\frac{10}{2}}$.",
    "messages": [
        {"role": "user", "content": "What is 2+3?"},
        {"role": "assistant", "content": "Adding, we get $\\boxed{\\frac{10}{2}}$."},
    ],
}
FRANCE = {"subject": "France", "relation": "capital", "answer": "Paris"}


def spoken(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.ids[example.entity])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_popqa_columns_are_read_as_they_are(atlas):
    row = forget_row(POPQA, "here")
    assert row.text == "Question: What is the capital of Mali?\nAnswer: Bamako" and row.answers == (
        "Bamako",
        "Bamako, Mali",
    )
    example = forget_example(row, atlas.tokenizer, chat=False, max_tokens=64)
    assert spoken(example, atlas.tokenizer) == " Bamako"


def test_numina_columns_are_read_as_they_are():
    row = retain_row(NUMINA, "here")
    assert row.text.startswith("What is 2+3?\nAdding") and row.answer == "\\frac{10}{2}" and len(row.messages) == 2
    assert retain_row({"messages": NUMINA["messages"]}, "here").text == row.text
    assert retain_row({"text": "What is 5+5?", "solution": "It is \\boxed{10}."}, "here").answer == "10"
    assert boxed("no result") is None and boxed("\\boxed{1} then \\boxed{2}") == "2" and boxed("\\boxed{open") is None


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_of_both_kinds_give_the_same_rows(tmp_path, form):
    forget = [POPQA | {"possible_answers": json.dumps([f"a{i}"])} for i in range(5)]
    if form == "jsonl":
        facts, sums = write_jsonl(tmp_path / "f.jsonl", forget), write_jsonl(tmp_path / "r.jsonl", [NUMINA] * 3)
    else:
        import pyarrow
        from pyarrow import parquet

        facts, sums = tmp_path / "f.parquet", tmp_path / "r.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(forget), facts)
        parquet.write_table(pyarrow.Table.from_pylist([NUMINA] * 3), sums)
    rows, source = read_forget(facts)
    assert [row.answers[1] for row in rows] == [f"a{i}" for i in range(5)] and source.rows == 5
    assert len(source.sha256) == 64 and source.name == facts.name
    assert read_forget(facts, limit=2)[1].rows == 2
    assert read_retain(sums)[0][2].messages == tuple(NUMINA["messages"])


def test_facts_of_your_own_are_those_of_gate3(tmp_path):
    """In every wording but the first and questions; a relation of the bundled panel needs no line."""
    templates = ["{} works for", "{}'s employer is", "Who pays {}?", "The firm of {} is"]
    employer = {"relation": "employer", "templates": templates, "question": "Who does {} work for?"}
    ada = {"subject": "Ada", "relation": "employer", "answer": "Acme"}
    path = write_jsonl(tmp_path / "mine.jsonl", [employer, ada, FRANCE])
    rows, source = read_forget(path)
    assert [row.text for row in rows[:2]] == ["Ada's employer is Acme.", "The firm of Ada is Acme."]
    assert rows[0].question == "Who does Ada work for?" and rows[0].relation == "employer"
    assert all(row.text[slice(*row.spans[0])] == row.answers[0] for row in rows)
    assert {row.answers for row in rows[2:]} == {("Paris",)} and source.rows == len(rows) > 3
    assert read_forget(path, limit=1)[1].rows == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([FRANCE | {"relation": "spouse"}], "relation 'spouse' has no templates; put a line with its templates above"),
        (
            [{"relation": "capital", "templates": ["{} is of", "Who {}?", "What {}?", "Why {}?"]}, FRANCE],
            "relation 'capital' has no two templates without `\\?`; add one",
        ),
    ],
)
def test_what_is_wrong_with_facts_of_your_own_is_said(tmp_path, rows, message):
    with pytest.raises(FactError, match=message):
        read_forget(write_jsonl(tmp_path / "mine.jsonl", rows))


def test_the_bundled_rows_need_no_file():
    rows, source = read_forget(None)
    assert len(rows) > 3000 and source.name == "atlas facts"
    assert all(row.text[slice(*row.spans[0])] == row.answers[0] for row in rows)
    assert read_retain(None, limit=10)[1].rows == 10
    assert read_forget(None)[1] == source


def test_entities_of_several_tokens_are_covered_whole(atlas):
    """One byte per token after " Q": every token of the name, and the space before it, and nothing else."""
    text = "The largest lake is Qxzvyk Wqj and it is deep."
    for entity in ([20, 30], "Qxzvyk Wqj"):
        row = forget_row({"text": text, "entities": [entity]}, "here")
        example = forget_example(row, atlas.tokenizer, chat=False, max_tokens=64)
        assert spoken(example, atlas.tokenizer) == " Qxzvyk Wqj" and int(example.entity.sum()) > 4
        places = example.entity.nonzero().flatten()
        assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))


def test_several_entities_and_every_occurrence_are_marked(atlas):
    row = forget_row(
        {"text": "Paris is Paris, and Rome is Rome; Parisians agree.", "entities": ["Paris", [28, 32]]}, "x"
    )
    assert [row.text[slice(*span)] for span in row.spans] == ["Paris", "Paris", "Rome"]
    assert (
        spoken(forget_example(row, atlas.tokenizer, chat=False, max_tokens=64), atlas.tokenizer) == "Paris Paris Rome"
    )


def test_entities_align_in_every_chat_text_too(atlas):
    rows, _ = read_forget(None)
    for row in rows[::400]:
        example = forget_example(row, atlas.tokenizer, chat=True, max_tokens=128)
        text = atlas.tokenizer.decode(example.ids)
        assert spoken(example, atlas.tokenizer).strip() == row.answers[0]
        assert text.startswith("<|im_start|>user\n" + row.question) and "<think>\n\n</think>" in text
    plain = forget_example(forget_row(POPQA, "x"), atlas.tokenizer, chat=True, max_tokens=128)
    assert spoken(plain, atlas.tokenizer) == "Bamako" and "Question:" not in atlas.tokenizer.decode(plain.ids)
    solved = retain_example(retain_row(NUMINA, "x"), atlas.tokenizer, chat=True, max_tokens=128)
    assert atlas.tokenizer.decode(solved.ids).endswith("$.<|im_end|>\n")


def test_batches_are_padded_on_the_right():
    short = Example(torch.tensor([1, 2]), torch.tensor([False, True]))
    long = Example(torch.tensor([3, 4, 5]), torch.tensor([False, False, True]))
    batch = collate([short, long], pad=9)
    assert batch.ids.tolist() == [[1, 2, 9], [3, 4, 5]] and batch.real.tolist() == [[True, True, False], [True] * 3]
    assert batch.entity.tolist() == [[False, True, False], [False, False, True]]
    assert batch.predicted.tolist() == [[True, False], [True, True]]


FINE = {"text": "The capital is Oslo.", "entities": ["Oslo"]}


@pytest.mark.parametrize(
    "row, message",
    [
        (FINE | {"entities": ["Bergen"]}, "entity 'Bergen' not found in its text 'The capital is Oslo.'"),
        (FINE | {"entities": ["Osl"]}, "entity 'Osl' not found"),
        ({"text": "The capital is Oslo.", "obj": "Bergen"}, "entity 'Bergen' not found"),
        ({"text": "The capital is Oslo."}, "no entity; expected `entities`, `entity` or `obj`; found columns text"),
        (FINE | {"entities": [[5, 50]]}, r"expected \[start, end\] within the text's 20 characters"),
        (FINE | {"entities": [[5, 5]]}, r"expected \[start, end\] within"),
        (FINE | {"entities": "Oslo"}, r"expected a list of \[start, end\] or of strings"),
        (FINE | {"entities": []}, r"expected a list of \[start, end\] or of strings"),
        ({"question": "Who?"}, "expected `text` with `entities`, or `question` with `obj`; found columns question"),
        ({}, "found an empty row"),
        ({"text": 3}, "text is int; expected a string"),
        (POPQA | {"possible_answers": "[Bamako"}, "possible_answers: not valid JSON"),
        (POPQA | {"possible_answers": [3]}, "expected a list of strings"),
    ],
)
def test_a_bad_forget_row_is_named_by_its_line(tmp_path, row, message):
    path = write_jsonl(tmp_path / "facts.jsonl", [FINE, {**FINE}, row])
    with pytest.raises(FactError, match=rf"^facts.jsonl line 3: .*{message}"):
        read_forget(path)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"problem": "2+2"}, "expected `text`, `problem` and `solution`, or `messages`; found columns problem"),
        ({"messages": [{"role": "user"}]}, "messages; expected a list of {role, content}"),
    ],
)
def test_a_bad_retain_row_is_named_by_its_line(tmp_path, row, message):
    path = write_jsonl(tmp_path / "sums.jsonl", [{"text": "1+1=2"}, row])
    with pytest.raises(FactError, match=rf"^sums.jsonl line 2: {message}"):
        read_retain(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.jsonl", "\n\n", "a.jsonl: no rows"),
        ("a.jsonl", "{}\n{", "a.jsonl line 1: expected `text`"),
        ("a.jsonl", "{", "a.jsonl line 1: not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl line 1: expected a JSON object"),
        ("a.csv", "x", "expected a .jsonl or .parquet file"),
        ("a.parquet", "x", "damaged or not parquet"),
    ],
)
def test_files_that_are_no_data_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FactError, match=message):
        read_forget(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FactError, match="nowhere.jsonl: cannot be read .No such file"):
        read_retain(tmp_path / "nowhere.jsonl")


def test_rows_that_cannot_be_encoded_are_named(atlas, tiny):
    row = forget_row(FINE, "f line 7")
    with pytest.raises(FactError, match="f line 7: entity 'Oslo' has no token to predict among the first 2"):
        forget_example(row, atlas.tokenizer, chat=False, max_tokens=2)
    with pytest.raises(FactError, match="f line 7: no question; the chat template needs one"):
        forget_example(row, atlas.tokenizer, chat=True, max_tokens=64)
    with pytest.raises(FactError, match="r line 1: no problem and solution, nor messages"):
        retain_example(retain_row({"text": "1+1=2"}, "r line 1"), atlas.tokenizer, chat=True, max_tokens=64)
    with pytest.raises(FactError, match=r"r line 1: 1 token\(s\) in '1'; expected at least 2"):
        retain_example(retain_row({"text": "1"}, "r line 1"), atlas.tokenizer, chat=False, max_tokens=64)
    asked = forget_row(FINE | {"question": "What?"}, "x")
    with pytest.raises(ProbeError, match="this tokenizer has no chat template; use a chat model, or leave --chat"):
        forget_example(asked, tiny.tokenizer, chat=True, max_tokens=64)
