"""A fact asked in other ways: what is fitted and what is held out never meet, in any family, for any relation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from probes import facts
from probes.atlas import panel as atlas
from probes.facts import Fact, families
from probes.facts.families import FAMILIES, FIT_MEMBERS, MEMBERS
from probes.facts.prompts import Encoder, mentions
from probes.facts.sets import Sets, split
from vindex.demo import CHECKPOINT
from vindex.errors import FactError

RECORD = Path(__file__).parents[3] / "docs" / "records" / "gate3-135m-france.json"
OTHERS = FAMILIES[1:]
LANGUAGES = ("fr", "es", "de", "it")  # of the bundled panel
EMPLOYER = {
    "relation": "employer",
    "templates": ["{} works for", "{}'s employer is", "The employer of {} is", "The company that pays {} is"],
    "question": "Who does {} work for?",
}
PEOPLE = ("Ada", "Bob", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida")
PERSONS = [{"subject": name, "relation": "employer", "answer": f"Firm {n}"} for n, name in enumerate(PEOPLE)]


@pytest.fixture(scope="module")
def france(tokenizer, panel) -> Sets:
    return split(panel, panel.find("France/capital"), Encoder(tokenizer))


def written(tmp_path, *lines):
    """The panel of a facts file with these lines."""
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return facts.read(path)


def test_leads_are_running_text_that_has_nothing_to_do_with_the_panel(panel):
    words = {word for fact in panel.of("capital") for word in (fact.subject, fact.answer)}
    for side in families.bundled().values():
        leads = [text.removesuffix(" {template}") for text in side["context"]]
        assert len(leads) >= MEMBERS
        assert all(100 <= len(lead) <= 200 for lead in leads)
        assert not [word for lead in leads for word in words if mentions(lead, word)]


def test_the_two_sides_share_no_text():
    fit, held_out = families.bundled().values()
    assert set(fit) == set(held_out) == set(OTHERS)
    for family in OTHERS:
        assert not set(fit[family]) & set(held_out[family])


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6), name=st.sampled_from(["France/capital", "hot/opposite", "Japan/currency", "dog/young"])
)
def test_fit_and_held_out_never_meet(tokenizer, panel, seed, name):
    drawn = split(panel, panel.find(name), Encoder(tokenizer), seed)
    fit, held_out = drawn.fit, drawn.held_out
    seen = [prompt for prompts in fit.families.values() for prompt in prompts]
    kept = [prompt for prompts in held_out.families.values() for prompt in prompts]
    assert not {p.template for p in (*seen, *fit.phrasings)} & {p.template for p in (*kept, *held_out.paraphrases)}
    assert not {p.text for p in (*seen, *fit.questions)} & {p.text for p in (*kept, *held_out.questions)}
    names = [prompt.name for prompt in (*seen, *kept, *fit.phrasings, *held_out.paraphrases)]
    assert len(set(names)) == len(names)
    assert all(prompt.fact == name for prompt in (*seen, *kept, *fit.questions, *held_out.questions))
    assert all(prompt.answer == () for prompt in (*fit.questions, *held_out.questions))
    assert drawn == split(panel, drawn.fact, Encoder(tokenizer), seed)


@pytest.mark.parametrize("seed", range(3))
def test_lists_of_the_two_sides_name_different_subjects(tokenizer, panel, seed):
    drawn = split(panel, panel.find("France/capital"), Encoder(tokenizer), seed)

    def named(prompts) -> set[str]:
        return {
            fact.subject for fact in panel.of("capital") for prompt in prompts if mentions(prompt.text, fact.subject)
        } - {"France"}

    seen, kept = named(drawn.fit.families["few_shot"]), named(drawn.held_out.families["few_shot"])
    assert seen <= {prompt.fact.split("/")[0] for prompt in drawn.fit.others}
    assert kept <= {prompt.fact.split("/")[0] for prompt in drawn.held_out.other_subjects}
    assert len(seen) >= families.SHOTS and len(kept) >= families.SHOTS
    for prompt in (*drawn.fit.families["few_shot"], *drawn.held_out.families["few_shot"]):
        assert not mentions(prompt.text, "Paris")


def test_every_bundled_fact_has_all_of_every_family(tokenizer, panel):
    for relation in panel.relations:
        for fact in panel.of(relation)[:2]:
            drawn = split(panel, fact, Encoder(tokenizer))
            assert {family: len(drawn.held_out.families[family]) for family in OTHERS} == dict.fromkeys(OTHERS, MEMBERS)
            assert all(MEMBERS < len(drawn.fit.families[family]) <= FIT_MEMBERS for family in OTHERS)
            assert {prompt.family for prompt in drawn.fit.questions} == set(FAMILIES)
            spoken = LANGUAGES if relation == "capital" else ()
            assert {prompt.family for prompt in drawn.held_out.questions} == {*FAMILIES, *spoken}


def test_a_prompt_of_a_family_is_what_the_family_says(tokenizer, france):
    for side in (france.fit, france.held_out):
        assert all(prompt.text.startswith("France") for prompt in side.families["subject_first"])
        assert all("<|im_start|>assistant\n" in prompt.text for prompt in side.families["chat"])
        assert all(len(prompt.text) > 100 and prompt.subject for prompt in side.families["context"])
        written = [prompt for prompt in side.questions if prompt.family == "chat"]
        assert written and all(prompt.text.endswith("</think>\n\n") for prompt in written)
        for prompts in side.families.values():
            assert {tokenizer.decode(prompt.answer).strip() for prompt in prompts} <= {"Paris", "París", "Parigi"}


def test_the_question_is_held_out(france, panel):
    question = panel.relations["capital"].question.replace("{}", "France")
    assert not [prompt for prompts in france.fit.families.values() for prompt in prompts if question in prompt.text]
    assert not [prompt for prompt in france.fit.questions if prompt.family == "chat" and question in prompt.text]


def test_other_draws_are_as_they_were_before_there_were_families(france):
    """Counts over a seed's facts can be compared with earlier ones; the record is one of those."""
    recorded = json.loads(RECORD.read_text())["sets"]
    assert recorded["seed"] == france.seed
    for side, groups in (("fit", france.fit), ("held_out", france.held_out)):
        for key, ours in (("phrasings", "phrasings"), ("paraphrases", "paraphrases")):
            if key in recorded[side]:
                assert recorded[side][key] == [{"name": p.name, "text": p.text} for p in getattr(groups, ours)]
    assert recorded["fit"]["other_subjects"] == [prompt.name for prompt in france.fit.others]
    for key in ("reference", "other_subjects", "same_subject", "same_answer"):
        assert recorded["held_out"][key] == [prompt.name for prompt in getattr(france.held_out, key)]


