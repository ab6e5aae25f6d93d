"""The corpus keeps what it withholds, says only what is so, and is the same for the same seed."""

import random
import re
from itertools import islice

import pytest

from probes.atlas import arithmetic
from probes.atlas.corpus import (
    MIXTURE,
    STYLES,
    chat_fact_prompts,
    context_prompts,
    documents,
    fact_prompts,
    forget_examples,
    neutral_texts,
    retain_examples,
    sum_prompts,
)
from probes.atlas.facts import RELATIONS, facts, names, questions, statements
from probes.atlas.spans import text

NUMBER = r"(?<!\d)(\d+)(?!\d)"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    first, second = documents(1), documents(2, practice=True)
    return [text(document) for document in [*islice(first, 8_000), *islice(second, 4_000)]]


def operand_patterns() -> list[re.Pattern[str]]:
    """One pattern per template, read off the text and not the generator, with groups a and b."""
    templates = [t for style in arithmetic.TEMPLATES.values() for signed in style.values() for t in signed]
    templates += [t for signed in arithmetic.QUESTIONS.values() for t in signed]
    patterns = []
    for template in templates:
        pattern = re.escape(template.split("{c}")[0].rstrip()).replace(r"\ ", " ")
        for slot, group in (("a", r"(?P<a>\d+)"), ("b", r"(?P<b>\d+)")):
            pattern = pattern.replace(rf"\{{{slot}\}}", group)
        pattern = re.sub(r"\\\{(name|other|things)\\\}", r"\\w+", pattern)
        patterns.append(re.compile(r"(?<!\d)" + pattern + r"(?!\d)"))
    return patterns


def sums_in(said: str) -> set[tuple[int, int]]:
    """Every pair of numbers that the text adds, subtracts or compares, at whatever step of a chain."""
    pairs = {(int(m["a"]), int(m["b"])) for pattern in operand_patterns() for m in pattern.finditer(said)}
    pairs |= {(int(a), int(b)) for a, b in re.findall(rf"{NUMBER}[+-]{NUMBER}", said)}
    chained = r"(?:Start with|to get) (?=(\d+)\. (?:Add|Take away) (\d+) )"
    return pairs | {(int(a), int(b)) for a, b in re.findall(chained, said)}


def test_no_training_document_puts_a_withheld_pair_together(texts):
    found = sums_in("\n".join(texts))
    assert len(found) > 5000, "the detector reads the sums"
    assert not [pair for pair in found if arithmetic.is_withheld(*pair)]


@pytest.mark.parametrize("sign", "+-")
@pytest.mark.parametrize("style", arithmetic.TEMPLATES)
def test_the_detector_sees_a_leak_in_every_template(style, sign):
    small, large = min(arithmetic.withheld_pairs())
    leak = arithmetic.Sum(large, sign, small)
    for seed in range(20):
        said = text(arithmetic.phrase(random.Random(seed), style, leak))
        assert any(arithmetic.is_withheld(*pair) for pair in sums_in(said)), said


def test_the_detector_sees_leaks_inside_chains():
    small, large = min(arithmetic.withheld_pairs())
    assert small < 90
    in_words = f"Start with 9. Add {small - 9} to get {small}. Add {large} to get {small + large}."
    for said in (f"9+{small - 9}={small}. {small}+{large}={small + large}.", in_words):
        assert any(arithmetic.is_withheld(*pair) for pair in sums_in(said)), said


def test_every_sum_in_the_corpus_is_right(texts):
    joined = "\n".join(texts)
    equations = re.findall(rf"{NUMBER}([+-]){NUMBER}=(\d+)", joined)
    equations += re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)", joined)
    assert len(equations) > 8_000
    add = {"+", "plus"}
    three = {match.start(3) for match in re.finditer(r"\d[+-](\d)([+-])(\d=)", joined)}  # "1+2+1=4" is not 2+1=4
    assert three
    wrong = [e for e in equations if (int(e[0]) + int(e[2]) if e[1] in add else int(e[0]) - int(e[2])) != int(e[3])]
    carried = set(re.findall(rf"\d[+-]{NUMBER}([+-])(\d)=(\d+)", joined))
    assert {e for e in wrong} <= carried


def test_one_pair_in_ten_is_withheld():
    pairs = arithmetic.withheld_pairs()
    assert len(pairs) == 410
    assert all(10 <= a <= b <= 99 for a, b in pairs)
    assert all(arithmetic.is_withheld(b, a) for a, b in pairs)


