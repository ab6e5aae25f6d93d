"""What is asked, and what counts as right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from probes.gates.apply import gate_shape
from probes.gates.data import forget_row, retain_row
from probes.gates.forced import batches
from probes.gates.panels import Panels, Prompt, from_rows, neutral_texts
from probes.gates.panels import atlas as atlas_panels
from probes.gates.score import Settings, Share, neutral, score, stands_in, write
from tests.probes.gates.rows import ROWS, SUMS
from vindex.errors import FactError

PLAIN = Settings()


@pytest.fixture(scope="module")
def panels(atlas):
    made = atlas_panels(atlas.tokenizer, chat=False, count=24)
    return replace(made, neutral=made.neutral[:4])


def one_score(*given):
    return next(score(given[0], given[1], [given[2]]))


def accuracy(loaded, prompts, settings=PLAIN):
    """The share of prompts answered right."""
    asked = Panels(tuple(prompts), (), (), (), (), "")
    return next(score(loaded, asked, [None], settings)).share("forget").value


def test_the_atlas_knows_its_held_out_facts_and_sums(atlas, panels):
    found = one_score(atlas, panels, None).figures()
    assert found["forget"] > 0.9 and found["oracle"] > 0.9 and found["reasoning"] > 0.5 and found["neutral_kl"] == 0


def test_gates_all_at_one_score_as_the_plain_model_and_all_off_score_nothing(atlas, panels):
    shape = gate_shape(atlas.model)
    plain, same, nothing = score(atlas, panels, [None, torch.ones(shape), torch.zeros(shape)])
    assert same == plain
    assert nothing.share("forget").value < 0.1 and nothing.share("reasoning").value < 0.1
    assert nothing.neutral_kl > 1 and nothing.perplexity > 2 * plain.perplexity


def test_forced_scoring_agrees_with_what_the_model_writes(atlas, panels):
    """A forced answer is what greedy decoding writes first."""
    for prompts in (panels.forget[:12], panels.reasoning[:12]):
        written = write(atlas, [prompt.text for prompt in prompts], None, 6)
        by_hand = [text.startswith(prompt.answers[0]) for text, prompt in zip(written, prompts, strict=True)]
        forced = [accuracy(atlas, [prompt]) == 1 for prompt in prompts]
        digits = [text[len(p.answers[0]) :][:1].isdigit() for text, p in zip(written, prompts, strict=True)]
        assert forced == [right and not more for right, more in zip(by_hand, digits, strict=True)]
        assert any(forced)


def test_batches_do_not_change_scores(atlas, panels):
    one, many = (accuracy(atlas, panels.reasoning, Settings(size)) for size in (1, 64))
    assert one == many


def test_short_prompts_are_not_padded_to_the_length_of_long_ones(atlas):
    long, short = Prompt("The city stood on a hill. " * 8 + "2+3=", ("5",)), Prompt("2+3=", ("5",))
    made = batches(atlas, [short, long] * 20, 64)
    assert [len({answer.length for answer in batch}) for batch in made] == [1, 1]
    assert [len(batch) for batch in batches(atlas, [short] * 20, 8)] == [8, 8, 4]


def test_written_answers_are_found_as_words_or_as_the_last_number(atlas, panels):
    assert stands_in("Paris", "The capital is PARIS.") and not stands_in("Paris", "A Parisian lives there.")
    assert stands_in("42", "20+22=42.") and not stands_in("42", "42 and then 43") and stands_in("1200", "It is 1,200")
    assert stands_in("x^2", "So \\boxed{x^2}.") and not stands_in("x", "So \\boxed{x^2}.")
    assert not stands_in("7", "none")
    assert accuracy(atlas, panels.forget[:6], Settings(generate=4)) > 0.8


def test_a_number_that_goes_on_is_wrong(atlas):
    sums = [Prompt("40+40=", ("80",)), Prompt("40+40=", ("8",))]
    assert [accuracy(atlas, [prompt]) for prompt in sums] == [1.0, 0.0]
    spelled = [Prompt("40+40=", answers) for answers in (("8", "eight"), ("eight", "8"))]
    assert [accuracy(atlas, [prompt]) for prompt in spelled] == [0.0, 0.0]  # whichever spelling comes first


def test_any_of_several_answers_counts(atlas):
    asked = "The capital of France is"
    assert accuracy(atlas, [Prompt(asked, (" Rome", " Paris"))]) == 1
    assert accuracy(atlas, [Prompt(asked, (" Rome",))]) == 0
    assert math.isnan(accuracy(atlas, []))


def test_neutral_kl_is_the_mean_per_token_by_hand(atlas):
    text, factors = "Emma walked to the market.", torch.full((4, 384), 0.7)
    from probes.gates.apply import gated

    ids = torch.tensor([atlas.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        base = atlas.model(ids).logits.double().softmax(-1)
        with gated(atlas.model, factors):
            changed = atlas.model(ids).logits.double().softmax(-1)
    by_hand = (base * (base / changed).log()).sum(-1)[0, :-1].mean()
    surprise = -changed.log()[0, :-1].gather(1, ids[0, 1:, None]).mean()
    found, plain = neutral(atlas, [text], [factors, None])
    assert found.kl == pytest.approx(float(by_hand), rel=1e-4) and plain.kl == 0
    assert found.perplexity == pytest.approx(float(surprise.exp()), rel=1e-4)
    assert math.isnan(neutral(atlas, [""], [factors])[0].kl)


def test_panels_from_rows_ask_state_and_contradict(atlas):
    facts, sums = [forget_row(row, "x") for row in ROWS], [retain_row(row, "x") for row in SUMS]
    made = from_rows(facts, sums, ["text"], atlas.tokenizer, chat=False)
    assert made.forget[0] == Prompt("The capital of France is", (" Paris",))
    assert made.forget[2] == Prompt("Question: Where?\nAnswer:", (" Oslo",))
    statement = "Imagine a world. The capital of France is {}. In that world: The capital of France is"
    assert made.oracle[0] == Prompt(statement.format("Paris"), (" Paris",))
    assert made.conflict[0] == Prompt(statement.format("Rome"), (" Rome",)) and len(made.conflict) == 2
    assert made.reasoning == (Prompt("12+13=", ("25",)),)
    solved = retain_row({"problem": "What is 2+3?", "solution": "It is \\boxed{5}."}, "x")
    worked = from_rows(facts, [solved], [], atlas.tokenizer, chat=False).reasoning
    alone = from_rows(facts, [solved], [], atlas.tokenizer, chat=False, worked=False).reasoning
    assert worked == (Prompt("What is 2+3?\nIt is \\boxed{", ("5",)),) and alone == (Prompt("What is 2+3?", ("5",)),)
    asked = from_rows(facts, sums, [], atlas.tokenizer, chat=True).forget[0]
    assert asked.text.startswith("<|im_start|>user\nWhat is its capital?<|im_end|>") and asked.answers == (" Paris",)
    assert asked.text.endswith("</think>\n\nThe capital of France is")
    assert one_score(atlas, made, None).share("forget").value == pytest.approx(2 / 3)


def test_rows_that_ask_nothing_are_refused(atlas):
    facts, sums = [forget_row(row, "x") for row in ROWS], [retain_row({"text": "a long story"}, "x")]
    with pytest.raises(FactError, match="no retain row has a short answer; add an `answer` column"):
        from_rows(facts, sums, [], atlas.tokenizer, chat=False)
    mute = [forget_row({"text": "Paris is a city.", "entities": ["Paris"]}, "x")]
    with pytest.raises(FactError, match="no forget row has a question or text before its entity"):
        from_rows(mute, sums, [], atlas.tokenizer, chat=False)


def test_neutral_texts_come_from_files_or_the_bundle(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert neutral_texts(tmp_path / "a.txt") == ("one\ntwo",) and neutral_texts(tmp_path / "a.jsonl") == ("one", "two")
    assert len(neutral_texts(None)) == 8
    with pytest.raises(FactError, match="cannot be read .No such file"):
        neutral_texts(tmp_path / "nowhere.txt")


def test_intervals_are_wilsons():
    """By hand for 9 of 10, and never of no width where all or none are right."""
    assert Share(9, 10).interval == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert Share(0, 200).interval == pytest.approx((0, 0.0188), abs=1e-4) and Share(200, 200).interval[0] < 0.99
    assert math.isnan(Share(0, 0).value) and math.isnan(Share(0, 0).interval[0])
