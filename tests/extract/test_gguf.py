"""A vindex of a GGUF file equals the vindex of its dequantised weights."""

from __future__ import annotations

import json
import re
import shutil
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import vindex
from extract.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint, write_mixture
from tests.conftest import build_quietly
from tests.extract.test_build import contents, rederived
from tests.gguf_files import write_gguf, write_plain
from vindex.errors import CheckpointError
from vindex.manifest import Dequantised

METHOD = "GGUF, by the gguf package"


def mixed(name: str) -> Kind:
    """As llama.cpp mixes them: the vocabulary finer than the rest, down_proj finer than gate_proj."""
    if "embed" in name or "lm_head" in name:
        return Kind.Q6_K
    return Kind.Q8_0 if "down_proj" in name else Kind.Q4_K


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("per_file", [0, 5], ids=["single", "split"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vindex_of_gguf_equals_that_of_its_numbers(tmp_path, model_type, per_file, tied):
    source = write_checkpoint(
        tmp_path / "m", model_type=model_type, hidden=256, neurons=512, tied=tied, config={"head_dim": 128}
    )
    (tmp_path / "gguf").mkdir()
    numbers = write_gguf(source, tmp_path / "gguf" / "m.gguf", mixed, architecture=model_type, per_file=per_file)
    plain = write_plain(source, tmp_path / "plain", numbers)
    shutil.copy(source / "tokenizer.json", tmp_path / "gguf")
    build_quietly(tmp_path / "gguf", tmp_path / "g.vindex")
    build_quietly(plain, tmp_path / "p.vindex")
    assert contents(tmp_path / "g.vindex") == contents(tmp_path / "p.vindex")
    v, of_plain = vindex.open(tmp_path / "g.vindex"), vindex.open(tmp_path / "p.vindex")
    assert v.index.model_config == of_plain.index.model_config and v.index.projection == of_plain.index.projection
    assert v.manifest.dequantised == (
        Dequantised(METHOD, "Q4_K", 2),
        Dequantised(METHOD, "Q6_K", 1 if tied else 2),
        Dequantised(METHOD, "Q8_0", 2),
    )
    stored = f"**Stored quantised**: 2 tensors as Q4_K ({METHOD}), "
    assert stored in (tmp_path / "g.vindex" / "README.md").read_text()
    assert "quantised" not in (tmp_path / "p.vindex" / "README.md").read_text()
    assert of_plain.manifest.dequantised == () and v.manifest.source.licence == "apache-2.0"
    parts = [file.name for file in v.manifest.source.files]
    assert parts[0] == "tokenizer.json" and len(parts) == 1 + (-(-len(numbers) // per_file) if per_file else 1)
    assert all(found.holds for found in rederived(v, tmp_path / "gguf" / parts[1], [0, 1]))


KINDS = """F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0
           IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS""".split()


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_is_read_as_gguf_dequantises_it(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("extract.stores.gguf.READ_BYTES", 4 * 256 * 7)  # seven rows at a time
    monkeypatch.setattr("extract.stores.gguf.CACHED_BYTES", 4 * 256 * 2)  # of which two are dequantised at once
    source = write_checkpoint(tmp_path / "m", hidden=256, neurons=512, layers=1)
    numbers = write_gguf(source, tmp_path / "m.gguf", lambda name: Kind[kind])
    opened = open_checkpoint(str(tmp_path / "m.gguf"))
    assert set(opened.tensors) == set(numbers)
    for name in numbers:
        assert opened.tensor(name).equal(numbers[name]), name
    embeddings = "model.embed_tokens.weight"
    assert opened.store.read(embeddings, 5, 17).equal(numbers[embeddings][5:17])
    counted = opened.dequantised(opened.tensors)
    assert counted == (() if kind in ("F16", "BF16") else (Dequantised(METHOD, kind, 4),))


def require_alike(source, numbers, place) -> None:
    """m.gguf in `place` has these numbers, and its vindex is that of a checkpoint that stores them plainly."""
    opened = open_checkpoint(str(place / "m.gguf"))
    for name, expected in numbers.items():
        assert opened.tensor(name).equal(expected), name
    build_quietly(write_plain(source, place / "plain", numbers), place / "p.vindex", features=4)
    (place / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    build_quietly(place / "m.gguf", place / "g.vindex", features=4)
    assert contents(place / "g.vindex") == contents(place / "p.vindex")


def test_a_mixture_of_gguf_equals_that_of_its_numbers(tmp_path):
    """ffn_gate_exps (E, I, H) and its like: each expert under its released name, without reading the others."""
    source = write_mixture(
        tmp_path / "m",
        model_type="qwen3_moe",
        experts=3,
        expert_neurons=64,
        shared_neurons=0,
        dense_layers=(),
        hidden=256,
    )
    sizes = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 64}

    def kind(name: str) -> Kind:
        if "down_proj" in name:
            return Kind.Q8_0
        return Kind.F32 if name.endswith("mlp.gate.weight") else Kind.Q6_K

    numbers = write_gguf(source, tmp_path / "m.gguf", kind, architecture="qwen3moe", metadata=sizes)
    require_alike(source, numbers, tmp_path)
    assert vindex.open(tmp_path / "g.vindex").manifest.dequantised == (
        Dequantised(METHOD, "Q6_K", 10),  # three experts' gate_proj in each of three layers, and the embeddings
        Dequantised(METHOD, "Q8_0", 9),
    )


def scale_of(name: str) -> float | None:
    """A number of each weight's own."""
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return 1e-3 * (1 + sum(numbers)) if "mlp.experts" in name or name.endswith("_proj.weight") else None


@pytest.mark.parametrize("mixture", [False, True], ids=["dense", "mixture"])
def test_weights_are_multiplied_by_the_scales_beside_them(tmp_path, mixture):
    """As llama.cpp's converter stores NVFP4: one scale a matrix, or one for each expert of a stack."""
    if mixture:
        sizes = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 64}
        options = {"experts": 3, "expert_neurons": 64, "shared_neurons": 0, "dense_layers": ()}
        source = write_mixture(tmp_path / "m", model_type="qwen3_moe", hidden=64, **options)
    else:
        sizes, source = {}, write_checkpoint(tmp_path / "m", hidden=64, neurons=128, tied=False)
    numbers = write_gguf(
        source,
        tmp_path / "m.gguf",
        lambda name: Kind.Q8_0,
        architecture="qwen3moe" if mixture else "qwen3",
        metadata=sizes,
        scale_of=lambda name: 0.5 if name == "lm_head.weight" else scale_of(name),
    )
    require_alike(source, numbers, tmp_path)
    assert all(found.holds for found in rederived(vindex.open(tmp_path / "g.vindex"), tmp_path / "m.gguf", [0, 1]))


@pytest.mark.parametrize(
    ("scale", "beside", "message"),
    [
        ([1.0, 2.0], True, r"blk.0.ffn_up.scale is F32 of shape \(2,\), beside a weight of shape \(2, 4\)"),
        ([1], True, r"blk.0.ffn_up.scale is I32 of shape \(1,\), beside a weight of shape \(2, 4\)"),
        ([1.0], False, r"blk.0.ffn_up.scale is F32 of shape \(1,\), beside no weight"),
    ],
    ids=["two numbers", "integers", "no weight"],
)
def test_a_scale_that_does_not_fit_its_weight_is_refused(tmp_path, scale, beside, message):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_block_count(1)
    if beside:
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 4), np.float32))
    writer.add_tensor("blk.0.ffn_up.scale", np.array(scale, np.float32 if isinstance(scale[0], float) else np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=rf"m.gguf: {message}; expected floats of shape \(1,\)"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_the_tokenizer_beside_the_file_is_copied_else_one_is_made_or_given(tmp_path):
    source = write_checkpoint(tmp_path / "m", hidden=32, neurons=64)
    own = json.loads((source / "tokenizer.json").read_text())
    own["model"]["vocab"]["aa"] = own["model"]["vocab"].pop("piece20")
    own["model"]["merges"] = [["a", "a"]]
    (source / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "alone").mkdir()
    write_gguf(source, tmp_path / "alone" / "m.gguf", lambda name: Kind.Q8_0)
    alone = str(tmp_path / "alone" / "m.gguf")
    made = json.loads(open_checkpoint(alone).tokenizer())
    assert made["model"]["vocab"] == own["model"]["vocab"] | {"<|end|>": 35}
    assert [(t["id"], t["content"]) for t in made["added_tokens"]] == [(35, "<|end|>")]
    given = open_checkpoint(alone, tokenizer=source / "tokenizer.json")
    assert given.tokenizer() == (source / "tokenizer.json").read_bytes()
    assert [file.name for file in given.fingerprint(1, lambda count: None)] == ["m.gguf", "tokenizer.json"]
    shutil.copy(source / "tokenizer.json", tmp_path / "alone")
    assert open_checkpoint(alone).tokenizer() == (source / "tokenizer.json").read_bytes()
    own["model"]["vocab"] |= {"piece21": 30, "piece22": 29}
    (tmp_path / "alone" / "tokenizer.json").write_text(json.dumps(own))
    with pytest.raises(CheckpointError, match="tokenizer.json is of another model: its token (29|30) is .* the GGUF"):
        open_checkpoint(alone).tokenizer()
    with pytest.raises(CheckpointError, match="nowhere.json: no such file; --tokenizer takes the path of a"):
        open_checkpoint(alone, tokenizer=tmp_path / "nowhere.json")


def test_a_tokenizer_that_cannot_be_made_says_what_to_do(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"m.gguf: no tokenizer can be made .*; give the model's own with --tok"
    ) as c:
        open_checkpoint(str(tmp_path / "m.gguf")).tokenizer()
    assert "\n" not in str(c.value)


def small(tmp_path, **options):
    source = write_checkpoint(tmp_path / "m", hidden=32, neurons=64)
    write_gguf(source, tmp_path / "m.gguf", lambda name: Kind.Q8_0, **options)
    return tmp_path / "m.gguf"


def test_what_is_not_gguf_or_not_whole_is_named(tmp_path):
    whole = small(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-5000])
    (tmp_path / "header.gguf").write_bytes(whole.read_bytes()[:1000])
    (tmp_path / "other.gguf").write_bytes(b"not a gguf file at all")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\x01\0\0\0" + bytes(100))
    (tmp_path / "big.gguf").write_bytes(b"GGUF\0\0\0\x03" + bytes(100))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, message in {
        "cut.gguf": r"cut.gguf is cut short: .* lies past its end; download it again",
        "header.gguf": r"header.gguf is damaged, cut short or not GGUF \(its header is longer than the file\)",
        "other.gguf": r"other.gguf is damaged, cut short or not GGUF \(it does not begin with GGUF\)",
        "old.gguf": r"old.gguf is damaged, cut short or not GGUF \(version 1; versions 2 and 3 are known\)",
        "big.gguf": "big.gguf is written for big-endian machines; get a little-endian GGUF",
        "model.safetensors": "is a file and not GGUF; give the checkpoint's directory",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_two_models_in_a_directory_and_a_missing_part_are_named(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a-Q4_0.gguf", "b-Q8_0.gguf"):
        shutil.copy(small(tmp_path), tmp_path / "d" / name)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models \(a-Q4_0.gguf, b-Q8_0.gguf\); name one"):
        open_checkpoint(str(tmp_path / "d"))
    (tmp_path / "s").mkdir()
    source = write_checkpoint(tmp_path / "m", hidden=32, neurons=64)
    write_gguf(source, tmp_path / "s" / "m.gguf", lambda name: Kind.Q8_0, per_file=5)
    first, second, *_ = sorted((tmp_path / "s").iterdir())
    second.unlink()
    for given in (first, tmp_path / "s"):
        with pytest.raises(CheckpointError, match=rf"1 of \d parts are missing, first {second.name}; put them side by"):
            open_checkpoint(str(given))


def test_architectures_and_types_that_are_not_known_are_named(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "bert")
    writer.add_tensor("token_embd.weight", torch.zeros(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="b.gguf: general.architecture 'bert' is not supported; known: qwen3"):
        open_checkpoint(str(tmp_path / "b.gguf"))
    source = write_checkpoint(tmp_path / "l", hidden=32, neurons=64, model_type="llama")
    write_gguf(source, tmp_path / "l.gguf", lambda name: Kind.Q8_0, architecture="llama", metadata={"expert_count": 8})
    with pytest.raises(CheckpointError, match=r"llama.expert_count is set \(Mixtral\); of mixtures only qwen3moe is"):
        open_checkpoint(str(tmp_path / "l.gguf"))

    def cannot(data, kind):
        raise NotImplementedError

    path = small(tmp_path)
    monkeypatch.setattr("gguf.dequantize", cannot)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is stored as Q8_0; only BF16, F16, F32 are supported"):
        open_checkpoint(str(path)).tensor("model.layers.0.mlp.gate_proj.weight")


def test_without_the_package_the_way_out_is_said(tmp_path, monkeypatch):
    path = small(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"reading GGUF needs the gguf package: pip install 'vindex-svd\[gguf\]'"):
        open_checkpoint(str(path))