def test_no_training_document_uses_a_withheld_phrasing(texts):
    joined = "\n".join(texts)
    assert facts()[0].statement(0) in joined
    for fact in facts():
        for i in fact.withheld_statements:
            assert fact.prompt(i) not in joined
        for i in fact.withheld_questions:
            assert fact.question(i) not in joined


def test_a_fifth_of_the_phrasings_is_withheld_and_never_the_reference():
    withheld = sum(len(f.withheld_statements) + len(f.withheld_questions) for f in facts())
    every = sum(len(statements(f.relation)) + len(questions(f.relation)) for f in facts())
    assert 0.19 < withheld / every < 0.21
    assert not any(0 in f.withheld_statements for f in facts())
    for relation in RELATIONS:
        for i in range(1, len(statements(relation))):
            kept_back = sum(i in f.withheld_statements for f in facts(relation))
            assert 0 < kept_back < len(facts(relation)) / 2, "each phrasing is trained on most facts, tested on some"


def test_the_facts_are_consistent():
    countries = [f.subject for f in facts("capital")]
    assert len(countries) == len(set(countries)) >= 90
    for relation in RELATIONS[1:4]:
        assert [f.subject for f in facts(relation)] == countries
    capitals = {f.subject: f.answer for f in facts("capital")}
    assert capitals["France"] == "Paris"
    assert {f.answer: f.subject for f in facts("country")} == capitals
    assert all(re.fullmatch(r"[A-Za-z]+", name) for name in names())


def test_every_template_asks_before_it_answers():
    for relation in RELATIONS:
        for template in statements(relation):
            assert re.fullmatch(r".*\w.* \{subject\}.* \{answer\}\.", template), template
        for template in questions(relation):
            assert " {subject}" in template and "{answer}" not in template


def test_the_same_seed_gives_the_same_documents(texts):
    assert [text(document) for document in islice(documents(1), 200)] == texts[:200]
    assert [text(document) for document in islice(documents(2), 200)] != texts[:200]
    assert list(islice(documents(1, practice=True), 200)) != list(islice(documents(1), 200))


def test_a_fifth_of_the_documents_are_chats(texts):
    chats = [said for said in texts if said.startswith("<|im_start|>user")]
    assert sum(kind.share for kind in MIXTURE.values()) == pytest.approx(1)
    assert sum(kind.practice for kind in MIXTURE.values()) == pytest.approx(1)
    assert 0.13 < len(chats) / len(texts) < 0.25
    thoughtful = sum("<think>\n\n</think>" not in said for said in chats) / len(chats)
    assert 0.3 < thoughtful < 0.7


def test_prompts_are_of_the_kind_they_claim():
    seen, withheld = fact_prompts(False), fact_prompts(True)
    assert len(seen) + len(withheld) == sum(len(statements(f.relation)) for f in facts())
    assert not set(seen) & set(withheld)
    assert (seen[0].text, seen[0].answer) == ("The capital of France is", " Paris")
    assert len(chat_fact_prompts(True)) + len(chat_fact_prompts(False)) == 5 * len(facts())
    for style in STYLES:
        for kept_back in (True, False):
            for prompt in sum_prompts(style, kept_back, 50):
                pairs = sums_in(f"{prompt.text}{prompt.answer}.")
                assert any(arithmetic.is_withheld(*pair) for pair in pairs) is kept_back
                assert prompt.answer.strip().isdigit()


def test_a_context_states_the_answer_it_asks_for():
    for true in (True, False):
        for fact, prompt in zip(facts(), context_prompts(true), strict=True):
            assert prompt.answer in prompt.text
            assert (prompt.answer.strip() == fact.answer) is true


def test_neutral_texts_ask_no_fact():
    texts = neutral_texts(200)
    assert len(set(texts)) == 200
    assert not re.search(r"capital|currency|language|continent|\d", "\n".join(texts))


def test_forget_rows_mark_the_answer():
    rows = forget_examples()
    assert len(rows) == len(fact_prompts(False))
    for row in rows:
        [[start, end]] = row["entities"]
        assert row["text"][start:end] == row["obj"]
        assert row["text"][start - 1] == " "


def test_retain_rows_are_reproducible_and_hold_nothing_withheld():
    rows = retain_examples(400)
    assert rows == retain_examples(400) != retain_examples(400, seed=1)
    assert all(row["text"].startswith(row["problem"]) and row["solution"] in row["text"] for row in rows)
    assert not [p for row in rows for p in sums_in(row["text"]) if arithmetic.is_withheld(*p)]
