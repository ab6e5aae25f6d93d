"""A panel of what a model knows: what is trained on is not asked, what is asked is known, and files say all of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from probes.gates import reasoning
from probes.gates.controls import masks
from probes.gates.data import read_forget, read_retain
from probes.gates.encode import collate, forget_example
from probes.gates.evaluate import evaluate_gates
from probes.gates.forced import answered, batches, same_text
from probes.gates.gates import Gates
from probes.gates.known import make_panel
from probes.gates.learn import train_gates
from probes.gates.panels import Prompt, read_asked
from probes.gates.score import score
from vindex.errors import FactError, ProbeError, TargetError


@pytest.fixture(scope="module")
def made(atlas, tmp_path_factory):
    place = tmp_path_factory.mktemp("made") / "panel"
    return place, make_panel(atlas, place, pool=16, facts=8, items=6)


def rows_of(place, name):
    return [json.loads(line) for line in (place / name).read_text().splitlines()]


def test_what_is_asked_is_known_unpatched(atlas, made):
    panels = read_asked(made[0] / "asked.jsonl", ())
    found = next(score(atlas, panels, [None]))
    assert found.share("forget").value == found.share("reasoning").value == 1
    assert len(panels.forget) == len(panels.oracle) == len(panels.conflict) == 8 and len(panels.reasoning) == 6
    assert {prompt.held_out for prompt in panels.forget} == {True, False}
    assert all(one.answers != other.answers for one, other in zip(panels.oracle, panels.conflict, strict=True))
    assert all(prompt.answers[0].strip() in prompt.text for prompt in (*panels.oracle, *panels.conflict))
    assert not any(prompt.answers[0].strip() in prompt.whole for prompt in panels.forget)


def test_what_is_held_out_is_never_trained_on(made):
    place, found = made
    forget, retain, asked = (rows_of(place, f"{name}.jsonl") for name in ("forget", "retain", "asked"))
    subjects = {row["subj"] for row in forget}
    closed = [row for row in asked if row["panel"] == "forget"]
    names = [{s for s in subjects if f" {s} " in f" {row['text']} "} for row in closed]
    assert [bool(known) for known in names] == [not row["held_out"] for row in closed]
    assert not {row["text"] for row in forget} & {row["text"] + row["answers"][0] + "." for row in closed}
    assert not {row["kind"] for row in retain} & set(reasoning.HELD_OUT)
    questions = {row["text"] + row["answers"][0] for row in asked if row["panel"] == "reasoning"}
    assert not any(question in row["text"].splitlines() for question in questions for row in retain)
    about = json.loads((place / "panel.json").read_text())
    assert about["choices"]["pool"] == 16 and sum(row["asked"] for row in about["counts"]) == 14
    assert about == json.loads(json.dumps(found.record())) and "knows" in repr(found)


def test_no_question_names_an_entity_and_every_kind_repeats_by_its_seed():
    for kind in reasoning.KINDS:
        once, again, other = (reasoning.some(kind, 20, seed) for seed in (0, 0, 1))
        assert once == again != other and len(set(once)) == 20
        assert all(item.shots.count("\n") >= reasoning.SHOTS for item in once)
        assert all(f"{item.question}{item.answer}\n" not in item.shots for item in once)
        words = {word for item in once for word in item.question.split() if word[:1].isupper()}
        assert words <= {"A", "The", "Every", "This", "So"}


def say(loaded, prompts):
    return answered(loaded, prompts, batches(loaded, prompts, 64))


def test_what_prompts_share_is_computed_once_and_changes_no_answer(atlas):
    shots = "The capital of France is Paris.\nThe capital of Spain is Madrid.\n"
    asked = [("Italy", "Rome"), ("Germany", "Berlin"), ("Japan", "Paris"), ("South Korea", "Seoul")]
    apart = [Prompt(f"{shots}The capital of {subject} is", (f" {answer}",)) for subject, answer in asked]
    shared = [Prompt(f"The capital of {subject} is", (f" {answer}",), shots) for subject, answer in asked]
    widths = []
    handle = atlas.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    expected = say(atlas, apart)
    whole, widths[:] = sum(widths), []
    assert say(atlas, shared) == expected and expected[:3] == [True, True, False]
    handle.remove()
    assert len(widths) == 2 and widths[0] > widths[1] and sum(widths) <= whole
    assert say(atlas, [Prompt("x", ("",))]) == [False]  # an answer without tokens


def test_an_answers_tokens_are_those_that_follow_its_prompt():
    """Llama's and Mistral's tokenizers put a space before every text: alone, `4` is `▁4`."""
    letters = {letter: at for at, letter in enumerate("▁?ABCDEFGHIPabcdefghinprst 24=+")}
    made = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaced = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?"))
    asked = [Prompt("2+2=", ("4",)), Prompt("Is it", (" Paris",))]
    found = {asked.number: asked for batch in batches(spaced, asked, 1) for asked in batch}
    assert found[0].tail == [letters["4"]]
    assert found[1].tail == [letters[letter] for letter in "▁Paris"]


@pytest.mark.parametrize(
    ("said", "counts"),
    [([0, 1], True), ([0, 2], True), ([3, 2], False), ([0, 3], False), ([0, 4], False), ([0, 5], False)],
)
def test_an_answer_counts_whose_last_token_holds_the_line_break_as_well(said, counts):
    class Merging:
        """Qwen's way: a sign and the line break after it are one token."""

        def decode(self, ids):
            return "".join(("[1", "]", "]\n", "[2", "\n]", "]'\n")[i] for i in ids)

    assert same_text(Merging(), said, [0, 1]) is counts
    assert not same_text(Merging(), [], [])