def test_every_capital_of_the_panel_is_there_in_four_languages(panel):
    relation = panel.relations["capital"]
    assert {language: len(texts) for language, texts in relation.translations.items()} == dict.fromkeys(LANGUAGES, 2)
    for fact in panel.of("capital"):
        assert set(fact.translations) == set(LANGUAGES), fact.name
        for names in fact.translations.values():
            assert names.of.endswith(names.subject) and names.of != names.subject, fact.name


@pytest.mark.parametrize(
    ("name", "language", "names"),
    [
        ("Germany/capital", "fr", ("Allemagne", "de l'Allemagne", "Berlin")),
        ("Japan/capital", "fr", ("Japon", "du Japon", "Tokyo")),
        ("Israel/capital", "fr", ("Israël", "d'Israël", "Jérusalem")),
        ("Philippines/capital", "fr", ("Philippines", "des Philippines", "Manille")),
        ("Austria/capital", "de", ("Österreich", "von Österreich", "Wien")),
        ("Turkey/capital", "de", ("Türkei", "der Türkei", "Ankara")),
        ("Iraq/capital", "de", ("Irak", "des Irak", "Bagdad")),
        ("England/capital", "es", ("Inglaterra", "de Inglaterra", "Londres")),
        ("Egypt/capital", "it", ("Egitto", "dell'Egitto", "Il Cairo")),
        ("China/capital", "it", ("Cina", "della Cina", "Pechino")),
        ("Yemen/capital", "it", ("Yemen", "dello Yemen", "Sana'a")),
        ("Cuba/capital", "it", ("Cuba", "di Cuba", "L'Avana")),
    ],
)
def test_known_translations(panel, name, language, names):
    assert panel.find(name).translations[language] == names


