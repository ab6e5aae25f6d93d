"""Which tensors are the model's: the extractor and live models take those that transformers takes, or say why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vindex
from extract.checkpoint import open_checkpoint
from extract.layouts import find_layout
from probes.live.load import load, require_head
from probes.live.sites import weight
from probes.suite.run import constants
from probes.weights import patches
from probes.weights.bake import bake
from probes.weights.delta import Delta
from tests.conftest import build_quietly
from vindex.errors import CheckpointError, ProbeError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"


def change(directory: Path, edit) -> dict[str, torch.Tensor]:
    """Save the tensors again as `edit` returns them."""
    tensors = edit(load_file(directory / SINGLE))
    save_file(tensors, directory / SINGLE)
    return tensors


def configure(directory: Path, **settings) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def shard(directory: Path, tensors, names=("model-1.safetensors", "model-2.safetensors")) -> None:
    """Write tensors into two shards and an index of them."""
    half = len(tensors) // 2
    parts = dict(zip(names, (dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])), strict=True))
    for name, part in parts.items():
        save_file(part, directory / name)
    listed = {tensor: name for name, part in parts.items() for tensor in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def gates(directory: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One gate_proj as transformers alone loads it, as the probes load it, and as the extractor reads it."""
    opened = open_checkpoint(str(directory))
    live = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return (
        live.model.layers[1].mlp.gate_proj.weight.detach(),
        weight(load(directory, device="cpu", dtype="float32").model, "gate_proj", 1).detach(),
        opened.tensor(find_layout(opened).ffns[1].gate[0].tensor),
    )