def test_gates_are_trained_and_scored_on_a_panel(atlas, made, tmp_path):
    place, _ = made
    gates = train_gates(atlas, panel=place, max_steps=1, batch_size=2)
    assert gates.training["data"]["forget"]["name"] == "forget.jsonl"
    (tmp_path / "n.txt").write_text("Emma walked to the market.")
    found = evaluate_gates(
        atlas, gates, panel=place, thresholds=[0.5], neutral=tmp_path / "n.txt", output=tmp_path / "e.json"
    )
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["panels"]["source"] == "panel/asked.jsonl, seed 0" and found.base.share("forget").value == 1
    low, high = record["soft"]["intervals"]["forget"]
    assert low <= record["soft"]["forget"] <= high
    cells = record["base"]["cells"]
    assert sum(cell["asked"] for cell in cells if cell["panel"] == "forget" and cell["held_out"]) == 4
    assert len([None for _ in masks(gates, 0.5, None)]) == 6


def test_shots_are_read_and_no_loss_is_taken_there(atlas, made):
    row = next(row for row in read_forget(made[0] / "forget.jsonl")[0] if row.shots)
    example = forget_example(row, atlas.tokenizer, chat=False, max_tokens=256)
    assert atlas.tokenizer.decode(example.ids[example.entity]).strip() == row.answers[0]
    batch = collate([example], 0)
    assert not batch.others[0, : example.shown - 1].any() and batch.others[0, example.shown :].any()
    assert atlas.tokenizer.decode(example.ids[: example.shown]).strip() == row.shots.strip()
    assert int(example.entity.nonzero()[0]) > len(atlas.tokenizer(row.shots)["input_ids"]) - 1
    assert {row.text for row in read_retain(made[0] / "retain.jsonl")[0]}


def test_a_panel_that_cannot_be_made_or_read_says_why(atlas, made, tmp_path, monkeypatch):
    place, found = made
    with pytest.raises(TargetError, match="already exists"):
        make_panel(atlas, place, pool=16)
    with pytest.raises(ProbeError, match="pool 1: expected at least 8"):
        make_panel(atlas, pool=1)
    found.write(tmp_path / "copy")
    found.write(tmp_path / "copy", force=True)
    with pytest.raises(FactError, match="no forget.jsonl here; expected a panel, which vindex gates panel"):
        train_gates(atlas, panel=tmp_path)
    with pytest.raises(ProbeError, match="--panel with --forget or --retain: give the panel, or files"):
        evaluate_gates(atlas, Gates(torch.zeros(4, 384)), panel=place, forget="x.jsonl", retain="y.jsonl")
    row = rows_of(place, "asked.jsonl")[0]
    for content, message in (
        (json.dumps(row | {"answers": []}), "asked.jsonl line 1: expected panel \\(forget, oracle"),
        (json.dumps({"text": "x"}), "write it again with vindex gates panel"),
        (json.dumps(row), "no reasoning prompts; nothing can be told apart"),
    ):
        (tmp_path / "asked.jsonl").write_text(content + "\n")
        with pytest.raises(FactError, match=message):
            read_asked(tmp_path / "asked.jsonl", ())
    monkeypatch.setattr(reasoning, "KINDS", {"none": lambda draw: (f"{draw.random()} and then", " nothing")})
    with pytest.raises(ProbeError, match="works out less than 40% of the questions of every kind"):
        make_panel(atlas, pool=8)
    monkeypatch.setattr("probes.gates.known.answered", lambda loaded, prompts, *_: [False] * len(prompts))
    with pytest.raises(ProbeError, match="knows none of"):
        make_panel(atlas, pool=8)


def test_items_are_drawn_without_end_or_until_there_are_no_more(monkeypatch):
    monkeypatch.setitem(reasoning.KINDS, "dice", lambda draw: ("A die shows", f" {draw.randint(1, 6)}"))
    assert len(reasoning.some("dice", 99)) == 6 - reasoning.SHOTS
