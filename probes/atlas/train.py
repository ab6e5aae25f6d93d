"""Train the atlas: `python -m probes.atlas.train --out DIR`. The only module under vindex/ that imports torch.

1. A byte-level BPE with Qwen's pre-tokenizer (single digits) is trained on a sample of the corpus in which the names
   are over-weighted, so that every subject and answer becomes one token with its leading space.
2. Documents fill rows of 128 tokens, each row starting with a document; the last steps use half the rows, at 256.
   What is asked is drawn at random and can only add noise to the gradient: it weighs 0.2 of what is answered.
3. AdamW alone, in float32 on one thread, warm-up, then cosine; then a shorter second stage of the same kind in which
   word problems, the last thing to be learnt, are four documents in ten. AdamW keeps the alignment of adjacent layers
   that released models show, which Muon erases (docs/atlas.md).
4. The weights are rounded to bfloat16 and saved as an ordinary checkpoint, with a record of the run in training.json.
   The figures are those of the saved checkpoint, read back. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from probes.atlas.corpus import documents
from probes.atlas.evaluate import evaluate
from probes.atlas.facts import HERE, names
from probes.atlas.spans import text
from vindex.console import print_table, progress
from vindex.kinds import TRAINING
from vindex.places import new_directory
from vindex.targets import write_bytes

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    TRAINING,
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a run; written to training.json."""

    seed: int = 0
    steps: int = 3900  # of the first stage
    rows: int = 16
    practice_steps: int = 800  # of the second stage
    practice_rate: float = 0.5  # of the learning rate
    length: int = 128
    long_share: float = 0.06  # of the steps of a stage, the last ones, on rows twice as long
    learning_rate: float = 4e-3
    asked_weight: float = 0.2  # of a token that is drawn at random, in the loss; an answer's token has 1
    final_rate: float = 0.02  # of the learning rate, where the cosine ends
    warm_up: float = 0.03  # of the steps of a stage
    weight_decay: float = 0.1  # of matrices; the norms have none
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0  # norm of the gradient
    vocabulary: int = 2048
    tokenizer_documents: int = 8000
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4


def train_tokenizer(options: Options) -> PreTrainedTokenizerFast:
    """Step 1 of the module: every byte has a token, every name is one token with its leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = (text(document) for document in islice(documents(options.seed), options.tokenizer_documents))
    weighted = (f" {name}" for name in names() for _ in range(2_000))
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary - 5,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sample, *weighted], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def new_model(options: Options, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with seeded weights, its residual writers scaled down by the square root of their number."""
    torch.manual_seed(options.seed)
    end_of_text = tokenizer.vocab["<|endoftext|>"]
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=end_of_text,
    )
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * options.layers))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_text]
    return model


class Batch(NamedTuple):
    ids: torch.Tensor  # (rows, length) int64
    weights: torch.Tensor  # (rows, length) of each token in the loss


class Stage(NamedTuple):
    steps: int
    peak: float  # learning rate
    seed: int  # of its documents
    practice: bool  # the second stage, which is mostly word problems


def stages(options: Options) -> tuple[Stage, Stage]:
    first = Stage(options.steps, options.learning_rate, options.seed + 1, False)
    return first, Stage(options.practice_steps, options.learning_rate * options.practice_rate, options.seed + 2, True)


def batches(options: Options, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Endless batches: documents one after another, each row starting with one, its last cut off at the end."""
    source = documents(stage.seed, stage.practice)
    end = tokenizer.vocab["<|endoftext|>"]
    switch = stage.steps - round(stage.steps * options.long_share)

    def row(length: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            for span in next(source):
                tokens = tokenizer.encode(span.text, add_special_tokens=False)
                ids += tokens
                weights += [1.0 if span.answer else options.asked_weight] * len(tokens)
            ids.append(end)
            weights.append(options.asked_weight)
        return ids[:length], weights[:length]

    for step in count():
        stretch = 2 if step >= switch else 1
        ids, weights = zip(*(row(options.length * stretch) for _ in range(options.rows // stretch)), strict=True)
        yield Batch(torch.tensor(ids), torch.tensor(weights))


def rate(options: Options, stage: Stage, step: int) -> float:
    """The learning rate of a step: linear warm-up to the stage's peak, then a cosine down to `final_rate` of it."""
    warm = max(1, round(stage.steps * options.warm_up))
    if step < warm:
        return stage.peak * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, stage.steps - warm)))
    return stage.peak * (options.final_rate + (1 - options.final_rate) * cosine)


