"""A chat says every word of what was asked, whatever the template, or it is refused in one line."""

import resource

import pytest
import torch
from transformers import AutoTokenizer

from probes.atlas import corpus
from probes.atlas import panel as atlas
from probes.facts.prompts import Encoder
from probes.gates.data import forget_row, retain_row
from probes.gates.encode import forget_example, retain_example
from probes.gates.panels import atlas as atlas_panels
from probes.gates.panels import from_rows
from probes.live import chat
from probes.live.chat import ask, render
from tests.probes.test_command import run
from vindex.demo import CHECKPOINT
from vindex.errors import ProbeError

QUESTION = "What is the capital of France?"
EACH = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ WORDS }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"


def template(words):
    return EACH.replace("{{ WORDS }}", words)


def spoken(chat_template):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = chat_template
    return tokenizer


GOOD = {
    "text": template("{{ m.content }}"),
    "trimmed": template("{{ m.content | trim }}"),
    "parts": template(PARTS),
    "either": template("{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"),
    "parts or else": template("{% if m.content is string %}{{ raise_exception('parts only') }}{% endif %}" + PARTS),
    "system": "You are kind. user, user!" + template("{{ m.content }}"),
}
BAD = {
    "{{ raise_exception('A system\nmessage') }}": "fails with TemplateError: 'A system message'",
    "{% for m in messages %}{{ m.content }}": 'does not parse ("Unexpected end of template',
    "{{ messages.0.content.nothing.here }}": "fails with UndefinedError",
    "{{ 1 / 0 }}": "fails with ZeroDivisionError",
    "{{ messages + 1 }}": "fails with TypeError",
    "{{ messages['a']['b'] }}": "fails with",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "fails with RecursionError",
    "{% for i in range(99999999) %}x{% endfor %}": "fails with OverflowError",
    "{% for i in range(999) %}{% for j in range(999) %}x{% endfor %}{% endfor %}": "renders 998,001 characters",
    "Hello": "drops or rewrites 'What is the capital of France?'",
    "user: What is the capital of France": "drops or rewrites",
    "user: What is the capital of France?": "drops or rewrites",  # whatever is asked
    template("{{ m.content | replace('?', '') }}"): "drops or rewrites",
    template("{{ m.content | lower }}"): "drops or rewrites",
    template("{{ m.content[:10] }}"): "drops or rewrites",
    template("{{ m.content | replace(' ', '') }}"): "drops or rewrites",
    template("{{ m.content }}{% if '?' in m.content %} Answer in verse.{% endif %}"): "rewrites what stands around",
}


@pytest.mark.parametrize("name", GOOD)
def test_the_question_stands_whole_in_what_is_rendered(name):
    tokenizer = spoken(GOOD[name])
    for question in (QUESTION, "user", "  spaces around\n", "a <b> & 'c' \"d\" {{ e }} \\ ü"):
        text, (start,) = render(tokenizer, ask(question), prompt=True)
        assert text.count("<|im_start|>user\n") == 1 and text.endswith("<|im_start|>assistant")
        lead = len(question) - len(question.lstrip())
        assert text[start + lead :].startswith(question.strip())
        assert text[: start + lead].rstrip().endswith("<|im_start|>user")


def test_a_template_that_takes_text_gives_what_the_tokenizer_gives():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    said = [*ask(QUESTION), {"role": "assistant", "content": "Paris"}]
    for messages, prompt in ((ask(QUESTION), True), (said, False)):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False
        )
        text, starts = render(tokenizer, messages, prompt=prompt)
        assert text == expected
        assert [text[start:].startswith(m["content"]) for start, m in zip(starts, messages, strict=True)]


@pytest.mark.parametrize("source", BAD)
def test_a_template_that_fails_or_changes_the_question_is_one_line(source):
    with pytest.raises(ProbeError) as error:
        render(spoken(source), ask(QUESTION), prompt=True, where="row 3")
    assert str(error.value).startswith("row 3: the chat template ") and BAD[source] in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_whether_a_template_changes_what_is_said_depends_on_what_is_said():
    escaping = spoken(template("{{ m.content | e }}"))
    assert QUESTION in render(escaping, ask(QUESTION)).text
    with pytest.raises(ProbeError, match="drops or rewrites 'Is 1 < 2"):
        render(escaping, ask("Is 1 < 2?"))
    thinking = AutoTokenizer.from_pretrained(CHECKPOINT)
    with pytest.raises(ProbeError, match="drops or rewrites 'So.</think>Paris'"):
        render(thinking, [*ask(QUESTION), {"role": "assistant", "content": "So.</think>Paris"}])


