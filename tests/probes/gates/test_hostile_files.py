"""Gates that were made to hang, to fill memory or to mean something else are refused in one line and at once."""

from __future__ import annotations

import json
import os
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from probes.gates.data import read_retain
from probes.gates.files import read_indices, read_thresholds, write_logits
from probes.gates.gates import Gates
from probes.gates.stats import read_stats
from vindex.errors import FactError, NumericError, PatchError, VindexError

KEY = "layers.0.mlp.lambda_logits"


def refused(call, error: type[VindexError] = PatchError) -> str:
    started = time.monotonic()
    with pytest.raises(error) as caught:
        call()
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value)
    return str(caught.value)


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


PLAIN = ", sparse, quantised or without numbers; expected one float per neuron"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.ones(4).to_sparse(), PLAIN),
        (lambda: torch.ones(4, device="meta"), PLAIN),
        (quantised, PLAIN),
        (lambda: torch.ones(4, dtype=torch.complex64), "is torch.complex64 (4,); expected one float per neuron"),
        (lambda: torch.ones(4).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn (4,); expected one float per neuron"),
        (lambda: torch.ones(4, dtype=torch.int64), "is torch.int64 (4,); expected one float per neuron"),
        (lambda: torch.ones(2, 2), "is torch.float32 (2, 2); expected one float per neuron"),
        (lambda: torch.tensor(1.0), "is torch.float32 (); expected one float per neuron"),
        (lambda: torch.ones(0), "has shape (0,) and fewer numbers in the file"),
        (lambda: torch.ones(1).expand(4096), "has shape (4096,) and fewer numbers in the file"),
        (lambda: torch.ones(1).expand(10**12), "has shape (1000000000000,) and fewer numbers in the file"),
    ],
    ids="sparse meta quantised complex float8 integers matrix scalar none strided terabytes".split(),
)
def test_a_tensor_that_is_no_row_of_floats(tmp_path, make, message):
    torch.save({KEY: make()}, tmp_path / "g.pt")
    assert f"g.pt: {KEY} " in (found := refused(lambda: Gates.read(tmp_path / "g.pt"))) and message in found


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layers_that_cannot_be(tmp_path, suffix):
    def saved(*keys):
        state = {key: torch.ones(4) for key in keys}
        path = tmp_path / f"g{suffix}"
        torch.save(state, path) if suffix == ".pt" else save_file(state, path)
        return refused(lambda: Gates.read(path))

    assert "expected only keys ending in layers.<i>" in saved(f"layers.{10**12}.mlp.lambda_logits")
    assert "expected only keys ending in layers.<i>" in saved(f"layers.{'9' * 5000}.mlp.lambda_logits")
    assert "expected only keys ending in layers.<i>" in saved("layers.00.mlp.lambda_logits")
    assert "a key for layer 99999; expected fewer than 16384 layers" in saved("layers.99999.mlp.lambda_logits")
    assert "layer 0 is missing of 0 to 9999" in saved("layers.9999.mlp.lambda_logits")


def test_files_that_are_none(tmp_path, gates):
    write_logits(gates.logits, tmp_path)
    for name in ("lambda_logits.pt", "lambda_logits.safetensors", "gate_stats.json", "neuron_indices.json"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        assert f"{name}: cannot be read: it is a FIFO" in refused(lambda: read_stats(tmp_path))
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(kept)
    os.truncate(tmp_path / "lambda_logits.pt", 1 << 40)
    assert "has 1,099,511,627,776 bytes, and at most 268,435,456 are read" in refused(lambda: Gates.read(tmp_path))


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    torch.save({KEY: torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "g.pt", "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for name in plain.namelist():
            z.writestr(name, plain.read(name))
    assert "is compressed, which torch.save never does; refused" in refused(lambda: Gates.read(tmp_path / "g.pt"))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"0": ["1"]}', "layer '0': expected"),
        ('{"0": "12"}', "layer '0': expected"),
        ('{"0": [1.0]}', "layer '0': expected"),
        ('{"0": [true]}', "layer '0': expected"),
        ('{"0": {"1": 2}}', "layer '0': expected"),
        ('{"0": [1, 1]}', "layer '0': expected"),
        ('{"00": [1]}', "layer '00': expected"),
        ('{" 0": [1]}', "layer ' 0': expected"),
        ('{"0": [1], "0": [2]}', "the key '0' stands twice"),
        ('{"0": [NaN]}', "not valid JSON"),
        ('{"0": [48]}', "name neuron 48; there are 0 to 47"),
        ('{"0": [-1]}', "name neuron -1; there are 0 to 47"),
        ('{"3": [1]}', "name layer 3; there are layers 0 to 2"),
        ('{"0": [123456789012345678901234567890]}', "layer '0': expected"),
        ('["0"]', "found a list"),
    ],
)
def test_neuron_indices_that_are_not_sound(tmp_path, text, message):
    (tmp_path / "neuron_indices.json").write_text(text)
    assert message in refused(lambda: read_indices(tmp_path, (3, 48)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("0.1,nan", "threshold nan: expected a λ between 0 and 1"),
        ("2", "threshold 2: expected a λ between 0 and 1"),
        ("0.1,x", "expected comma-separated numbers"),
        ("0.5," * 1_000_000, "expected at most 100 thresholds, found 1,000,000"),
    ],
)
def test_thresholds_that_are_not_sound(tmp_path, text, message):
    (tmp_path / "thresholds.txt").write_text(text)
    assert message in refused(lambda: read_thresholds(tmp_path))


def test_stated_thresholds_are_bounded(tmp_path, gates):
    write_logits(gates.logits, tmp_path)
    (tmp_path / "gate_stats.json").write_text(json.dumps({"selected_thresholds": [0.5] * 10_000}))
    assert "gate_stats.json: expected at most 100 thresholds, found 10,000" in refused(lambda: read_stats(tmp_path))
    (tmp_path / "gate_stats.json").write_text(json.dumps({"mean": 10**400}).replace('"mean"', '"x": 1, "mean"'))
    assert "gate_stats.json: not valid JSON" in refused(lambda: read_stats(tmp_path))


def test_numbers_that_are_not_finite(tmp_path):
    torch.save({KEY: torch.full((4,), 1e300, dtype=torch.float64)}, tmp_path / "g.pt")
    assert "4 not finite, first at layer 0" in refused(lambda: Gates.read(tmp_path / "g.pt"), NumericError)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_of_no_end(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    assert "it is a FIFO" in refused(lambda: read_retain(path), FactError)
    path.unlink()
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)
    assert "bytes, and at most 4,294,967,296 are read" in refused(lambda: read_retain(path), FactError)


def test_a_row_that_says_two_things(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "text": "b"}\n')
    assert "rows.jsonl line 1: not valid JSON (the key 'text' stands twice" in refused(
        lambda: read_retain(tmp_path / "rows.jsonl"), FactError
    )


def test_a_safetensors_header_that_names_a_tensor_twice(tmp_path):
    save_file({KEY: torch.ones(4)}, tmp_path / "g.safetensors")
    content = (tmp_path / "g.safetensors").read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].strip()
    twice = header[:-1] + b"," + header[1:]
    (tmp_path / "g.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + bytes(16))
    assert f"header: not valid JSON (the key '{KEY}' stands twice" in refused(
        lambda: Gates.read(tmp_path / "g.safetensors")
    )
