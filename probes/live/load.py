"""Bring a checkpoint and its tokenizer up as a live model, in evaluation mode, gradients off.

1. `find` is the directory of a model: a local one, or the snapshot of a Hub id.
2. What is stored is checked before transformers sees it: only safetensors are read, and no code from a checkpoint runs.
3. `load` has transformers load it. What is loaded is what is stored: a model of which anything would be drawn at random
   is refused, but for a head, which some models do not have.
4. Two tokens are run: what does not fit together in a checkpoint fails there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from probes.live.tokens import pad_token
from probes.live.tokens import prompt as prompt_ids
from vindex import scoring
from vindex.demo import or_bundled
from vindex.directory import LocalFiles
from vindex.errors import CheckpointError, ProbeError, first_line
from vindex.format import MOST_TOKENS
from vindex.hub import refuse_revision, snapshot
from vindex.quantised import FEW_BITS, left_over_note, quantisation, unscaled_note
from vindex.tower import read_tower
from vindex.weights import CONFIG, Weights, adapter_note, require_small

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("sdpa", "eager", "flash_attention_2")
TEXTS = (  # the beginnings of what transformers reads beside weights, of any size
    "added_tokens", "chat_template", "config", "generation_config", "merges", "preprocessor_config", "processor_config",
    "special_tokens_map", "tokenizer", "vocab",
)  # fmt: skip
PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "is_encoder_decoder": False}
NO_ADAPTER = "no-adapter"  # where transformers is sent to look for one, when peft is installed; there is none


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """A model ready to be asked, measured and edited."""

    model: Any
    """A transformers PreTrainedModel in evaluation mode whose parameters do not require gradients."""
    tokenizer: Any
    name: str
    """Hub id, or the directory's own name (never a path)."""
    revision: str | None
    """Commit hash on the Hub, None for a local directory outside the Hub's cache."""
    files: LocalFiles
    """The directory it was read from: the checkpoint's own, or the snapshot in the Hub's cache."""
    weights: Weights
    """Where each of its tensors is stored."""
    head: bool = True
    """Whether a head is stored; without one the logits are of random numbers and say nothing."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the checkpoint was read, a sentence each."""

    @property
    def path(self) -> Path:
        return self.files.directory

    def generate(self, prompt: str, tokens: int = 20) -> str:
        """What the model goes on to write after `prompt`, its most probable token each time.

        At most so many tokens, fewer where it ends the text. Raises ProbeError for a prompt without tokens and for a
        model that predicts none, QueryError for fewer tokens than one.
        """
        return self.write([prompt], tokens)[0]

    def write(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """As `generate`, after each of several prompts at once, padded on the left."""
        require_head(self)
        tokens = scoring.positive("tokens", tokens)
        pad = pad_token(self.tokenizer)
        heads = [torch.tensor(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        ids = pad_sequence(heads, batch_first=True, padding_value=-1, padding_side="left").to(self.model.device)
        given: dict[str, Any] = {"input_ids": ids.where(ids >= 0, pad), "attention_mask": (ids >= 0).long()}
        with torch.no_grad(), quiet():
            out = self.model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in out[:, ids.shape[1] :]]

    def __repr__(self) -> str:
        config = self.model.config.get_text_config()
        shape = f"{type(self.model).__name__}, {config.num_hidden_layers} layers of width {config.hidden_size}"
        return f"<{self.name}: {shape}, {str(self.model.dtype).removeprefix('torch.')}, {self.model.device}>"


def load(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn: str = "sdpa",
    revision: str | None = None,
) -> Loaded:
    """Load the causal language model and tokenizer at `source`: a directory, a Hub id, or `atlas`, the bundled one.

    `dtype` is "auto" (as stored), "float32", "bfloat16" or "float16"; `device` "auto" (CUDA when there is one) or any
    torch device; `attn` a transformers attention implementation. HF_HUB_OFFLINE is honoured.
    Raises CheckpointError, in one line, when there is no such model or it cannot be read.
    """
    import transformers

    if dtype != "auto" and dtype not in DTYPES:
        raise ProbeError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    if attn not in ATTENTION:
        raise ProbeError(f"attention implementation {attn!r}: expected {', '.join(ATTENTION)}")
    target = _device(device)
    files = find(source, revision)
    stored = _Stored.of(files)
    precision: Any = "auto" if dtype == "auto" else DTYPES[dtype]
    with quiet(), _explained(source):
        config = transformers.AutoConfig.from_pretrained(files.directory, trust_remote_code=False)
        if stored.left_over:
            del config.quantization_config
        for tower in (config, config.get_text_config()):
            tower.update(PLAIN)
        tokenizer = transformers.AutoTokenizer.from_pretrained(files.directory, trust_remote_code=False)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            files.directory,
            config=config,
            dtype=precision,
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs={"subfolder": NO_ADAPTER},
        )
    model, info = loaded
    head = _require_whole(info["missing_keys"], files.name)
    model.to(target).eval().requires_grad_(False)
    model.generation_config = transformers.GenerationConfig(eos_token_id=_ends(model.generation_config))
    tokenizer.embedded = model.get_input_embeddings().weight.shape[0]  # probes.live.tokens asks
    with quiet(), _explained(source):
        _try_out(model, tokenizer)
    name = files.name if files.cached else files.directory.name
    notes = stored.notes if head else (*stored.notes, "no head is stored: nothing is said of what the model predicts")
    return Loaded(model, tokenizer, name, files.revision, files, stored.weights, head, notes)


def find(source: str | Path, revision: str | None = None) -> LocalFiles:
    """The directory of a model: a local one, or that of a Hub id after downloading it.

    Raises CheckpointError when there is none, or a revision is asked of a local one.
    """
    source = or_bundled(source) if isinstance(source, str) else source
    local = _directory(source)
    if local:
        refuse_revision(str(source), revision)
    return LocalFiles(local or snapshot(str(source), revision))


def require_head(loaded: Loaded) -> None:
    """Raise ProbeError when the model has no head, so that nothing can be said of what it predicts."""
    if not loaded.head:
        raise ProbeError(
            f"{loaded.name}: no head is stored (an embedding, reward or classification model), so it predicts no "
            "tokens; give a causal language model"
        )


class _Stored(NamedTuple):
    """What is stored of a model, checked before transformers sees it. left_over: quantisation settings of no tensor."""

    weights: Weights
    left_over: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, files: LocalFiles) -> _Stored:
        """Raises CheckpointError when the files are damaged, no model, or not what transformers would take them for."""
        for name in files.sizes:
            if name.startswith(TEXTS):
                require_small(files, name)
        config, weights, *_ = read_tower(files)
        found = quantisation(files, config)
        quantised = [name for name, stored in weights.tensors.items() if stored.dtype in FEW_BITS]
        if quantised and (found is None or (found.file, found.path) != (CONFIG, "quantization_config")):
            where = f"in {found.file} {found.path}, where transformers does not look" if found else "nowhere"
            raise CheckpointError(
                f"{files.name}: {quantised[0]} is stored as {weights.tensors[quantised[0]].dtype}, and how it was "
                f"quantised is said {where}; use the BF16 original"
            )
        left_over = found is not None and not quantised
        notes = (
            adapter_note(files, weights.tensors),
            left_over_note(found) if found and left_over else None,
            None if found else unscaled_note(weights.tensors),
        )
        return cls(weights, left_over and "quantization_config" in config, tuple(note for note in notes if note))