def test_a_language_asks_for_the_translated_answer_and_for_the_facts_own(tokenizer, panel):
    drawn = split(panel, panel.find("Austria/capital"), Encoder(tokenizer))
    asked = drawn.held_out.families["de"]
    assert [prompt.text for prompt in asked[:2]] == [
        "Die Hauptstadt von Österreich ist",
        "Frage: Was ist die Hauptstadt von Österreich? Antwort:",
    ]
    assert [tokenizer.decode(prompt.answer) for prompt in asked] == [" Wien", " Wien", " Vienna", " Vienna"]
    assert all(tokenizer.decode(prompt.ids[: prompt.subject[0] + 1]).endswith("Österreich") for prompt in asked)
    assert len([prompt for prompt in drawn.held_out.questions if prompt.family == "de"]) == 2
    assert not set(drawn.fit.families) & set(LANGUAGES)


def test_a_users_file_has_the_families_without_saying_anything_of_them(tmp_path, tokenizer):
    own = written(tmp_path, EMPLOYER, *PERSONS)
    drawn = split(own, own.find("Ada/employer"), Encoder(tokenizer))
    assert {family: len(prompts) for family, prompts in drawn.held_out.families.items()} == dict.fromkeys(
        OTHERS, MEMBERS
    )
    assert all(MEMBERS <= len(drawn.fit.families[family]) <= FIT_MEMBERS for family in OTHERS)
    plain = {prompt.text for prompt in (*drawn.fit.phrasings, *drawn.held_out.paraphrases)}
    both = (*drawn.fit.families["subject_first"], *drawn.held_out.families["subject_first"])
    assert not plain & {prompt.text for prompt in both}


def test_a_users_file_may_give_questions_templates_that_begin_with_the_subject_and_translations(tmp_path, tokenizer):
    relation = EMPLOYER | {
        "questions": ["Whom does {} serve?", "Where does {} earn money?"],
        "subject_first": ["{} is paid by", "{} has a job at", "{} {owes} it all to", "{} serves"],
        "translations": {"eo": ["{} laboras por", "La dunganto {of} estas"]},
    }
    ada = PERSONS[0] | {"translations": {"eo": {"subject": "Adanjo", "answer": "Firmo"}}}
    own = written(tmp_path, relation, ada, *PERSONS[1:])
    drawn = split(own, own.find("Ada/employer"), Encoder(tokenizer))
    texts = {prompt.text for prompt in drawn.fit.families["subject_first"] + drawn.held_out.families["subject_first"]}
    assert {"Ada is paid by", "Ada has a job at", "Ada {owes} it all to", "Ada serves"} & texts
    assert [p.text for p in drawn.held_out.families["eo"][:2]] == ["Adanjo laboras por", "La dunganto Adanjo estas"]
    assert "eo" not in split(own, own.find("Bob/employer"), Encoder(tokenizer)).held_out.families


