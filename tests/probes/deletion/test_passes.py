"""Parts of a model give what the whole gives."""

from __future__ import annotations

import pytest
import torch

from probes.atlas import panel as atlas
from probes.deletion.measure import answers
from probes.deletion.tail import Tail, begin, check_parts
from probes.facts.passes import ROWS, batch, kl_between, last_hidden, unembed
from probes.facts.prompts import Encoder
from probes.facts.sets import split
from probes.live.hooks import capture, patched
from probes.live.load import load
from probes.live.sites import Site
from probes.weights.delta import Delta
from vindex.demo import CHECKPOINT
from vindex.errors import ProbeError


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_tail_gives_what_the_whole_model_gives(loaded, chat, layer):
    panel = atlas.panel()
    prompts = split(panel, panel.find("France/capital"), Encoder(loaded.tokenizer, chat)).fit.phrasings
    group = batch(prompts, torch.device("cpu"))
    tail = Tail.of(loaded.model, layer, prompts)
    with torch.no_grad():
        whole = unembed(loaded.model, last_hidden(loaded.model, group.ids)[group.rows, group.columns])
        torch.testing.assert_close(tail.log_probs(), whole, atol=1e-4, rtol=1e-4)
        unchanged = torch.zeros_like(tail.gate)
        torch.testing.assert_close(tail.log_probs(unchanged), whole, atol=1e-4, rtol=1e-4)
        direct = loaded.model(torch.tensor([prompts[0].ids])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(tail.log_probs()[0], direct, atol=1e-4, rtol=1e-4)


def test_a_patched_tail_gives_what_the_patched_model_gives(loaded, sets):
    """For a read direction that is silent before the subject, where a tail takes it to be."""
    tail = Tail.of(loaded.model, 1, [sets.headline])
    at = sets.headline.subject[0]
    with torch.no_grad(), capture(loaded.model, [Site("mlp_in", 1)]) as seen:
        loaded.model(torch.tensor([sets.headline.ids]))
    inputs = seen[Site("mlp_in", 1)][0]
    read = inputs[at] - inputs[:at].T @ torch.linalg.lstsq(inputs[:at].T, inputs[at]).solution
    torch.manual_seed(0)
    delta = Delta(1, torch.randn(tail.gate.shape[-1]), read / (read @ inputs[at]), "test")
    with torch.no_grad(), patched(loaded.model, delta.edits()):
        whole = loaded.model(torch.tensor([sets.headline.ids])).logits[0, -1].log_softmax(-1)
    change = (tail.mlp_in @ delta.gate_read)[..., None] * delta.gate_write
    with torch.no_grad():
        torch.testing.assert_close(tail.log_probs(change)[0], whole, atol=1e-3, rtol=1e-3)
        assert (tail.log_probs(change)[0] - tail.log_probs()[0]).abs().max() > 0.1


def test_running_a_model_in_parts_that_has_more_to_it_is_refused(loaded, sets, monkeypatch):
    whole = loaded.model.forward

    def scaled(*args, **kwargs):
        out = whole(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(loaded.model, "forward", scaled)
    with pytest.raises(ProbeError, match="run in parts it gives other probabilities"):
        check_parts(loaded.model, sets.headline, [1])


@pytest.mark.parametrize("layer", [0, 3])
def test_prompts_begun_together_give_the_same_in_any_company(loaded, sets, layer):
    model, prompts = loaded.model, [sets.headline, *sets.fit.about, *sets.fit.phrasings[1:]]
    begun = begin(model, [layer], prompts)[layer]
    assert [each.prompt for each in begun] == prompts
    chosen = [begun[-1], begun[0], begun[3]]
    with torch.no_grad():
        together = Tail(model, layer, chosen)
        found = together.log_probs(torch.full_like(together.gate, 0.3)).split([len(each.unchanged) for each in chosen])
        for each, rows in zip(chosen, found, strict=True):
            alone = Tail.of(model, layer, [each.prompt])
            wanted = alone.log_probs(torch.full_like(alone.gate, 0.3))
            torch.testing.assert_close(rows, wanted, atol=1e-4, rtol=1e-4)


def test_the_divergence_of_long_texts_is_that_of_all_their_rows(loaded):
    torch.manual_seed(0)
    before, after = torch.randn(2, 2 * ROWS + 5, loaded.model.config.hidden_size)
    with torch.no_grad():
        found = kl_between(loaded.model, before, after)
        one, other = (unembed(loaded.model, rows).log_softmax(-1).exp() for rows in (before, after))
    wanted = (one * (one / other).log()).sum(-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_a_tail_of_prompts_without_answers_looks_from_the_subject_on(loaded, sets):
    tail = Tail.of(loaded.model, 1, sets.fit.about)
    assert len(tail.log_probs()) == sum(len(prompt.ids) - prompt.subject[0] for prompt in sets.fit.about)


def test_a_prompt_without_an_answer_is_looked_at_from_the_subject_on(sets):
    about, asked = sets.fit.about[0], sets.headline
    group = batch([about, asked], torch.device("cpu"))
    wanted = list(range(about.subject[0], len(about.ids)))
    assert group.columns[group.rows == 0].tolist() == wanted
    assert group.columns[group.rows == 1].tolist() == [len(asked.ids) - 1]


def test_a_tail_of_prompts_that_all_begin_with_the_subject_needs_no_cache(loaded, sets):
    model, prompt = loaded.model, sets.headline._replace(subject=(0,))
    with torch.no_grad():
        wanted = unembed(model, last_hidden(model, torch.tensor([prompt.ids])))[0, -1]
        found = Tail.of(model, 0, [prompt]).log_probs()[0]
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_batch_and_single_evaluation_agree(sets, dtype, tolerance):
    model = load(CHECKPOINT, dtype=dtype, device="cpu").model
    prompts = [*sets.held_out.paraphrases, *sets.held_out.other_subjects[:20]]
    together = {prompt.name: outcome for prompt, outcome in answers(model, prompts)}
    for prompt in prompts:
        [(_, alone)] = answers(model, [prompt])
        assert alone.probability == pytest.approx(together[prompt.name].probability, abs=tolerance)
