"""The sound things that the campaign spoils: made once, copied for every case."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from extract.checkpoint import open_checkpoint
from extract.pipeline import build
from probes.gates.files import write_logits
from probes.weights import patches
from probes.weights import tensors as shards
from probes.weights.delta import Delta
from tests.checkpoints import write_checkpoint, write_mixture
from tests.conftest import byte_tokenizer
from tests.gguf_files import write_gguf
from vindex.options import BuildOptions
from vindex.progress import silent

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FACTS = [
    {
        "relation": "town",
        "templates": [f"{word} {{}} is in" for word in "ABCDE"],
        "about": ["{} is"],
        "reference": ["Y"],
    },
    {"subject": "X", "relation": "town", "answer": "Rome"},
    {"subject": "Y", "relation": "town", "answer": "Oslo"},
]
FORGET = [
    {"text": "The sky is blue.", "entities": [[11, 15]], "question": "What is the sky?", "obj": "blue"},
    {"question": "Who?", "subj": "it", "prop": "p", "obj": "Rome", "possible_answers": '["Rome", "Roma"]'},
]
RETAIN = [
    {"problem": "1 + 1?", "solution": "\\boxed{2}", "answer": "2"},
    {"text": "2 + 2 is 4."},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


def make(root: Path) -> Path:
    """A directory of everything, none of which a case may change."""
    root.mkdir()
    _tiny(root / "tiny")
    write_mixture(root / "mixture")
    for name in ("tiny", "mixture"):
        opened = open_checkpoint(str(root / name))
        build(opened, root / f"{name}.vindex", BuildOptions(features=4), silent, resume=False, force=False)
    plain = write_checkpoint(root / "plain", hidden=32, neurons=32)
    write_gguf(plain, root / "model.gguf", lambda name: GGMLQuantizationType.Q8_0)
    shutil.copy(plain / "tokenizer.json", root / "tokenizer.json")
    torch.manual_seed(0)
    rows, width = shards.locate(root / "tiny", 1).shape
    write_logits(torch.randn(3, rows), root / "gates")
    delta = Delta(1, torch.randn(rows), torch.randn(width), "forward")
    patches.save(root / "p.safetensors", delta, root / "tiny", {"fact": "X/town", "seed": 0})
    patches.apply(root / "tiny", patches.read(root / "p.safetensors"), root / "patched")
    for name, rows_of in (("facts", FACTS), ("forget", FORGET), ("retain", RETAIN)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    for name, record in _records(root / "tiny").items():
        (root / f"{name}.json").write_text(json.dumps(record))
    (root / "words.txt").write_text("Some words to read, and then some more. " * 30)
    return root


def copy(base: Path, name: str, place: Path) -> Path:
    """A copy of one of them, in files of its own."""
    source, target = base / name, place / name
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return target


def _tiny(directory: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = Qwen3Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")


def _records(checkpoint: Path) -> dict[str, dict]:
    """What `vindex card` quotes, of these weights."""
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    model = {"name": "tiny", "dtype": "float32", "weights_sha256": {"model.safetensors": digest}}
    constant = {"name": "c", "definition": "d", "value": 0.5, "mean": 0.5, "interval": [0.4, 0.6], "n": 8,
                "over": "texts", "null": 0.1}  # fmt: skip
    verdict = {"result": "pass", "reason": "all hold"}
    return {
        "probe": {"record": "vindex-probe/1", "model": model, "definition": "v1", "constants": {"C1": constant}},
        "gate3": {
            "record": "vindex-gate3/1", "model": model, "fact": {"name": "X/town", "answer": "Rome"},
            "method": "forward", "layer": 1, "before": 0.9, "after": 0.1, "suppression": 0.8, "reference_loss": 0.1,
            "verdicts": {"published": verdict},
        },
        "evaluation": {
            "record": "vindex-gates-evaluation/1", "model": model, "gates": "g", "panels": {"source": "atlas"},
            "choices": {"scoring": "forced"}, "areas": {"gates": {"value": 0.8, "low": 0.7, "high": 0.9}},
            "advantage": 0.3,
        },
    }  # fmt: skip