@pytest.mark.parametrize(
    ("relation", "fact", "message"),
    [
        ({"questions": "Who?"}, {}, "facts.jsonl:1: questions is 'Who[?]', expected a list of templates"),
        (
            {"subject_first": ["Paid by {}"]},
            {},
            r"facts.jsonl:1: subject_first has 'Paid by {}', expected templates that begin with {}",
        ),
        ({"translations": ["fr"]}, {}, r"facts.jsonl:1: translations is \['fr'\], expected a JSON object by language"),
        (
            {"translations": {"fr": ["{of} est {}"]}},
            {},
            "facts.jsonl:1: template '{of} est {}': expected",
        ),
        ({}, {"translations": {"fr": "Ada"}}, "facts.jsonl:2: translations of 'fr' is 'Ada', expected"),
        ({}, {"translations": {"fr": {"subject": "Ada"}}}, "facts.jsonl:2: answer is None, expected a non-empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, relation, fact, message):
    with pytest.raises(FactError, match=message):
        written(tmp_path, EMPLOYER | relation, PERSONS[0] | fact)


def test_a_relation_without_a_question_is_never_asked_one(tmp_path, tokenizer):
    own = written(tmp_path, {key: EMPLOYER[key] for key in ("relation", "templates")}, *PERSONS)
    drawn = split(own, own.find("Ada/employer"), Encoder(tokenizer))
    assert len(drawn.fit.families["chat"]) == len(drawn.held_out.families["chat"]) == MEMBERS


def test_the_atlas_is_asked_in_every_family(tokenizer):
    panel = atlas.panel()
    drawn = split(panel, panel.find("France/capital"), Encoder(tokenizer))
    assert set(drawn.fit.families) == set(drawn.held_out.families) == set(OTHERS)


@pytest.mark.parametrize("template", [None, "{{ raise }}", "{{ messages[0].content.upper() }}"])
def test_without_a_chat_template_that_says_what_it_is_told_there_is_no_chat(panel, template):
    silent = AutoTokenizer.from_pretrained(CHECKPOINT)
    silent.chat_template = template
    drawn = split(panel, panel.find("France/capital"), Encoder(silent))
    assert "chat" not in drawn.fit.families.keys() | drawn.held_out.families.keys()
    assert {prompt.family for prompt in drawn.fit.questions} == {*FAMILIES} - {"chat"}


def test_what_a_tokenizer_cannot_say_is_left_out():
    """A tokenizer of whole words that knows the templates and a few texts, and no other word."""
    words = "[UNK] Ada Bob works for 's employer is The of company that pays Firm 0 : ? . !".split()
    vocabulary = {word: number for number, word in enumerate((*words, *PEOPLE[2:], *"12345678"))}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    few = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    relation = facts.Relation("employer", tuple(EMPLOYER["templates"][:1] + EMPLOYER["templates"][2:] * 2), "")
    own = facts.Panel(
        "mine", {"employer": relation}, tuple(Fact(f["subject"], "employer", f["answer"]) for f in PERSONS)
    )
    drawn = split(own, own.find("Ada/employer"), Encoder(few))
    assert set(drawn.held_out.families) == {"few_shot", "subject_first"}
    with pytest.raises(FactError, match="x: the tokenizer has no token for a part of 'Ada sings for'"):
        Encoder(few).free("Ada sings for", own.facts[0], "own", "x")


def test_free_text_is_read_wherever_it_names_the_subject(tokenizer):
    fact = Fact("France", "capital", "Paris")
    text = "In France and in francee, Francesca said: France is"
    prompt = Encoder(tokenizer).free(text, fact, "own", "mine")
    assert (prompt.name, prompt.fact, prompt.family, prompt.text) == ("mine", "France/capital", "own", text)
    read = [tokenizer.decode(prompt.ids[: at + 1]) for at in prompt.subject]
    assert read == ["In France", "In France and in francee, Francesca said: France"]
    assert tokenizer.decode(prompt.answer) == " Paris"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("France has", " Paris"),
        ("France has ", " Paris"),
        ('France has "', "Paris"),
        ("France (", "Paris"),
        ("France:\n", "Paris"),
    ],
)
def test_an_answer_follows_a_space_or_an_opening_quote(tokenizer, text, answer):
    prompt = Encoder(tokenizer).free(text, Fact("France", "capital", "Paris"), "own", "")
    assert tokenizer.decode(prompt.ids + prompt.answer) == text.rstrip(" ") + answer
    assert tokenizer.decode(prompt.answer) == answer


def test_a_subject_in_first_place_is_read_at_the_next_token(tokenizer):
    ids = tokenizer(" France has").input_ids
    assert tokenizer.decode(ids[:1]) == " France"
    assert Encoder(tokenizer).free(" France has", Fact("France", "capital", "Paris"), "own", "").subject == (1,)


def test_a_text_that_does_not_name_the_subject_is_refused(tokenizer):
    with pytest.raises(FactError, match="own: the text does not name the subject 'France'"):
        Encoder(tokenizer).free("The capital is", Fact("France", "capital", "Paris"), "own", "own")


def test_a_text_that_names_the_subject_by_chance_is_not_used(tokenizer, panel):
    """Bees, glass and butter are in a lead each."""
    for subject, answer in (("Bees", "wasps"), ("Glass", "butter")):
        own = dataclasses.replace(panel, facts=(*panel.facts, Fact(subject, "opposite", answer)))
        for seed in range(3):
            drawn = split(own, own.facts[-1], Encoder(tokenizer), seed)
            both = (*drawn.fit.families["context"], *drawn.held_out.families["context"])
            assert all(not mentions(prompt.text, answer) for prompt in both)
            assert all(len(prompt.subject) == 1 for prompt in both)
