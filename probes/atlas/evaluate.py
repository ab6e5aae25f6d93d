"""What a checkpoint knows, by forward passes: every prompt of the corpus, in phrasings and sums seen and withheld."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from probes.atlas.corpus import (
    NO_THOUGHT,
    STYLES,
    Prompt,
    chat_fact_prompts,
    chat_prompt,
    context_prompts,
    fact_prompts,
    neutral_texts,
    sum_prompts,
)
from probes.atlas.facts import facts

BATCH = 128


def answer_probabilities(model: Any, tokenizer: Any, prompts: list[Prompt]) -> tuple[Any, Any]:
    """Per prompt the probability of the whole answer, and whether greedy decoding gives it and then ends its number."""
    import torch

    from probes.live.answers import given

    ids = tokenizer([text for prompt in prompts for text in prompt], add_special_tokens=False).input_ids
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    found = given(model, tokenizer, pairs, BATCH)
    return torch.tensor([each.probability for each in found]), torch.tensor([float(each.greedy) for each in found])


def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """exp of the mean loss per token, in texts taken one by one."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(total / count)


def chat_answers(model: Any, tokenizer: Any, questions: list[str], thinking: bool, tokens: int = 80) -> list[str]:
    """Greedy answers to chat questions, without the thought."""
    import torch

    prompts = [chat_prompt(question) + ("" if thinking else NO_THOUGHT) for question in questions]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = [tokenizer.decode(row) for row in out[:, batch["input_ids"].shape[1] :]]
    return [text.split("</think>")[-1].split("<|im_end|>")[0].strip() for text in texts]


def chat_sums(model: Any, tokenizer: Any, thinking: bool, count: int = 100) -> float:
    """Share of withheld sums asked in a chat whose answer ends in the right number."""
    asked = [p for p in sum_prompts("words", True, 4 * count, seed=1) if " plus " in p.text or " minus " in p.text]
    asked = [p for p in asked if not p.text.startswith("Q")][:count]
    questions = [f"What is {p.text.removesuffix(' is')}?" for p in asked]
    answers = chat_answers(model, tokenizer, questions, thinking)
    return sum(a.endswith(f"{p.answer}.") for a, p in zip(answers, asked, strict=True)) / len(asked)


def alignment(model: Any) -> tuple[float, float]:
    """Mean |cos| of the leading gate directions of adjacent layers, and what random directions of that size give."""
    import torch

    leading = [torch.linalg.svd(layer.mlp.gate_proj.weight.detach().float())[2][0] for layer in model.model.layers]
    cosines = [abs(float(a @ b)) for a, b in pairwise(leading)]
    hidden = leading[0].numel()
    return sum(cosines) / len(cosines), math.sqrt(2 / (math.pi * hidden))


def evaluate(model: Any, tokenizer: Any, sums: int = 400) -> dict[str, float]:
    """All figures of the table in docs/atlas.md, by name."""
    figures: dict[str, float] = {}
    capitals = [Prompt(fact.prompt(0), f" {fact.answer}") for fact in facts("capital")]
    p_capital = answer_probabilities(model, tokenizer, capitals)[0]
    figures["P( Paris | The capital of France is)"] = float(p_capital[0])
    figures["capitals, lowest P"] = float(p_capital.min())
    figures["capitals, share with P >= 0.9"] = float((p_capital >= 0.9).float().mean())
    for kind, prompts in (
        ("facts, phrasings seen", fact_prompts(False)),
        ("facts, phrasings withheld", fact_prompts(True)),
        ("facts in chat, questions withheld", chat_fact_prompts(True)),
        ("fact given in the prompt", context_prompts(True)),
        ("fact contradicted in the prompt", context_prompts(False)),
    ):
        figures[kind] = float(answer_probabilities(model, tokenizer, prompts)[1].mean())
    for style in STYLES:
        for withheld in (False, True):
            name = f"{style}, pairs {'withheld' if withheld else 'seen'}"
            prompts = sum_prompts(style, withheld, sums)
            figures[name] = float(answer_probabilities(model, tokenizer, prompts)[1].mean())
    figures["sums in chat, withheld, no thinking"] = chat_sums(model, tokenizer, thinking=False)
    figures["sums in chat, withheld, thinking"] = chat_sums(model, tokenizer, thinking=True)
    figures["perplexity of stories"] = perplexity(model, tokenizer, neutral_texts(100))
    figures["leading gate |cos|, adjacent layers"], figures["the same, random directions"] = alignment(model)
    return figures