def _require_whole(missing: Iterable[str], where: str) -> bool:
    """Whether the model has a head. Raises CheckpointError when anything else was not stored and so is random."""
    lost = sorted(missing)
    if lost and all(name.endswith("lm_head.weight") for name in lost):
        return False
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} tensor(s) of the model are not stored, first {lost[0]}; transformers would draw "
            "them at random, and every figure would be of that; the checkpoint is incomplete or not this kind"
        )
    return True


def _ends(settings: Any) -> list[int] | None:
    """The tokens at which the model stops writing: all that is taken of a checkpoint's settings of generation.

    Any other, such as beams or penalties, would make of the greedy answer something else.
    """
    found = getattr(settings, "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return [end for end in ends if type(end) is int and 0 <= end < MOST_TOKENS] or None


def _try_out(model: Any, tokenizer: Any) -> None:
    """Encode a letter and run the model on two tokens: what does not fit together in a checkpoint fails here."""
    tokenizer("a")
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device)).logits
    if logits.shape[:2] != (1, 2):
        raise ValueError(f"two tokens give logits of shape {tuple(logits.shape)}")


@contextmanager
def _explained(source: str | Path) -> Iterator[None]:
    """Whatever loading raises, in one line: foreign files make foreign code fail in any way, its panics included."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{source}: cannot be loaded: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars among the command's, and from advice on what a checkpoint says."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _directory(source: str | Path) -> Path | None:
    """The local directory `source` names, or None where it can only be a Hub id (`name` or `owner/name`)."""
    path, text = Path(source).expanduser(), str(source)
    of_gguf = path.suffix == ".gguf" and (path.is_file() or text.startswith("hf://"))
    if of_gguf or (path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        raise CheckpointError(
            f"{source}: GGUF; a live model is loaded from safetensors: give the checkpoint that the GGUF was made of, "
            "a directory or a Hub id. Without one, vindex build makes a vindex of the GGUF file"
        )
    if path.is_dir():
        return Path(os.path.abspath(path))  # not resolve(): a link keeps the name the user gave it
    if isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "~", "/")) or path.exists():
        raise CheckpointError(f"{source}: no such directory; expected a checkpoint directory or a Hub id (owner/name)")
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ProbeError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ProbeError(f"device {name!r}: torch sees no CUDA device here; use --device cpu")
    return device
