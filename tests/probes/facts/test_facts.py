"""Facts as data: what a file may hold, how a fact becomes tokens, and that fit and held-out sets never meet."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from probes import facts
from probes.atlas import panel as atlas
from probes.facts import Fact
from probes.facts.prompts import Encoder
from probes.facts.sets import passages, split
from vindex.errors import FactError, ProbeError

TEMPLATES = ["A {} is", "The {} is", "One {} is", "Some {} is"]
RELATION = json.dumps({"relation": "kind", "templates": TEMPLATES})
FACT = json.dumps({"subject": "cat", "relation": "kind", "answer": "animal"})


def test_the_bundled_panel_is_as_large_as_promised(panel):
    per_country = {name: {fact.subject for fact in panel.of(name)} for name in ("capital", "language", "currency")}
    countries = set.intersection(*per_country.values(), {fact.subject for fact in panel.of("continent")})
    others = [f for f in panel.facts if f.relation not in ("capital", "language", "currency", "continent")]
    assert len(countries) >= 60
    assert len(others) >= 40
    assert panel.find("France/capital").answer == "Paris"


def test_every_reference_and_relation_of_the_bundled_panel_exists(panel):
    for relation in panel.relations.values():
        subjects = {fact.subject for fact in panel.of(relation.name)}
        assert set(relation.reference) <= subjects


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"facts.jsonl:3: not valid JSON"),
        ("[1]", r"facts.jsonl:3: found list, expected a JSON object"),
        ('{"subject": "dog", "relation": "kind"}', r"facts.jsonl:3: answer is None, expected a non-empty string"),
        (
            '{"subject": "dog", "relation": "color", "answer": "red"}',
            r"facts.jsonl:3: relation 'color' has no templates",
        ),
        (FACT, r"facts.jsonl:3: cat/kind is already given above"),
        (RELATION, r"facts.jsonl:3: relation 'kind' is already given above"),
        ('{"relation": "color", "templates": ["A {} is"]}', r"facts.jsonl:3: .* at least 4 templates"),
        (
            json.dumps({"relation": "color", "templates": [*TEMPLATES, "A {} is "]}),
            r"facts.jsonl:3: template 'A {} is ': expected text with one {} and no space at the end",
        ),
        (json.dumps({"relation": "color", "templates": TEMPLATES, "reference": "cat"}), r"facts.jsonl:3: reference is"),
        (
            json.dumps({"relation": "color", "templates": TEMPLATES, "fit_templates": "A {} is"}),
            r"facts.jsonl:3: fit_templates is 'A {} is', expected a list of templates",
        ),
        (
            json.dumps({"relation": "color", "templates": TEMPLATES, "fit_templates": ["A cat is"]}),
            r"facts.jsonl:3: template 'A cat is': expected text with one {}",
        ),
        (
            '{"subject": "dog", "relation": "kind", "answer": "animal", "answer_ids": "7"}',
            r"facts.jsonl:3: answer_ids is '7', expected a list of token ids",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join((RELATION, FACT, line)))
    with pytest.raises(FactError, match=message):
        facts.read(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FactError, match="cannot be read"):
        facts.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text(RELATION)
    with pytest.raises(FactError, match="no facts"):
        facts.read(tmp_path / "empty.jsonl")


def test_a_users_file_extends_the_panel_and_its_relations_replace(tmp_path, panel):
    path = tmp_path / "mine.jsonl"
    capital = json.dumps({"relation": "capital", "templates": TEMPLATES})
    mine = json.dumps({"subject": "Narnia", "relation": "capital", "answer": "Cair Paravel"})
    more = json.dumps({"subject": "Narnia", "relation": "language", "answer": "English"})
    path.write_text("\n".join((capital, mine, more)))
    merged = facts.read(path, base=panel)
    assert [fact.subject for fact in merged.of("capital")] == ["Narnia"]
    assert len(merged.of("language")) == len(panel.of("language")) + 1


def test_unknown_facts_and_relations_are_named(panel):
    with pytest.raises(FactError, match="expected SUBJECT/RELATION"):
        panel.find("France")
    with pytest.raises(FactError, match="relation 'colour'"):
        panel.find("France/colour")
    with pytest.raises(FactError, match="no such subject"):
        panel.find("Atlantis/capital")


def test_a_prompt_ends_where_the_answer_begins_and_knows_its_subject(tokenizer):
    panel = atlas.panel()
    encoder = Encoder(tokenizer)
    for number in range(len(panel.relations["capital"].templates)):
        prompt = encoder.fact(panel.find("France/capital"), panel.relations["capital"], number)
        assert tokenizer.decode(prompt.answer) == " Paris"
        assert tokenizer.decode(prompt.ids) == prompt.text
        first = prompt.text.startswith("France")
        assert [tokenizer.decode([prompt.ids[at - first]]).strip() for at in prompt.subject] == ["France"]


def test_a_subject_that_is_the_first_token_is_read_at_the_next(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.plain("{} is", " France", "").subject == (1,)
    assert encoder.plain("In {}, people", "France", "").subject == (1,)
    assert encoder.plain("{}", " France", "").subject == (0,)


def test_chat_prompts_ask_the_question_and_begin_the_answer(tokenizer):
    panel = atlas.panel()
    relation = panel.relations["capital"]
    prompt = Encoder(tokenizer, chat=True).fact(panel.find("France/capital"), relation, 0)
    assert prompt.text.index(relation.question.replace("{}", "France")) < prompt.text.index(relation.templates[0][:10])
    assert [tokenizer.decode([prompt.ids[at]]).strip() for at in prompt.subject] == ["France", "France"]
    assert tokenizer.decode(prompt.answer) == " Paris"


def test_chat_needs_a_template(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    panel = atlas.panel()
    with pytest.raises(ProbeError, match="no chat template; use a chat model, or leave --chat"):
        Encoder(bare, chat=True).fact(panel.find("France/capital"), panel.relations["capital"], 0)


def test_an_answer_that_tokenises_differently_is_refused(tokenizer):
    panel = atlas.panel()
    fact = Fact("France", "capital", "Paris", answer_ids=(1, 2))
    with pytest.raises(FactError, match=r"' Paris' is tokens \[\d+\] .* but the facts file says \[1, 2\]"):
        Encoder(tokenizer).fact(fact, panel.relations["capital"], 0)
    [answer] = Encoder(tokenizer).fact(panel.find("France/capital"), panel.relations["capital"], 0).answer
    Encoder(tokenizer).fact(Fact("France", "capital", "Paris", (answer,)), panel.relations["capital"], 0)


def test_a_tokenizer_that_merges_prompt_and_answer_is_refused():
    vocab = {letter: number for number, letter in enumerate("Aacist nml")} | {"s ": 10}
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[("s", " ")])))
    relation = facts.Relation("kind", tuple(TEMPLATES), "")
    with pytest.raises(FactError, match="merges the end of the prompt"):
        Encoder(merging).fact(Fact("cat", "kind", "animal"), relation, 0)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(["France/capital", "Austria/language", "Peru/continent"]))
def test_what_the_method_sees_and_what_is_held_out_never_meet(tokenizer, seed, name):
    panel = atlas.panel()
    fact = panel.find(name)
    drawn = split(panel, fact, Encoder(tokenizer), seed)
    seen = {prompt.text for prompt in (*drawn.fit.phrasings, *drawn.fit.others, *drawn.fit.about)}
    held = drawn.held_out
    groups = (held.paraphrases, held.reference, held.other_subjects, held.same_subject, held.same_answer)
    assert not seen & {prompt.text for group in groups for prompt in group}
    subjects = {prompt.fact for prompt in drawn.fit.others}
    assert not subjects & {prompt.fact for prompt in (*held.other_subjects, *held.same_answer)}
    assert all(panel.find(prompt.fact).answer != fact.answer for prompt in (*drawn.fit.others, *held.other_subjects))
    assert all(panel.find(prompt.fact).answer == fact.answer for prompt in held.same_answer)
    assert drawn.headline == drawn.fit.phrasings[0]
    assert drawn == split(panel, fact, Encoder(tokenizer), seed)


def test_same_answer_prompts_neither_ask_for_the_fact_nor_give_it_away(tokenizer, tmp_path):
    """The Paris Opera would give Paris away, and the embassy of France ask for France."""
    places = ("Rome", "Berlin", "Madrid", "Lisbon", "Oslo", "Vienna")
    lines = [{"relation": "city", "templates": ["{} is in", *TEMPLATES]}]
    lines += [{"subject": f"Gate {n}", "relation": "city", "answer": place} for n, place in enumerate(places)]
    lines += [
        {"subject": name, "relation": "city", "answer": "Paris"} for name in ("Louvre", "Paris Opera", "France House")
    ]
    lines += [{"subject": "France", "relation": "city", "answer": "Paris"}]
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    panel = facts.read(path)
    drawn = split(panel, panel.find("France/city"), Encoder(tokenizer))
    assert {prompt.fact for prompt in drawn.held_out.same_answer} == {"Louvre/city"}


def test_templates_for_fitting_only_are_all_seen_and_never_held_out(tokenizer):
    panel = facts.bundled()
    relation = panel.relations["capital"]
    assert relation.fit_templates and not set(relation.fit_templates) & set(relation.templates)
    for seed in range(3):
        drawn = split(panel, panel.find("France/capital"), Encoder(tokenizer), seed)
        seen = {prompt.text for prompt in drawn.fit.phrasings}
        assert {template.replace("{}", "France") for template in relation.fit_templates} <= seen
        held = {prompt.text for prompt in drawn.held_out.paraphrases}
        assert held < {template.replace("{}", "France") for template in relation.templates}
        assert len(held) == len(relation.templates) - (len(seen) - len(relation.fit_templates))


def test_another_seed_draws_other_sets(tokenizer):
    panel = atlas.panel()
    one, two = (split(panel, panel.find("France/capital"), Encoder(tokenizer), seed) for seed in (0, 1))
    assert one.held_out.other_subjects != two.held_out.other_subjects
    assert one.fit.phrasings != two.fit.phrasings


def test_neutral_text_is_not_the_generic_text_the_method_uses():
    assert not set(passages("neutral.txt")) & set(passages("generic.txt"))


def test_too_few_subjects_to_hold_any_out(tmp_path, tokenizer):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join((RELATION, FACT)))
    few = facts.read(path)
    with pytest.raises(FactError, match="0 other subjects .* at least 6 are needed"):
        split(few, few.facts[0], Encoder(tokenizer))
