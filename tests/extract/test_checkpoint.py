from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from extract.checkpoint import open_checkpoint
from extract.layouts import find_layout
from tests.checkpoints import nest, write_checkpoint
from vindex.directory import LocalFiles
from vindex.errors import CheckpointError
from vindex.tower import read_tower


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_whole_and_in_rows(tmp_path, dtype, shards, monkeypatch):
    saved = {}
    write_checkpoint(tmp_path / "m", dtype=dtype, shards=shards, edit=saved.update)
    opened = open_checkpoint(str(tmp_path / "m"))
    monkeypatch.setattr("extract.checkpoint.ROWS_BYTES", 16 * 4 * 7)  # seven rows at a time
    for name, tensor in saved.items():
        assert opened.tensor(name).equal(tensor.float())
        if tensor.ndim == 2 and tensor.shape[1] == 16:
            pieces = list(opened.row_blocks(name))
            assert [first for first, _ in pieces] == list(range(0, len(tensor), 7))
            assert torch.cat([rows for _, rows in pieces]).equal(tensor)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
def test_families_and_their_norms(tmp_path, model_type):
    layout = find_layout(open_checkpoint(str(write_checkpoint(tmp_path / "m", model_type=model_type))))
    names = [norm.name for norm in layout.norms]
    own = ["layers.0.q_norm", "layers.0.k_norm"] if model_type == "qwen3" else []
    assert names[: 2 + len(own)] == ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", *own]
    assert names[-1] == "norm"


def drop_embeddings(tensors):
    del tensors["model.embed_tokens.weight"]


