"""Scores, controls and areas: what is asked, what counts as right, and what the one number means."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from probes.gates import plot
from probes.gates.apply import gate_shape
from probes.gates.compare import compare
from probes.gates.controls import FAMILIES, RANDOM_SEEDS, Magnitudes, magnitudes, mask_gates, masks
from probes.gates.data import forget_row, read_forget, read_retain, retain_row
from probes.gates.evaluate import evaluate_gates
from probes.gates.evaluation import area, mean_of, retained
from probes.gates.gates import Gates
from probes.gates.options import EvalOptions
from probes.gates.panels import Panels, Prompt, from_rows, neutral_texts
from probes.gates.panels import atlas as atlas_panels
from probes.gates.score import Settings, Share, neutral, score, stands_in, write
from tests.probes.gates.progress import Told
from vindex.errors import FactError, PatchError, ProbeError, TargetError

PLAIN = Settings()


@pytest.fixture(scope="module")
def panels(atlas):
    made = atlas_panels(atlas.tokenizer, chat=False, count=24)
    return replace(made, neutral=made.neutral[:4])


@pytest.fixture(scope="module")
def random_gates():
    return Gates(torch.randn(4, 384, generator=torch.Generator().manual_seed(3)) * 0.1)


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


def test_written_answers_are_found_as_words_or_as_the_last_number(atlas, panels):
    assert stands_in("Paris", "The capital is PARIS.") and not stands_in("Paris", "A Parisian lives there.")
    assert stands_in("42", "20+22=42.") and not stands_in("42", "42 and then 43") and stands_in("1200", "It is 1,200")
    assert stands_in("x^2", "So \\boxed{x^2}.") and not stands_in("x", "So \\boxed{x^2}.")
    assert not stands_in("7", "none")
    assert accuracy(atlas, panels.forget[:6], Settings(generate=4)) > 0.8


def test_a_number_that_goes_on_is_wrong(atlas):
    sums = [Prompt("40+40=", ("80",)), Prompt("40+40=", ("8",))]
    assert [accuracy(atlas, [prompt]) for prompt in sums] == [1.0, 0.0]


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


ROWS = [
    {"text": "The capital of France is Paris.", "prop": "capital", "obj": "Paris", "question": "What is its capital?"},
    {"text": "The capital of Italy is Rome.", "prop": "capital", "obj": "Rome", "question": "What is its capital?"},
    {"question": "Where?", "prop": "other", "obj": "Oslo"},
]
SUMS = [{"problem": "12+13=", "solution": "25", "text": "12+13=25", "answer": "25"}]


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


def test_every_control_turns_off_as_many_neurons_of_each_layer(random_gates):
    generator = torch.Generator().manual_seed(0)
    strengths = Magnitudes(*(torch.rand(4, 384, generator=generator) for _ in range(2)))
    made = list(masks(random_gates, 0.49, strengths))
    assert [name for name, _, _ in made].count("random") == RANDOM_SEEDS and len(made) == 4 + RANDOM_SEEDS
    for _, _, keep in made:
        assert torch.equal((~keep).sum(1), (~made[0][2]).sum(1))
    by_name = {name: ~keep for name, _, keep in made}
    assert strengths.forget[by_name["largest |h|"]].mean() > strengths.forget[by_name["random"]].mean() + 0.2
    ratio = strengths.forget / strengths.retain
    assert ratio[by_name["|h| ratio"]].median() > 2 * ratio.median()
    contrast = strengths.forget - strengths.retain
    assert contrast[by_name["|h| contrast"]].min() > contrast.median()


@pytest.mark.parametrize("by", ["ratio", "contrast", "largest", "random"])
def test_gates_without_training_turn_off_what_their_masks_do(atlas, files, tmp_path, by):
    """The same neurons as the control of that name of any gates with as many off in every layer."""
    made = mask_gates(atlas, by, forget=files["forget"], retain=files["retain"], output=tmp_path / "made", seed=2)
    read = Gates.read(tmp_path / "made")
    assert torch.equal(read.logits, made.logits) and read.training["by"] == by and read.scale_mode == "none"
    threshold = made.threshold_at(0.25)
    assert (~made.keep(threshold)).sum(1).tolist() == [96] * 4
    facts, sums = read_forget(files["forget"])[0], read_retain(files["retain"])[0]
    strengths = magnitudes(atlas, facts, sums, chat=False, seed=2)
    alike = [name for name, _, keep in masks(made, threshold, strengths) if torch.equal(keep, made.keep(threshold))]
    assert alike == ["gates"] + ([] if by == "random" else [FAMILIES[by]])
    with pytest.raises(TargetError, match="already exists"):
        mask_gates(atlas, by, forget=files["forget"], retain=files["retain"], output=tmp_path / "made")
    with pytest.raises(ProbeError, match="masks by 'x': expected one of ratio, contrast, largest, random"):
        mask_gates(atlas, "x")


def test_magnitudes_are_the_mean_absolute_activations_by_hand(atlas):
    from probes.live.hooks import capture

    facts, sums = [forget_row(ROWS[0], "x")], [retain_row(SUMS[0], "x")]
    found = magnitudes(atlas, facts, sums, chat=False)
    with torch.no_grad(), capture(atlas.model, [("hidden", 2)]) as seen:
        atlas.model(torch.tensor([atlas.tokenizer("The capital of France is")["input_ids"]]))
    torch.testing.assert_close(found.forget[2], seen["hidden", 2][0, -1].abs(), rtol=1e-4, atol=1e-6)
    with torch.no_grad(), capture(atlas.model, [("hidden", 0)]) as seen:
        atlas.model(torch.tensor([atlas.tokenizer("12+13=2")["input_ids"]]))
    torch.testing.assert_close(found.retain[0], seen["hidden", 0][0].abs().mean(0), rtol=1e-4, atol=1e-6)


def test_the_area_is_one_when_facts_go_first_and_half_when_both_go_together():
    assert area([(0.0, 1.0)]) == 1 and area([(1.0, 0.0)]) == 0
    assert area([(0.25, 0.25), (0.75, 0.75)]) == pytest.approx(0.5)
    assert area([(0.5, 1.0)]) == pytest.approx(0.5 + 0.25)
    assert area([(1.3, 0.0)]) == 0  # clipped
    assert retained(0.3, 0.6) == 0.5 and math.isnan(retained(0.0, 0.0))


def test_intervals_are_wilsons():
    """By hand for 9 of 10, and never of no width where all or none are right."""
    assert Share(9, 10).interval == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert Share(0, 200).interval == pytest.approx((0, 0.0188), abs=1e-4) and Share(200, 200).interval[0] < 0.99
    assert math.isnan(Share(0, 0).value) and math.isnan(Share(0, 0).interval[0])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows and a neutral text as the options of evaluate_gates."""
    place = tmp_path_factory.mktemp("rows")
    for name, rows in (("forget", ROWS), ("retain", SUMS)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "neutral.txt").write_text("Emma walked to the market.")
    return {"forget": place / "forget.jsonl", "retain": place / "retain.jsonl", "neutral": place / "neutral.txt"}


