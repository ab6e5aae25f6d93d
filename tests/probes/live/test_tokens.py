"""A prompt begins as the tokenizer begins a text, and never ends with what the tokenizer puts after one."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from probes import facts, texts
from probes.atlas import panel as atlas
from probes.deletion.keys import generic_prompts
from probes.facts.prompts import Encoder
from probes.facts.sets import split
from probes.gates.data import forget_row, retain_row
from probes.gates.encode import forget_example, retain_example
from probes.gates.score import neutral, write
from probes.live.load import load
from probes.live.tokens import encode, prompt, require_offsets
from vindex.demo import CHECKPOINT
from vindex.errors import FactError, ProbeError

END, START = "<|endoftext|>", "<|im_start|>"
FRAMES = {"end": ("", END), "start": (START, ""), "both": (START, END), "two ends": ("", f"{END} {END}")}


def framed(before, after):
    """The atlas's tokenizer with special tokens around every text."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (START, END)}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=list(ids.items())
    )
    return tokenizer


@pytest.fixture(scope="module", params=FRAMES)
def frame(request):
    before, after = FRAMES[request.param]
    return framed(before, after), [START] * bool(before)


@pytest.mark.parametrize("text", ["The capital of France is", f"a{END}", f"{START}b", f"{END}", " "])
def test_what_stands_before_stays_and_what_is_put_after_goes(frame, text):
    tokenizer, before = frame
    plain = AutoTokenizer.from_pretrained(CHECKPOINT)(text).input_ids
    ids, spans = encode(tokenizer, text)
    assert list(ids) == tokenizer.convert_tokens_to_ids(before) + plain
    assert len(spans) == len(ids) and spans[-1][1] == len(text)


def test_a_rendered_chat_brings_its_own_special_tokens_unless_it_has_none():
    tokenizer = framed(START, END)
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    for text, wanted in ((f"{START}user\nHi<|im_end|>", 1), ("USER: Hi ASSISTANT:", 1), (f"{END}USER: Hi", 0)):
        ids = encode(tokenizer, text, rendered=True).ids
        assert ids.count(start) == wanted and ids[-1] != end, text
    assert encode(tokenizer, f"{END}USER: Hi").ids[0] == start


def test_a_tokenizer_without_offsets_is_cut_too_and_named_where_offsets_are_needed():
    def slow(text, *, add_special_tokens=True, verbose):
        own = [ord(letter) for letter in text]
        return SimpleNamespace(input_ids=[1, *own, 2] if add_special_tokens else own)

    assert encode(slow, "ab").ids == (1, 97, 98)
    assert encode(slow, "").ids == ()
    with pytest.raises(ProbeError, match="function gives no character offsets; expected a fast tokenizer"):
        require_offsets(slow)


def test_a_prompt_without_tokens_is_one_line():
    with pytest.raises(ProbeError, match="prompt '': no tokens; expected some text to go on from"):
        prompt(framed(START, END), "")


@pytest.fixture(scope="module")
def appending(tmp_path_factory):
    """The atlas, saved with a tokenizer that appends <|endoftext|>."""
    directory = tmp_path_factory.mktemp("eos") / "eos"
    shutil.copytree(CHECKPOINT, directory)
    framed("", END).save_pretrained(directory)
    assert json.loads((directory / "tokenizer.json").read_text())["post_processor"]["type"] == "TemplateProcessing"
    loaded = load(directory, dtype="float32", device="cpu")
    assert loaded.tokenizer("a").input_ids[-1] == loaded.tokenizer.convert_tokens_to_ids(END)
    return loaded


@pytest.fixture(scope="module")
def plain():
    return load(CHECKPOINT, dtype="float32", device="cpu")


@pytest.mark.parametrize("chat", [False, True])
def test_facts_are_asked_in_the_same_tokens(appending, plain, chat):
    panel = atlas.panel()
    fact = panel.find("France/capital")
    one, other = (split(panel, fact, Encoder(loaded.tokenizer, chat)) for loaded in (appending, plain))
    assert one == other
    assert one.headline.answer


def test_every_other_text_is_the_same_tokens(appending, plain):
    row = forget_row({"text": "The capital of France is Paris.", "obj": "Paris", "question": "And France?"}, "x")
    solved = retain_row({"problem": "1+1=", "solution": "2", "text": "1+1=2"}, "x")
    for chat in (False, True):
        for encoded, given in ((forget_example, row), (retain_example, solved)):
            one, other = (
                encoded(given, loaded.tokenizer, chat=chat, max_tokens=64).ids for loaded in (appending, plain)
            )
            assert torch.equal(one, other)
    for text, count in ((texts.read("story"), 64), ("Paris is", 2)):
        settings = {"tokens": count, "vocabulary": 2048}
        one, other = (texts.encode("t", text, loaded.tokenizer, **settings) for loaded in (appending, plain))
        assert one == other
    with pytest.raises(ProbeError, match="tokens with this tokenizer, 9 needed"):
        texts.encode("t", "Paris is", appending.tokenizer, tokens=9, vocabulary=2048)
    one, other = (generic_prompts(loaded.model, loaded.tokenizer, 32) for loaded in (appending, plain))
    assert one == other


def test_the_model_goes_on_and_is_measured_as_without_the_appended_token(appending, plain):
    asked, factors = ["The capital of France is"], torch.full((4, 384), 0.7)
    assert write(appending, asked, None, 4) == write(plain, asked, None, 4)
    assert "Paris" in write(appending, asked, None, 4)[0]
    text = "The sun was low and the sea was calm."
    (found,) = neutral(plain, [text], [factors])
    assert neutral(appending, [text], [factors]) == neutral(plain, [text, "", "a"], [factors]) == [found]
    assert found.kl > 0
    with pytest.raises(ProbeError, match="prompt '': no tokens"):
        write(appending, [""], None, 4)


def unreadable():
    """The atlas's tokenizer, for which the letter q does not exist and z is nothing."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: at for at, letter in enumerate("▁?abcdefghijklmnoprstuvwxyABCDEFGHIJKLMNOPQRSTUVWXY.,")}
    made = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?"))
    made.normalizer = normalizers.Replace("z", "")
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.mark.parametrize(
    ("subject", "answer", "message"),
    [
        ("France", "zz", "the answer 'zz' has no tokens for this tokenizer; correct the fact"),
        ("zz", "Paris", "the subject 'zz' has no tokens for this tokenizer; correct the fact"),
        ("France", "Iraq", "the tokenizer has no token for a part of the answer 'Iraq'"),
    ],
)
def test_a_fact_that_this_tokenizer_cannot_say_is_one_line(subject, answer, message):
    relation = facts.Relation("capital", tuple(f"The capital of {{}} is{end}" for end in ("", ",", ".", " a")), "")
    with pytest.raises(FactError, match=message) as error:
        Encoder(unreadable()).fact(facts.Fact(subject, "capital", answer), relation, 0)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{subject}/capital#0: ")
    if subject == "zz":
        with pytest.raises(FactError, match=message):
            Encoder(unreadable()).plain("{} is", subject, "zz/capital#0")