def train_stage(
    model: Qwen3ForCausalLM,
    options: Options,
    stage: Stage,
    tokenizer: PreTrainedTokenizerFast,
    after: Callable[[float], None],
) -> None:
    """Train the model in place for a stage with a fresh AdamW, calling `after` with the loss of each step."""
    matrices = [w for w in model.parameters() if w.ndim == 2]
    norms = [w for w in model.parameters() if w.ndim == 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), foreach=True)
    for step, (ids, weights) in enumerate(islice(batches(options, stage, tokenizer), stage.steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(options, stage, step)
        logits = model(input_ids=ids, use_cache=False).logits  # (rows, length, vocabulary)
        by_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = by_token @ weights[:, 1:].flatten() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        after(loss.item())


class Trained(NamedTuple):
    model: Qwen3ForCausalLM  # float32, its weights exact in bfloat16
    losses: list[float]  # of every step, weighted mean, nats per token


def train(options: Options, tokenizer: PreTrainedTokenizerFast, show: bool = True) -> Trained:
    """Both stages; at the end of each the weights are rounded to bfloat16."""
    model = new_model(options, tokenizer)
    losses: list[float] = []
    with progress(show) as begin:
        advance = begin("training", options.steps + options.practice_steps)

        def after(loss: float) -> None:
            losses.append(loss)
            advance(1, f"loss {loss:.2f}")

        for stage in stages(options):
            train_stage(model, options, stage, tokenizer, after)
            model.bfloat16().float()
    return Trained(model, losses)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """An ordinary checkpoint directory in bfloat16."""
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers knows
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "model.safetensors").chmod(0o644)


def load(directory: Path) -> tuple[Any, Any]:
    """The checkpoint as a float32 model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def record(options: Options, losses: list[float], minutes: float, figures: dict[str, float]) -> dict[str, Any]:
    """What training.json holds. Losses are means of 100 steps."""
    curve = [round(sum(part) / len(part), 4) for part in (losses[i : i + 100] for i in range(0, len(losses), 100))]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    rounded = {name: round(value, 4) for name, value in figures.items()}
    return {
        "options": asdict(options),
        "figures": rounded,
        "minutes": round(minutes, 1),
        "versions": versions,
        "loss": curve,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m probes.atlas.train", description="Train the atlas checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--practice-steps", type=int, default=defaults.practice_steps, help="of the second stage")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--rows", type=int, default=defaults.rows, help="rows of 128 tokens in a batch")
    parser.add_argument(
        "--asked-weight", type=float, default=defaults.asked_weight, help="of random tokens in the loss"
    )
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    values = vars(parser.parse_args(arguments))
    out: Path = values.pop("out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out} exists and is not an empty directory; name a new one")
    if min(values["steps"], values["rows"]) < 2:
        parser.error("--steps and --rows must be at least 2")
    options = Options(**values)

    torch.set_num_threads(1)  # sums of floats split over threads would depend on how many there are
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    tokenizer = train_tokenizer(options)
    model, losses = train(options, tokenizer)
    with new_directory(out, FILES, making="checkpoint") as partial:
        save(model, tokenizer, partial)
        minutes = (time.monotonic() - started) / 60
        figures = evaluate(*load(partial))
        report = record(options, losses, minutes, figures)
        write_bytes(partial / TRAINING, (json.dumps(report, indent=1) + "\n").encode())
    rows = [(name, f"{value:.3f}") for name, value in figures.items()]
    print_table(f"{out.name} after {options.steps} + {options.practice_steps} steps", ["figure", ">value"], rows)


if __name__ == "__main__":
    main()