@pytest.fixture(scope="module")
def evaluation(atlas, random_gates, files):
    return evaluate_gates(atlas, random_gates, thresholds=random_gates.selected_thresholds()[:2], **files)


def without_time(result):
    return {key: value for key, value in result.record().items() if key != "created"}


def test_an_evaluation_holds_every_point_and_the_record_every_choice(evaluation, random_gates):
    result = evaluation
    assert len(result.entries) == 2 * (4 + RANDOM_SEEDS) and set(result.areas) == set(plot.FAMILIES) - {"smallest |h|"}
    assert result.advantage == result.areas["gates"].value - result.areas["random"].value
    chance = [entry for entry in result.entries if entry.family == "random" and entry.point.off_fraction < 0.1]
    assert mean_of(chance).scores.share("forget").value == pytest.approx(
        sum(e.scores.share("forget").value for e in chance) / RANDOM_SEEDS
    )
    made = result.record()
    assert json.loads(json.dumps(made)) == made and len(made["entries"]) == len(result.entries)
    assert set(EvalOptions.__dataclass_fields__) < set(made["choices"]) and made["choices"]["random_seeds"] == 5
    assert made["choices"]["thresholds"] == pytest.approx(random_gates.selected_thresholds()[:2])
    assert made["choices"]["soft_scale_mode"] == "none" and list(made["model"]["weights_sha256"]) == [
        "model.safetensors"
    ]


def test_an_evaluation_shows_itself(evaluation):
    rows = evaluation.rows()
    assert [row["mask"] for row in rows[:4]] == ["plain model", "soft gates", "gates", "random"] and len(rows) == 12
    assert rows[2]["off_fraction"] == pytest.approx(0.05, abs=1e-3) and rows[0]["knowledge_retained"] is None
    assert repr(evaluation).startswith(f"<gates on atlas: area {evaluation.area:.3f}, ")
    assert evaluation._repr_html_().count("<tr>") == 13