def negated(tensors):
    return {name: -tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("other", [INDEX, "model_old.safetensors", "model.safetensors-old", "model_zz.safetensors"])
def test_one_file_is_the_model_whatever_stands_beside_it(model, other):
    own = load_file(model / SINGLE)
    if other == INDEX:
        shard(model, negated(own))
    else:
        save_file(negated(own), model / other)
    assert all(torch.equal(found, own[GATE]) for found in gates(model))
    assert open_checkpoint(str(model)).weight_files == (SINGLE,)


@pytest.mark.parametrize(
    "names", [("model_old.safetensors", "model_zz.safetensors"), ("zz.safetensors", "a.safetensors")]
)
def test_the_shards_of_an_index_are_the_model_whatever_they_are_called(model, names):
    own = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    shard(model, own, names)
    save_file(negated(own), model / "model-9.safetensors")
    assert all(torch.equal(found, own[GATE]) for found in gates(model))


def test_the_file_that_the_config_names_is_the_model(model):
    own = load_file(model / SINGLE)
    save_file(negated(own), model / "other.safetensors")
    configure(model, transformers_weights="other.safetensors")
    assert all(torch.equal(found, -own[GATE]) for found in gates(model))
    configure(model, transformers_weights=["other.safetensors"])
    both_refuse(model, "transformers_weights is .*; expected a safetensors file or its index")


def both_refuse(directory: Path, message: str) -> None:
    """The extractor and the probes refuse a directory with one and the same line."""
    for attempt in (lambda: find_layout(open_checkpoint(str(directory))), lambda: load(directory, device="cpu")):
        with pytest.raises(CheckpointError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_names_both(model):
    own = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    shard(model, own, ("model_old.safetensors", "model_zz.safetensors"))
    save_file({GATE: own[GATE], **load_file(model / "model_old.safetensors")}, model / "model_old.safetensors")
    save_file({GATE: own[GATE], **load_file(model / "model_zz.safetensors")}, model / "model_zz.safetensors")
    both_refuse(model, f"tensor {GATE} stands in model_old.safetensors and model_zz.safetensors")


def test_shards_without_their_index_and_an_index_that_lists_what_is_not_there(model):
    own = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    shard(model, own)
    listed = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps({"weight_map": listed["weight_map"] | {"lost": "model-1.safetensors"}}))
    both_refuse(model, f"model-1.safetensors does not hold lost, which {INDEX} lists there")
    (model / INDEX).unlink()
    both_refuse(model, f"has model-1.safetensors, and neither {SINGLE} nor {INDEX}")


@pytest.mark.parametrize(
    ("wrapper", "what"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DDP"),
        ("base_model.model.", "PEFT"),
        ("model._orig_mod.", "compile"),
    ],
)
def test_names_that_a_wrapper_left_are_told(model, wrapper, what):
    change(model, lambda tensors: {f"{wrapper}{name}": tensor for name, tensor in tensors.items()})
    both_refuse(model, f"the tensors' names hold .*{what} puts there; save the model it wraps")


def test_a_lost_layer_and_a_lost_tensor_are_told(model):
    change(model, lambda tensors: {name: t for name, t in tensors.items() if ".layers.2." not in name})
    with pytest.raises(CheckpointError, match=r"config.json says 3 layers, and no tensor of model.layers.2 is stored"):
        load(model, device="cpu")
    configure(model, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="num_hidden_layers: expected at most 16384, got 1000000000"):
        load(model, device="cpu")
    configure(model, num_hidden_layers=2, layer_types=None)
    change(model, lambda tensors: {name: t for name, t in tensors.items() if "layers.1.self_attn.q_norm" not in name})
    with pytest.raises(
        CheckpointError, match=r"1 tensor\(s\) of the model are not stored, first model.layers.1.self_attn"
    ):
        load(model, device="cpu")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_norm.weight"])
def test_patches_and_baking_refuse_a_checkpoint_that_lacks_a_tensor(model, tmp_path, lost):
    patch = Delta(0, torch.ones(48), torch.ones(32), "forward")
    patches.save(tmp_path / "p.safetensors", patch, model, {})
    change(model, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    for attempt in (
        lambda: patches.apply(model, patches.read(tmp_path / "p.safetensors"), tmp_path / "out"),
        lambda: patches.save(tmp_path / "q.safetensors", patch, model, {}),
        lambda: bake(model, torch.ones(3, 48, dtype=torch.bool), tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=f"{lost} is not stored, and other layers have theirs"):
            attempt()
    assert not (tmp_path / "out").exists()


def with_head(tensors):
    embeddings = tensors["model.embed_tokens.weight"]
    return tensors | {"lm_head.weight": embeddings.flip(0).contiguous()}


def test_a_stored_head_is_used_where_the_config_ties_it(model, tmp_path):
    change(model, with_head)
    live = load(model, device="cpu", dtype="float32").model
    build_quietly(model, tmp_path / "v.vindex")
    v = vindex.open(tmp_path / "v.vindex")
    assert v.manifest.notes is not None and "the stored lm_head.weight is the head" in v.manifest.notes[0]
    assert (v.index.projection.down_meta, v.index.projection.tied) == ("lm_head", False)
    direction = torch.tensor(v.down[1][0].astype("float32"))
    logits = live.lm_head.weight @ (live.model.norm.weight * direction)
    best = [token.token_id for token in v.feature(1, 0).writes]
    assert best == logits.topk(10).indices.tolist()


def test_a_stored_head_that_equals_the_embeddings_is_tied(model, tmp_path):
    change(model, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    build_quietly(model, tmp_path / "v.vindex")
    v = vindex.open(tmp_path / "v.vindex")
    assert (v.index.projection.down_meta, v.index.projection.tied, v.manifest.notes) == ("embed_tokens", True, None)


def test_a_head_that_is_stored_alone_is_the_embeddings_too(model, tmp_path):
    own = load_file(model / SINGLE)["model.embed_tokens.weight"]
    change(model, lambda t: {n.replace("model.embed_tokens", "lm_head"): tensor for n, tensor in t.items()})
    build_quietly(model, tmp_path / "v.vindex")
    assert torch.equal(
        torch.tensor(vindex.open(tmp_path / "v.vindex").embeddings.astype("float32")), own.half().float()
    )
    assert torch.equal(load(model, device="cpu", dtype="float32").model.model.embed_tokens.weight, own)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_model_without_a_head_is_built_and_refused_where_a_head_is_needed(model, tmp_path, prefix):
    change(model, lambda tensors: {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()})
    configure(model, tie_word_embeddings=False)
    build_quietly(model, tmp_path / "v.vindex")
    v = vindex.open(tmp_path / "v.vindex")
    assert (v.index.projection.down_meta, v.index.projection.tied) == ("embed_tokens", False)
    assert v.manifest.notes == ("no head: lm_head.weight is not stored, the embeddings stand in for it",)
    loaded = load(model, device="cpu")
    assert not loaded.head
    with pytest.raises(ProbeError, match="tiny-qwen3: no head is stored"):
        require_head(loaded)
    first, second = (constants(loaded, texts=["factual"]).record() for _ in range(2))
    assert first["constants"] == second["constants"]
    assert first["constants"]["C2"]["value"] is None and first["constants"]["C2"]["n"] == 0
    assert set(first["layers"][0]["top_mass"]) == {None} and first["model"]["head"] is False
    assert first["constants"]["C1"]["value"] is not None


def test_an_adapter_alone_is_told_and_beside_a_model_it_is_left_out(model, monkeypatch):
    own = load_file(model / SINGLE)
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/base", "peft_type": "LORA"})
    )
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, model / "adapter_model.safetensors")
    for place in ("transformers.models.auto.auto_factory", "transformers.integrations.peft"):
        monkeypatch.setattr(f"{place}.is_peft_available", lambda: True)  # where it is, transformers loads the adapter
    loaded = load(model, device="cpu", dtype="float32")
    assert torch.equal(weight(loaded.model, "gate_proj", 1), own[GATE])
    assert loaded.notes == open_checkpoint(str(model)).notes
    assert "the model without the adapter beside it (adapter_config.json)" in loaded.notes[0]
    (model / SINGLE).unlink()
    both_refuse(model, "is a LoRA adapter of someone/base and not a model; merge it first")
    (model / "config.json").unlink()
    both_refuse(model, "is a LoRA adapter of someone/base and not a model; merge it first")


def test_an_adapter_among_the_tensors_is_told(model):
    change(model, lambda tensors: tensors | {"model.layers.0.mlp.gate_proj.lora_A.weight": torch.ones(2, 2)})
    notes = load(model, device="cpu").notes
    assert notes == open_checkpoint(str(model)).notes
    assert notes[0].startswith("the model without the adapter among its tensors (lora_A, lora_B); merge it")


@pytest.mark.parametrize(
    "attempt", [lambda d: open_checkpoint(d), lambda d: load(d, device="cpu")], ids=["build", "probe"]
)
def test_a_git_lfs_pointer_is_told(model, attempt):
    (model / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 2080000\n"
    )
    with pytest.raises(
        CheckpointError, match=r"tiny-qwen3: model.safetensors is a git-lfs pointer.*run `git lfs pull`"
    ):
        attempt(str(model))


def into_cache(model: Path, tmp_path: Path) -> Path:
    """The model as the Hub's cache holds it: links to blobs."""
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / "0123456789abcdef"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    return snapshot


def test_a_path_into_the_hubs_cache_is_its_repository_at_that_commit(model, tmp_path):
    snapshot = into_cache(model, tmp_path)
    opened, loaded = open_checkpoint(str(snapshot)), load(snapshot, device="cpu")
    assert (opened.model, opened.revision) == (loaded.name, loaded.revision) == ("someone/small", "0123456789abcdef")


@pytest.mark.parametrize("lost", [SINGLE, "config.json"])
def test_a_link_to_nothing_in_the_cache_names_repository_and_file(model, tmp_path, lost):
    snapshot = into_cache(model, tmp_path)
    (snapshot / lost).resolve().unlink()
    both_refuse(snapshot, f"^someone/small: {lost} is a link to nothing; .* run `hf download someone/small` again")


def test_a_revision_of_what_is_on_disk_is_refused(model):
    for attempt in (lambda: open_checkpoint(str(model), "main"), lambda: load(model, device="cpu", revision="main")):
        with pytest.raises(
            CheckpointError, match="--revision main chooses among the commits of a Hub model, and this is on"
        ):
            attempt()


def damage(directory: Path, what: str) -> str:
    """Damage the header of the weights; returns what must be said."""
    path = directory / SINGLE
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )[:2]
    message = ""
    if what == "overlap":
        header[second]["data_offsets"] = [o - 2 for o in header[second]["data_offsets"]]
        message = f"{second} overlaps the tensor before it"
    if what == "hole":
        del header[first]
        message = f"{second} leaves a hole before it"
    if what == "trailing bytes":
        data += b"more"
        message = "4 bytes after its last tensor"
    text = json.dumps(header)
    if what == "twice":
        text = text[:-1] + f', "{first}": {json.dumps(header[first])}' + "}"
        message = f"{first} stands twice"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    return message


@pytest.mark.parametrize("what", ["overlap", "hole", "trailing bytes", "twice"])
def test_files_that_are_not_just_what_their_header_says_are_refused(model, what):
    both_refuse(model, f"model.safetensors is damaged or cut short .*{damage(model, what)}")
