"""Words of several tokens are taken apart as the tokenizers library does it, or not at all."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vindex.demo import CHECKPOINT
from vindex.errors import QueryError
from vindex.tokens import Vocabulary, load_vocabulary, parse_vocabulary

WORDS = (
    " Liechtenstein",
    "don't stop",
    "x = f(12345)\n\n  y",
    " 日本語",
    "😀 hi",
    "½ Ⅷ ²",
    "\t\tif",
    "1,234.56\r\n\r\n a",
)
ALPHABET = "ab cA1 2'\n\t.é日½_-💥ß\r "


def trained(split) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(["the cat's 12 hats, don't stop; a cab\n\n  bacca 日本 "] * 4, trainer)
    return tokenizer.to_str()


SPLITS = {
    "atlas": (CHECKPOINT / "tokenizer.json").read_text,
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "digits": lambda: trained(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
}


@pytest.mark.parametrize("split", SPLITS)
def test_pieces_are_those_of_the_tokenizers_library(split):
    content = SPLITS[split]()
    ours, theirs, dice = parse_vocabulary(content.encode(), "t"), Tokenizer.from_str(content), random.Random(0)
    drawn = ["".join(dice.choice(ALPHABET) for _ in range(dice.randint(1, 12))) for _ in range(300)]
    for text in (*WORDS, *drawn):
        if ours.find(text) is None:
            assert ours.take_apart(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        else:
            assert ours.take_apart(text) == [ours.find(text)]


def edited(**parts) -> Vocabulary:
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    tokenizer["model"] |= parts.pop("model", {})
    return parse_vocabulary(json.dumps(tokenizer | parts).encode(), "t")


@pytest.mark.parametrize(
    "parts, why",
    [
        ({"model": {"type": "WordPiece"}}, "a model of type WordPiece in tokenizer.json"),
        ({"model": {"dropout": 0.1}}, "dropout in tokenizer.json"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer of type Lowercase in tokenizer.json"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "a pre_tokenizer of type Whitespace in tokenizer.json"),
        ({"pre_tokenizer": None, "decoder": None}, "no byte-level pieces in tokenizer.json"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
            "a pattern that is not understood",
        ),
        ({"model": {"merges": [["z", "q"], ["zq", "x"]]}}, "a piece of it has no id"),
    ],
)
def test_a_tokenizer_that_is_not_followed_is_refused(parts, why):
    with pytest.raises(QueryError) as refused:
        edited(**parts).take_apart("zqx")
    assert f"'zqx' is not a single token of this model, and it cannot be taken apart here ({why}" in str(refused.value)


def test_a_word_typed_as_it_is_shown_is_not_taken_apart_as_something_else():
    with pytest.raises(QueryError, match="'␣Paris' is not a .*; ␣ is how a space is shown: type a space"):
        load_vocabulary(CHECKPOINT / "tokenizer.json").take_apart("␣Paris")


def test_an_empty_word_has_no_pieces():
    with pytest.raises(QueryError, match="'' is not a single token of this model; it is empty"):
        load_vocabulary(CHECKPOINT / "tokenizer.json").take_apart("")


def test_added_tokens_inside_a_text_are_found_as_the_library_finds_them():
    text = "<|im_start|>user\n<think>\n\n</think> Paris<|im_end|>"
    theirs = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert load_vocabulary(CHECKPOINT / "tokenizer.json").take_apart(text) == theirs
    added = {"id": 1937, "content": "<b>", "lstrip": True, "rstrip": False, "single_word": False}
    with pytest.raises(QueryError, match="an added token that minds what is beside it"):
        edited(added_tokens=[added]).take_apart("a <b>")


def test_separators_that_are_blank_to_one_of_the_two_are_refused():
    with pytest.raises(QueryError, match="a separator that patterns of Python and of tokenizers take for different"):
        load_vocabulary(CHECKPOINT / "tokenizer.json").take_apart("\x1f's")
