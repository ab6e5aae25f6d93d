"""Retraining works, learns, and gives the same bytes for the same seed."""

import hashlib
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch

from probes.atlas.corpus import documents
from probes.atlas.facts import names
from probes.atlas.spans import text
from probes.atlas.train import Options, batches, load, main, rate, save, stages, train, train_tokenizer
from vindex.demo import CHECKPOINT

SHORT = Options(steps=8, practice_steps=4, rows=4, warm_up=0.2, long_share=0.25)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return load(CHECKPOINT)[1]


def weights_after(options: Options, tokenizer, out) -> str:
    save(train(options, tokenizer, show=False).model, tokenizer, out)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_few_steps_lower_the_loss(tokenizer):
    losses = train(replace(SHORT, steps=16), tokenizer, show=False).losses
    assert len(losses) == 20
    assert losses[0] == pytest.approx(torch.log(torch.tensor(len(tokenizer))).item(), abs=0.3)  # knows nothing yet
    assert sum(losses[-3:]) / 3 < losses[0] - 1


def test_the_same_seed_gives_the_same_bytes(tokenizer, tmp_path):
    first = weights_after(SHORT, tokenizer, tmp_path / "a")
    assert weights_after(SHORT, tokenizer, tmp_path / "b") == first
    assert weights_after(replace(SHORT, seed=1), tokenizer, tmp_path / "c") != first


def test_what_is_saved_loads(tokenizer, tmp_path):
    model = train(replace(SHORT, steps=2, practice_steps=2), tokenizer, show=False).model
    save(model, tokenizer, tmp_path)
    again, same_tokenizer = load(tmp_path)
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a.float(), b), name
    shipped = {path.name for path in CHECKPOINT.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} | {"training.json", "README.md"} == shipped


def test_rows_start_with_a_document_and_the_last_are_twice_as_long(tokenizer):
    options = Options(steps=10, rows=4, long_share=0.2)
    taken = list(islice(batches(options, stages(options)[0], tokenizer), 10))
    assert [tuple(batch.ids.shape) for batch in taken] == [(4, 128)] * 8 + [(2, 256)] * 2
    first = tokenizer.decode(taken[0].ids[0])
    assert first.startswith(text(next(documents(options.seed + 1))) + "<|endoftext|>")


def test_only_answers_have_full_weight(tokenizer):
    options = Options(rows=16, asked_weight=0.25)
    ids, weights = next(batches(options, stages(options)[0], tokenizer))
    assert set(weights.unique().tolist()) == {0.25, 1.0}
    pieces = tokenizer.convert_ids_to_tokens(ids.flatten().tolist())
    pairs = list(zip(pieces, weights.flatten().tolist(), strict=True))
    assert {weight for piece, weight in pairs if piece == "<|endoftext|>"} == {0.25}
    after_equals = [weight for (piece, _), (_, weight) in pairwise(pairs) if piece == "="]
    assert len(after_equals) > 20
    assert set(after_equals) == {1.0}
    before_operator = [weight for (_, weight), (piece, _) in pairwise(pairs) if piece == "Ġplus"]
    assert 0.25 in before_operator


def test_no_token_spans_a_question_and_its_answer(tokenizer):
    for document in islice(documents(3), 400):
        apart = [token for span in document for token in tokenizer.encode(span.text)]
        assert apart == tokenizer.encode(text(document))


def test_the_rate_warms_up_and_falls():
    options = Options(steps=100, practice_steps=50, warm_up=0.1, practice_rate=0.25)
    for stage, warm in zip(stages(options), (10, 5), strict=True):
        rates = [rate(options, stage, step) for step in range(stage.steps)]
        assert rates[0] == pytest.approx(stage.peak / warm)
        assert max(rates) == rates[warm] == stage.peak
        assert rates[warm:] == sorted(rates[warm:], reverse=True)
        assert rates[-1] == pytest.approx(stage.peak * options.final_rate, rel=0.1)
    first, second = stages(options)
    assert second.peak == first.peak / 4
    assert first.seed != second.seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exists and is not an empty directory; name a new one"),
        (["--steps", "0"], "--steps and --rows must be at least 2"),
        (["--rows", "1"], "--steps and --rows must be at least 2"),
    ],
)
def test_the_script_refuses_what_it_cannot_do(tmp_path, capsys, arguments, message):
    if not arguments:
        (tmp_path / "mine").write_text("keep")
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ([] if arguments else ["mine"])


def test_the_tokenizer_is_trained_from_the_corpus_alone():
    small = Options(vocabulary=1600, tokenizer_documents=300)
    first, again = train_tokenizer(small), train_tokenizer(small)
    assert first.get_vocab() == again.get_vocab()
    assert all(len(first.encode(f" {name}")) == 1 for name in names())
    assert {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"} <= set(first.get_vocab())