def copy_embeddings(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def rename_embeddings(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    "options, tied, unembedding, note",
    [
        ({"tied": True}, True, "model.embed_tokens.weight", None),
        ({"tied": False}, False, "lm_head.weight", None),
        ({"tied": True, "edit": copy_embeddings}, True, "model.embed_tokens.weight", None),
        ({"tied": True, "head": True}, False, "lm_head.weight", "the stored lm_head.weight is the head: config.json"),
        ({"tied": True, "edit": rename_embeddings}, True, "lm_head.weight", None),
        ({"tied": False, "head": False}, False, "model.embed_tokens.weight", "no head: lm_head.weight is not stored"),
        ({"tied": False, "head": False, "prefix": ""}, False, "embed_tokens.weight", "no head: lm_head.weight is not"),
        ({"tied": True, "prefix": ""}, True, "embed_tokens.weight", None),
    ],
    ids=[
        "tied", "untied", "tied with a stored copy", "tied with another head", "only the head is stored",
        "untied without a head", "bare model, untied", "bare model, tied",
    ],
)  # fmt: skip
def test_heads_are_told_apart_by_config_and_tensors(tmp_path, options, tied, unembedding, note):
    layout = find_layout(open_checkpoint(str(write_checkpoint(tmp_path / "m", **options))))
    assert (layout.tied, layout.unembedding) == (tied, unembedding)
    assert layout.embeddings == (unembedding if tied or (note and "no head" in note) else "model.embed_tokens.weight")
    assert [text.startswith(note) for text in layout.notes] == ([True] if note else [])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("other", ["model.language_model.", "language_model.model."])
def test_of_two_text_towers_the_one_is_read_that_transformers_loads(tmp_path, nested, other):
    """The plain one for the config of a text model, the nested one for that of a model that also sees."""

    def add(tensors):
        tensors |= {name.replace("model.", other, 1): tensor + 1 for name, tensor in tensors.items()}

    source = write_checkpoint(tmp_path / "m", model_type="qwen2", edit=add)
    if nested:
        nest(source, "qwen2_vl", "text_config")
    prefix = other if nested else "model."
    assert find_layout(open_checkpoint(str(source))).prefix == prefix == read_tower(LocalFiles(source)).prefix


@pytest.mark.parametrize(("stored", "note"), [(2, None), (3, "layer 2 is stored"), (5, "layers 2 to 4 are stored")])
def test_layers_past_those_of_the_config_are_left_out_with_a_note(tmp_path, stored, note):
    source = write_checkpoint(tmp_path / "m", layers=stored, config={"num_hidden_layers": 2})
    layout = find_layout(open_checkpoint(str(source)))
    said = f"{note} and not in config.json, which counts 2: left out"
    assert layout.num_layers == len(layout.ffns) == 2 and layout.notes == ((said,) if note else ())


@pytest.mark.parametrize("model_class", ["Qwen3", "Qwen2", "Llama", "Mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_understood(tmp_path, model_class, tied):
    import transformers

    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
    config = getattr(transformers, f"{model_class}Config")(
        vocab_size=20, hidden_size=16, intermediate_size=24, tie_word_embeddings=tied, **sizes
    )
    model = getattr(transformers, f"{model_class}ForCausalLM")(config)
    model.save_pretrained(tmp_path)
    layout = find_layout(open_checkpoint(str(tmp_path)))
    assert layout.tied is tied
    stored = layout.ffns[0].gate[0].by_neuron(open_checkpoint(str(tmp_path)))
    assert stored.equal(model.model.layers[0].mlp.gate_proj.weight.data)


def test_licence_comes_from_the_front_matter(tmp_path, checkpoint):
    assert open_checkpoint(str(checkpoint)).licence == "apache-2.0"
    bare = write_checkpoint(tmp_path / "m")
    (bare / "README.md").write_text("license: not here\n")
    assert open_checkpoint(str(bare)).licence is None


def broken(tmp_path, what):
    """A checkpoint with one thing wrong, and the message that must say so."""
    directory = write_checkpoint(tmp_path / "m", shards=2 if "shard" in what or what == "map" else 1)
    weights = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if what == "config":
        (directory / "config.json").unlink()
        return r"config\.json is missing; is m a checkpoint directory\?"
    if what == "config not JSON":
        (directory / "config.json").write_text("{")
        return r"config\.json: not valid JSON"
    if what == "config not an object":
        (directory / "config.json").write_text("[]")
        return "does not hold a JSON object"
    if what == "missing shard":
        (directory / "model-00002-of-00002.safetensors").unlink()
        return r"m: model-00002-of-00002\.safetensors is missing; the download is not complete"
    if what == "map":
        index.write_text('{"weight_map": 3}')
        return "has no usable weight_map"
    if what == "shard outside":
        index.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
        return "outside the checkpoint; refused"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return r"model\.safetensors is damaged or cut short"
    if what == "no weights":
        weights.unlink()
        return r"no model\.safetensors found"
    kinds = {
        "model.gguf": r"model\.gguf is damaged, cut short or not GGUF",
        "pytorch_model.bin": r"found PyTorch \.bin weights",
    }
    if what in kinds:
        weights.rename(directory / what)
        return kinds[what]
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    "config,config not JSON,config not an object,missing shard,map,shard outside,truncated,no weights,model.gguf,"
    "pytorch_model.bin".split(","),
)
def test_damaged_directories_are_refused_in_one_line(tmp_path, what):
    message = broken(tmp_path, what)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: qwen3, qwen2, llama, mistral"),
        ({"config": {"hidden_size": "big"}}, "hidden_size: expected a positive integer, got 'big'"),
        ({"config": {"hidden_size": 20}}, "has shape (40, 16), and config.json says (40, 20)"),
        ({"config": {"num_hidden_layers": 3}}, "tensor model.layers.2.mlp.gate_proj.weight is missing"),
        ({"tied": False, "edit": drop_embeddings}, "embed_tokens.weight is missing, and config.json does not tie it"),
        ({"dtype": torch.float64}, "is stored as F64; only BF16, F16, F32 are supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, options, message):
    directory = write_checkpoint(tmp_path / "m", **options)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        find_layout(open_checkpoint(str(directory)))


def test_float8_without_a_config_entry_is_named(tmp_path):
    def to_float8(tensors):
        name = "model.layers.0.mlp.gate_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    directory = write_checkpoint(tmp_path / "m", edit=to_float8)
    with pytest.raises(CheckpointError, match="gate_proj.weight is stored as F8_E4M3"):
        find_layout(open_checkpoint(str(directory)))


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory; give a checkpoint directory, a GGUF file, or a"):
        open_checkpoint(str(tmp_path / "nothing"))


def test_hub_failures_are_one_line_each(monkeypatch):
    import httpx2
    from huggingface_hub import errors

    response, busy = (
        httpx2.Response(code, request=httpx2.Request("GET", "https://huggingface.co")) for code in (403, 503)
    )
    cases = {
        errors.GatedRepoError("gated\nlong story", response=response): "access is gated; accept its terms",
        errors.RevisionNotFoundError("no", response=response): "there is no revision main2",
        errors.RepositoryNotFoundError("no", response=response): "no such model on the Hub",
        errors.LocalEntryNotFoundError("offline"): "not in the Hub cache, and the Hub cannot be reached",
        errors.HfHubHTTPError("no\nmore", response=response): r"download is not allowed with this token \(403\)",
        errors.HfHubHTTPError("503 busy\nmore", response=busy): r"download failed \(503 busy\); try again",
    }
    for failure, message in cases.items():

        def fail(*args, failure=failure, **kwargs):
            raise failure

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint("someone/model", "main2")
        assert "\n" not in str(caught.value)


def test_a_hub_id_opens_its_pinned_snapshot(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_checkpoint(tmp_path / commit)
    asked = {}

    def fake(repo, revision, **patterns):
        asked.update(repo=repo, revision=revision)
        return str(tmp_path / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    opened = open_checkpoint("Qwen/Qwen3-0.6B", "v1")
    assert asked == {"repo": "Qwen/Qwen3-0.6B", "revision": "v1"}
    assert (opened.model, opened.revision) == ("Qwen/Qwen3-0.6B", commit)


def test_a_hub_id_offline_says_so(monkeypatch, tmp_path):
    """The real client, told to stay offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="someone/model: no such directory, not in the Hub cache"):
        open_checkpoint("someone/model")


def test_tensor_of_another_name(checkpoint):
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        open_checkpoint(str(checkpoint)).tensor("nothing")


def hostile(what: str, whole: bytes) -> bytes:
    """A safetensors file with one thing wrong with its header."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first = next(iter(header))
    entry = header[first]
    if what == "longer header than file":
        return (1 << 40).to_bytes(8, "little") + whole[8:]
    if what == "shorter than a length":
        return whole[:5]
    if what == "not JSON":
        return whole[:8] + b"{" * length + data
    if what == "no object":
        return (2).to_bytes(8, "little") + b"[]" + data
    if what == "no shape":
        del entry["shape"]
    if what == "negative offset":
        entry["data_offsets"][0] = -4
    if what == "other size":
        entry["shape"][0] += 1
    if what == "past the end":
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["data_offsets"] = [len(data) - size + 2, len(data) + 2]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "what, message",
    {
        "longer header than file": "its header is longer than the file",
        "shorter than a length": "its header is longer than the file",
        "not JSON": "header: ",
        "no object": "header: ",
        "no shape": "header: 'shape'",
        "negative offset": r"data_offsets \[-4, ",
        "other size": "bytes for BF16 of shape",
        "past the end": "its tensors are longer than the file",
    }.items(),
)
def test_hostile_headers_are_refused_in_one_line(tmp_path, what, message):
    path = write_checkpoint(tmp_path / "m") / "model.safetensors"
    path.write_bytes(hostile(what, path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"model.safetensors is damaged or cut short \(.*{message}") as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path):
    path = write_checkpoint(tmp_path / "m") / "model.safetensors"
    opened = open_checkpoint(str(tmp_path / "m"))
    last = max(opened.tensors, key=lambda name: opened.tensors[name].start)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match="model.safetensors is cut short: it ends 4 bytes too early; download it again"
    ):
        opened.tensor(last)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read \(No such file or directory\)"):
        opened.tensor(last)


def test_an_expert_is_one_slice(tmp_path):
    stack = torch.randn(4, 6, 5).bfloat16()
    directory = write_checkpoint(tmp_path / "m", edit=lambda tensors: tensors.update(stack=stack))
    opened = open_checkpoint(str(directory))
    assert opened.tensor("stack").equal(stack.float())
    assert all(opened.expert("stack", index).equal(stack[index].float()) for index in range(4))


def test_extra_file_does_not_count_as_weights(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    save_file({"other": torch.zeros(1)}, directory / "consolidated.safetensors")
    assert open_checkpoint(str(directory)).weight_files == ("model.safetensors",)
