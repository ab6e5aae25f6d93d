"""Patches as files: what is written is what was measured, and what is reverted is what was there, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from probes.live.hooks import patched, same_bits
from probes.live.load import load
from probes.live.sites import weight
from probes.weights import patches
from probes.weights import tensors as shards
from probes.weights.bake import bake
from probes.weights.delta import Delta
from tests.probes.test_command import run
from vindex.demo import CHECKPOINT
from vindex.errors import PatchError, TargetError

LAYER = 1


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The atlas in several shards, as large models come."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("sharded") / "atlas"
    AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="auto").save_pretrained(directory, max_shard_size="600KB")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


@pytest.fixture
def delta() -> Delta:
    torch.manual_seed(0)
    rows, width = shards.locate(CHECKPOINT, LAYER).shape
    return Delta(LAYER, torch.randn(rows) * 0.1, torch.randn(width), "forward")


@pytest.fixture(params=["single", "sharded"])
def checkpoint(request, sharded) -> Path:
    return CHECKPOINT if request.param == "single" else sharded


@pytest.fixture
def saved(checkpoint, delta, tmp_path) -> Path:
    path = tmp_path / "patch.safetensors"
    patches.save(path, delta, checkpoint, {"fact": "France/capital"})
    return path


def test_a_patch_reads_back_as_it_was_saved(saved, delta):
    patch = patches.read(saved)
    assert same_bits(patch.delta.gate_write, delta.gate_write)
    assert same_bits(patch.delta.gate_read, delta.gate_read)
    assert (patch.delta.layer, patch.delta.method, patch.provenance) == (LAYER, "forward", {"fact": "France/capital"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_saved_checkpoint_is_the_patched_model(checkpoint, saved, delta, tmp_path, dtype):
    """Same logits, bit for bit, in the dtype it is stored in and in float32."""
    out = patches.apply(checkpoint, saved, tmp_path / "out")
    original, written = load(checkpoint, dtype=dtype, device="cpu"), load(out, dtype=dtype, device="cpu")
    ids = torch.arange(40)[None]
    with torch.no_grad(), patched(original.model, delta.edits(patches.stored_dtype(checkpoint, LAYER))):
        assert same_bits(weight(original.model, "gate_proj", LAYER), weight(written.model, "gate_proj", LAYER))
        assert same_bits(original.model(ids).logits, written.model(ids).logits)
    with torch.no_grad():
        assert not same_bits(original.model(ids).logits, written.model(ids).logits)


def test_only_the_patched_tensor_differs_and_the_base_is_untouched(checkpoint, saved, tmp_path):
    before = digests(checkpoint)
    patch = patches.read(saved)
    out = patches.apply(checkpoint, patch, tmp_path / "out")
    old, new = tensors(checkpoint), tensors(out)
    assert [name for name in old if not same_bits(old[name], new[name])] == [patch.tensor]
    assert digests(checkpoint) == before
    shard = shards.locate(checkpoint, LAYER).file.name
    changed = {name for name, digest in digests(out).items() if before.get(name) != digest}
    assert changed == {shard, f"{patches.HISTORY}/0000.safetensors"}


def test_revert_restores_the_original_file_hashes(checkpoint, saved, tmp_path):
    out = patches.apply(checkpoint, patches.read(saved), tmp_path / "out")
    beside = patches.revert(out, tmp_path / "beside")
    assert digests(beside) == digests(checkpoint)
    assert digests(out) != digests(checkpoint)
    patches.revert(out)
    assert digests(out) == digests(checkpoint)


def test_patches_in_two_layers_revert_one_after_the_other(checkpoint, saved, delta, tmp_path):
    one = patches.apply(checkpoint, patches.read(saved), tmp_path / "one")
    second = tmp_path / "second.safetensors"
    patches.save(second, Delta(2, delta.gate_write, delta.gate_read, "forward"), one, {})
    two = patches.apply(one, patches.read(second), tmp_path / "two")
    patches.revert(two)
    assert digests(two) == digests(one)
    patches.revert(two)
    assert digests(two) == digests(checkpoint)


def test_other_weights_are_refused_and_so_is_a_second_application(checkpoint, saved, tmp_path):
    patch = patches.read(saved)
    out = patches.apply(checkpoint, patch, tmp_path / "out")
    with pytest.raises(PatchError, match="other weights, or already patched"):
        patches.apply(out, patch, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "again.partial").exists()


def test_a_target_that_exists_is_refused(checkpoint, saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(TargetError, match="out already exists; choose another place$"):
        patches.apply(checkpoint, patches.read(saved), tmp_path / "out")


def test_a_patch_that_overflows_leaves_nothing_behind(checkpoint, delta, tmp_path):
    path = tmp_path / "huge.safetensors"
    patches.save(path, Delta(LAYER, delta.gate_write * 1e38, delta.gate_read * 10, "forward"), checkpoint, {})
    with pytest.raises(PatchError, match="not finite"):
        patches.apply(checkpoint, patches.read(path), tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"huge.safetensors"}


def test_revert_needs_a_patched_directory_that_nobody_changed(checkpoint, saved, tmp_path):
    with pytest.raises(PatchError, match="no vindex_patches/"):
        patches.revert(checkpoint)
    out = patches.apply(checkpoint, patches.read(saved), tmp_path / "out")
    place = shards.locate(out, LAYER)
    raw = bytearray(place.file.read_bytes())
    raw[-1] ^= 1 if place.stop != len(raw) else 0
    raw[place.start - 1 if place.start > 4096 else place.stop] ^= 1
    place.file.write_bytes(raw)
    with pytest.raises(PatchError, match="was changed since the patch was applied"):
        patches.revert(out)
    assert place.file.read_bytes() == raw


def _rewrite(path: Path, metadata: dict[str, str], **changed: torch.Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
        kept = {name: file.get_tensor(name) for name in file.keys()} | changed  # noqa: SIM118
    save_file({name: value for name, value in kept.items() if value is not None}, path, metadata=old | metadata)


@pytest.mark.parametrize(
    ("metadata", "changed", "message"),
    [
        ({"format": "other"}, {}, "format is 'other', expected a vindex-patch file"),
        ({"version": "2"}, {}, "version is '2', this release reads '1'"),
        ({}, {"gate_read": None}, "no tensor gate_read"),
        ({}, {"gate_read": torch.zeros(3)}, r"gate_read \(3,\) do not make the"),
        ({}, {"gate_write": torch.zeros(2, 3)}, "do not make the"),
        ({"shape": "[1]"}, {}, "do not make the"),
        ({"layer": "one"}, {}, "metadata is incomplete"),
        ({"layer": "9" * 30}, {}, "metadata is incomplete: expected a layer, tensor, dtype"),
        ({"base_sha256": ""}, {}, "no base_sha256"),
        ({"shape": "[true, 3]"}, {}, "expected a list of sizes as shape"),
        ({"provenance": "{"}, {}, "metadata is incomplete"),
        ({"provenance": "[1]"}, {}, "an object as provenance"),
        ({}, {"gate_write": torch.zeros(384, dtype=torch.complex64)}, "factors are torch.complex64"),
    ],
)
def test_a_damaged_patch_file_is_refused(checkpoint, delta, tmp_path, metadata, changed, message):
    path = tmp_path / "patch.safetensors"
    patches.save(path, delta, checkpoint, {})
    _rewrite(path, metadata, **changed)
    with pytest.raises(PatchError, match=message):
        patches.read(path)


def test_provenance_does_not_stand_in_for_what_a_patch_changes(checkpoint, delta, tmp_path, monkeypatch, capsys):
    path = tmp_path / "patch.safetensors"
    patches.save(path, delta, checkpoint, {"tensor": "another", "fact": "France/capital"})
    assert run(monkeypatch, "patch", "show", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tensor"] == patches.read(path).tensor and shown["fact"] == "France/capital"


def test_a_patch_says_of_which_tensor_it_is(checkpoint, saved, tmp_path):
    _rewrite(saved, {"tensor": "model.layers.3.mlp.gate_proj.weight"})
    with pytest.raises(PatchError, match=r"layers.1.mlp.gate_proj.weight: the patch was made for model.layers.3"):
        patches.apply(checkpoint, patches.read(saved), tmp_path / "out")


def test_revert_puts_back_only_the_bytes_that_the_patch_was_made_for(saved, tmp_path):
    """Whoever changes what a directory says was there changes its hash of the shard as well."""
    out = patches.apply(CHECKPOINT, patches.read(saved), tmp_path / "out")
    before, record = digests(out), out / patches.HISTORY / "0000.safetensors"
    with safe_open(record, framework="pt") as file:
        original = file.get_tensor("original")
    _rewrite(record, {}, original=torch.zeros_like(original))
    with pytest.raises(PatchError, match="the bytes it would put back are not those the patch was made for"):
        patches.revert(out)
    _rewrite(record, {}, original=original.float())
    with pytest.raises(PatchError, match="does not belong to"):
        patches.revert(out)
    assert digests(out) | {f"{patches.HISTORY}/0000.safetensors": ""} == before | {
        f"{patches.HISTORY}/0000.safetensors": ""
    }


def test_a_history_that_lacks_a_patch_or_leads_elsewhere_is_refused(saved, tmp_path):
    out = patches.apply(CHECKPOINT, patches.read(saved), tmp_path / "out")
    history = out / patches.HISTORY
    (history / "0000.safetensors").rename(history / "0001.safetensors")
    with pytest.raises(PatchError, match=r"expected 0000.safetensors there, a patch that was applied; it is missing"):
        patches.revert(out)
    history.rename(tmp_path / "elsewhere")
    history.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PatchError, match="vindex_patches: is a link, which is not followed"):
        patches.revert(out)


def test_a_link_out_of_a_checkpoint_is_not_copied(saved, tmp_path):
    source = shutil.copytree(CHECKPOINT, tmp_path / "source")
    (tmp_path / "secret").write_text("not yours")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    for copied in (
        lambda: patches.apply(source, patches.read(saved), tmp_path / "out"),
        lambda: bake(source, torch.ones(4, 384, dtype=torch.bool), tmp_path / "out"),
    ):
        with pytest.raises(PatchError, match=r"notes.txt: is a link out of the checkpoint, which is not copied"):
            copied()
    assert not (tmp_path / "out").exists()


def test_factors_that_are_not_finite_are_refused(checkpoint, delta, tmp_path):
    path = tmp_path / "patch.safetensors"
    patches.save(path, delta, checkpoint, {})
    _rewrite(path, {}, gate_write=torch.full_like(delta.gate_write, float("nan")))
    with pytest.raises(PatchError, match="not all finite"):
        patches.read(path)


def test_files_that_are_no_patches(tmp_path):
    with pytest.raises(PatchError, match="nowhere: no such directory; give a checkpoint directory, or atlas"):
        patches.apply(tmp_path / "nowhere", tmp_path / "p.safetensors", tmp_path / "out")
    with pytest.raises(PatchError, match="none.safetensors: cannot be read .*; expected a patch"):
        patches.read(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is text")
    with pytest.raises(PatchError, match="text.safetensors: header: not valid JSON .*; expected a patch"):
        patches.read(tmp_path / "text.safetensors")


def test_a_patch_of_another_shape_is_refused(checkpoint, saved, tiny_checkpoint, tmp_path):
    with pytest.raises(PatchError, match=r"is F32 \(48, 32\), the patch was made for .*; give the model it was"):
        patches.apply(tiny_checkpoint, patches.read(saved), tmp_path / "out")


def test_saving_a_patch_that_does_not_fit_the_checkpoint(checkpoint, tmp_path):
    with pytest.raises(PatchError, match="has shape"):
        patches.save(tmp_path / "p", Delta(LAYER, torch.zeros(3), torch.zeros(4), "forward"), checkpoint, {})
    with pytest.raises(PatchError, match=r"has no matrix model.layers.9.mlp.gate_proj.weight"):
        shards.locate(checkpoint, 9)


def test_saving_where_nothing_can_be_written(checkpoint, delta, tmp_path):
    with pytest.raises(TargetError, match="none does not exist; make it first"):
        patches.save(tmp_path / "none" / "p.safetensors", delta, checkpoint, {})


def test_weights_that_are_no_plain_floats_are_refused(delta, tmp_path):
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors = {name: torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "model.embed_tokens.weight": torch.zeros(1, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PatchError, match="stored as F8_E4M3; patches apply to F32, BF16, F16"):
        patches.stored_dtype(tmp_path, LAYER)


def test_the_patch_goes_to_the_tensor_that_transformers_loads(delta, tmp_path):
    """Beside it stand a multi-token head with the same ending, and the shards of another model with their index."""
    source = shutil.copytree(CHECKPOINT, tmp_path / "source")
    own = load_file(source / "model.safetensors")
    mtp = {"mtp.layers.1.mlp.gate_proj.weight": torch.ones_like(own["model.layers.1.mlp.gate_proj.weight"])}
    save_file({name: torch.zeros_like(tensor) for name, tensor in own.items()}, source / "model-1.safetensors")
    save_file(mtp | own, source / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(own, "model-1.safetensors")})
    )
    loaded = load(source, device="cpu", dtype="float32")
    patches.save(tmp_path / "p.safetensors", delta, source, {}, weight(loaded.model, "gate_proj", LAYER))
    out = patches.apply(source, patches.read(tmp_path / "p.safetensors"), tmp_path / "out")
    patched_model = load(out, device="cpu", dtype="float32").model
    assert not same_bits(weight(loaded.model, "gate_proj", LAYER), weight(patched_model, "gate_proj", LAYER))
    assert same_bits(tensors(out)["mtp.layers.1.mlp.gate_proj.weight"], mtp["mtp.layers.1.mlp.gate_proj.weight"])


def test_a_patch_is_not_saved_for_a_tensor_that_was_not_measured(delta, tmp_path):
    loaded = load(CHECKPOINT, device="cpu", dtype="float32")
    with pytest.raises(PatchError, match="as stored in model.safetensors it is not the weight that was loaded"):
        other = weight(loaded.model, "gate_proj", LAYER + 1)
        patches.save(tmp_path / "p.safetensors", delta, CHECKPOINT, {}, other)
    assert not list(tmp_path.iterdir())


def test_a_patch_that_changes_nothing_as_stored_is_refused(delta, tmp_path):
    tiny = Delta(LAYER, delta.gate_write * 1e-9, delta.gate_read, "forward")
    patches.save(tmp_path / "p.safetensors", tiny, CHECKPOINT, {})
    with pytest.raises(PatchError, match="the patch changes no number as BF16 stores it"):
        patches.apply(CHECKPOINT, patches.read(tmp_path / "p.safetensors"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