def test_a_list_printed_as_a_list_is_no_question():
    """As text this template cuts the question; as a list of parts it prints the list itself, question included."""
    with pytest.raises(ProbeError, match="drops or rewrites .* as a list of parts|drops or rewrites"):
        render(spoken(template("{{ m.content[:9] }}")), ask(QUESTION))


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ProbeError, match=r"the chat template runs for more than 0.2 s; use another"):
        render(spoken(endless), ask(QUESTION))


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        ("{{ 'x' * 10**10 }}", r"asks for more than 1,073,741,824 bytes"),
        ("{{ 'x'|center(10**10) }}", r"asks for more than 1,073,741,824 bytes"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            r"asks for more than",
        ),
        ("{{ 10**(10**8) }}", r"fails with OverflowError: 'a product of 4e\+08 bits'"),
        (
            "{% set n = namespace(v=3) %}{% for i in range(60) %}{% set n.v = n.v * n.v %}{% endfor %}",
            r"fails with OverflowError: 'a product of",
        ),
    ],
)
def test_a_template_asks_for_bounded_memory_and_counts_in_bounded_numbers(hostile, said):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ProbeError, match=f"the chat template {said}"):
        render(spoken(hostile), ask(QUESTION))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_products_as_templates_have_them_are_what_they_were():
    said = render(spoken("{{ '=' * 3 }}{{ 2 * 3 }}{{ 2 ** 5 }}{{ messages[0].content }}"), ask(QUESTION))
    assert said.text == f"===632{QUESTION}"
    from jinja2.sandbox import SandboxedEnvironment

    assert not SandboxedEnvironment.intercepted_binops


def test_a_question_without_words_and_a_tokenizer_without_a_template_are_one_line():
    for question in ("", " \n"):
        with pytest.raises(ProbeError, match="it has no words; expected something to ask"):
            ask(question)
    with pytest.raises(ProbeError, match="this tokenizer has no chat template; use a chat model"):
        render(spoken(None), ask(QUESTION))


@pytest.mark.parametrize("name", GOOD)
def test_the_subject_and_the_entities_are_found_in_every_template(name):
    tokenizer, panel = spoken(GOOD[name]), atlas.panel()
    asked = Encoder(tokenizer, chat=True).fact(panel.find("France/capital"), panel.relations["capital"], 0)
    assert [tokenizer.decode(asked.ids[at]).strip() for at in asked.subject] == ["France", "France"]
    row = forget_row({"text": "It is Paris.", "obj": "Paris", "question": "And user?"}, "x")
    example = forget_example(row, tokenizer, chat=True, max_tokens=128)
    assert tokenizer.decode(example.ids[example.entity]).strip() == "Paris"
    solved = retain_example(retain_row({"problem": "1+1=", "solution": "2"}, "x"), tokenizer, chat=True, max_tokens=64)
    assert "1+1=" in tokenizer.decode(solved.ids)


def test_every_way_into_a_chat_refuses_a_template_that_drops_the_question():
    tokenizer, panel = spoken("Hello"), atlas.panel()
    row = forget_row({"text": "It is Paris.", "obj": "Paris", "question": "And France?"}, "rows line 2")
    solved = retain_row({"problem": "1+1=", "solution": "2", "answer": "2"}, "rows line 3")
    for way, where in (
        (lambda: Encoder(tokenizer, True).fact(panel.find("France/capital"), panel.relations["capital"], 0), ""),
        (lambda: Encoder(tokenizer, True).plain("{} is", "France", "x"), ""),
        (lambda: forget_example(row, tokenizer, chat=True, max_tokens=64), "rows line 2: "),
        (lambda: retain_example(solved, tokenizer, chat=True, max_tokens=64), "rows line 3: "),
        (lambda: from_rows([row], [solved], [], tokenizer, chat=True), "rows line 3: "),
        (lambda: from_rows([row], [solved], [], tokenizer, chat=True, worked=False), "rows line 3: "),
        (lambda: atlas_panels(tokenizer, chat=True, count=8), ""),
    ):
        with pytest.raises(ProbeError, match=rf"^{where}the chat template drops or rewrites "):
            way()


def test_the_atlas_is_asked_in_the_models_own_template():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    expected = {(prompt.text, (prompt.answer,)) for prompt in corpus.chat_fact_prompts(True)}
    found = {(prompt.text, prompt.answers) for prompt in atlas_panels(tokenizer, chat=True, count=200).forget}
    assert len(found) == 200 and found <= expected
    other = atlas_panels(spoken("Q: {{ messages[0].content }}\nA:"), chat=True, count=8).forget
    assert all(prompt.text.startswith("Q: ") for prompt in other)


def test_apply_refuses_an_empty_prompt(tmp_path, monkeypatch, capsys):
    from probes.gates.files import write_logits

    write_logits(torch.zeros(4, 384), tmp_path / "g")
    asked = ("gates", "apply", "atlas", tmp_path / "g", "--soft", "--prompt", "")
    assert run(monkeypatch, *asked) == 1
    assert capsys.readouterr().err == "vindex: prompt '': no tokens; expected some text to go on from\n"
    assert run(monkeypatch, *asked, "--chat") == 1
    assert capsys.readouterr().err == "vindex: question '': it has no words; expected something to ask\n"