def test_a_saved_record_is_drawn_again(evaluation, tmp_path):
    evaluation.save(tmp_path / "eval.json")
    record = json.loads((tmp_path / "eval.json").read_text())
    evaluation.plot(tmp_path / "curves.png")
    plot.draw(record, tmp_path / "again.png")
    plot.draw(record, tmp_path / "curves.html")
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    page = (tmp_path / "curves.html").read_text()
    assert "area between gates and random masks" in page and "soft gates" in page
    assert "good: facts gone, reasoning kept" in page
    with pytest.raises(TargetError, match="plots are written as"):
        evaluation.plot(tmp_path / "curves.pdf")


def test_a_model_that_knows_nothing_has_no_area(evaluation, tmp_path):
    knows = replace(evaluation.base, cells=tuple(c._replace(right=0) for c in evaluation.base.cells))
    entries = tuple(entry._replace(knowledge=math.nan) for entry in evaluation.entries)
    ignorant = replace(evaluation, base=knows, entries=entries)
    record = ignorant.record()
    assert record["advantage"] is None and record["soft"]["knowledge_retained"] is None
    for name in ("a.png", "a.html"):
        ignorant.plot(tmp_path / name)


def test_a_stopped_evaluation_goes_on_from_its_finished_masks(evaluation, atlas, random_gates, files, tmp_path):
    out, whole = tmp_path / "eval.json", len(evaluation.entries) + 2
    options = {"thresholds": random_gates.selected_thresholds()[:2], "output": out, **files}
    each = 3 + 3 + 2 + 1 + 1  # answers of the five panels
    with pytest.raises(KeyboardInterrupt):
        evaluate_gates(atlas, random_gates, progress=Told({"masks": whole + 7 * (each - 1) + 2}), **options)
    journal = out.with_name("eval.json.unfinished")
    assert not out.exists() and len(json.loads(journal.read_text())["scores"]) == 7
    stopped = journal.read_bytes()
    told = Told()
    done = evaluate_gates(atlas, random_gates, progress=told, **options)
    stage = f"masks (7 of {whole} kept from before)"
    assert done.reused == 7 and told.total[stage] == told.done[stage] == (whole - 7) * each
    assert told.total["activations"] == told.done["activations"] == 4
    assert without_time(done) == without_time(evaluation) and not journal.exists()
    assert json.loads(out.read_text()) == done.record()
    for change in ({"batch_size": 2}, {"chat": True}, {"neutral": None}):  # decides scores: nothing is taken over
        journal.write_bytes(stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_gates(atlas, random_gates, progress=Told({"masks": 1}), **options | change)
    for content, message in (
        (b"{", "eval.json.unfinished: not valid JSON.*remove it to evaluate from the beginning"),
        (b'{"mine": 1}', "is no stopped evaluation; move it away, or choose another place"),
        (stopped.replace(b"[[", b'["x",['), "is no stopped evaluation"),
    ):
        journal.write_bytes(content)
        with pytest.raises(TargetError, match=message):
            evaluate_gates(atlas, random_gates, **options)
        assert journal.read_bytes() == content


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count 0: expected at least 1"),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"generate": -1}, "generate -1: expected at least 0"),
        ({"soft_scale_mode": "rms"}, "scale mode 'rms': expected none, mean, energy"),
        ({"thresholds": [1.5]}, "threshold 1.5: expected a λ between 0 and 1"),
        ({"retain": None}, "--forget without --retain, or the reverse"),
    ],
)
def test_choices_out_of_range_are_refused(atlas, random_gates, files, change, message):
    with pytest.raises(ProbeError, match=message):
        evaluate_gates(atlas, random_gates, **{**files, **change})


def test_gates_of_another_size_are_refused(atlas):
    with pytest.raises(PatchError, match="the gates are 3 × 384"):
        evaluate_gates(atlas, Gates(torch.zeros(3, 384)))


def test_comparing_gates_states_chance():
    generator = torch.Generator().manual_seed(0)
    one, other = (Gates(torch.randn(4, 2000, generator=generator)) for _ in range(2))
    same, apart = compare(one, one), compare(one, other)
    assert same.correlation == pytest.approx(1) and all(o.jaccard == 1 for o in same.overlaps)
    assert abs(apart.correlation) < 0.05
    for overlap in apart.overlaps:
        assert overlap.jaccard == pytest.approx(overlap.chance, abs=0.02)
    mixed = compare(one, Gates(one.logits * 0.5 + other.logits * 0.5))
    assert mixed.overlaps[1].jaccard > 1.5 * mixed.overlaps[1].chance and mixed.layers[0] == pytest.approx(0.7, abs=0.1)
    with pytest.raises(PatchError, match="one set of gates is 4 × 2000, the other 4 × 10"):
        compare(one, Gates(torch.zeros(4, 10)))
