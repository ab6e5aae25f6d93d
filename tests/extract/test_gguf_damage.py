"""GGUF as an attacker, or a flipped bit, would have it: one line, at once, and never a tensor taken for missing."""

from __future__ import annotations

import random
import re
import struct
import time

import pytest
from gguf import GGMLQuantizationType as Kind

from extract.checkpoint import open_checkpoint
from extract.layouts import find_layout
from extract.stores.gguf_header import read_header
from tests.checkpoints import write_checkpoint
from tests.gguf_files import write_gguf
from vindex.directory import LocalFiles
from vindex.errors import CheckpointError

F32 = 0


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = F32) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def architecture(name: str) -> bytes:
    return entry("general.architecture", 8, string(name))


EMBEDDINGS = tensor("token_embd.weight", (8, 4), 0)


def written(path, entries=(), tensors=(EMBEDDINGS,), *, counts=None, data=128, of="qwen3"):
    """A GGUF file put together by hand, with an architecture; counts: what it claims to hold."""
    entries = [architecture(of), *entries]
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(entries))))
    content = head + b"".join(entries) + b"".join(tensors)
    path.write_bytes(content + bytes(-len(content) % 32) + bytes(data))
    return path


def refused(path) -> str:
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_by_hand_is_read(tmp_path):
    opened = open_checkpoint(str(written(tmp_path / "m.gguf")))
    assert opened.tensors["model.embed_tokens.weight"].shape == (4, 8)


def arrays(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQB", 0, 1, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"counts": (2**63, 1)}, "it claims 9223372036854775808 entries, more than it has room for"),
        ({"counts": (1, 2**63)}, "it claims 9223372036854775808 entries, more than it has room for"),
        ({"entries": [architecture("qwen3")]}, "two values for general.architecture"),
        ({"entries": [entry("a", 9, struct.pack("<IQ", 8, 2**60))]}, "it claims 1152921504606846976 entries"),
        ({"entries": [entry("a", 9, struct.pack("<IQ", 0, 2**22 + 1))], "data": 1 << 23}, "an array of 4194305 values"),
        ({"entries": [entry("a", 9, arrays(5000))]}, "an array of values of type 9"),
        ({"entries": [entry("a", 9, struct.pack("<IQ", 99, 1))]}, "an array of values of type 99"),
        ({"entries": [entry("a", 99, b"")]}, "a value of unknown type 99"),
        ({"entries": [entry("a", 7, b"\x02")]}, "a truth value of 2"),
        ({"entries": [entry("a", 8, string(b"\xff"))]}, "can't decode byte 0xff"),
        ({"entries": [entry("a", 8, struct.pack("<Q", 2**62))]}, "a name of 4611686018427387904 bytes"),
        ({"entries": [entry("a" * 65536, 7, b"\1")]}, "a name of 65536 bytes, longer than 65535"),
        (
            {"entries": [entry("general.alignment", 4, struct.pack("<I", 0))]},
            "general.alignment is 0, expected a power",
        ),
        ({"entries": [entry("general.alignment", 4, struct.pack("<I", 24))]}, "general.alignment is 24"),
        ({"entries": [entry("general.alignment", 8, string("32"))]}, "general.alignment is 32"),
        ({"tensors": [EMBEDDINGS, EMBEDDINGS]}, "two tensors called token_embd.weight"),
        ({"tensors": [tensor("a" * 65, (8,), 0)]}, "a name of 65 bytes, longer than 64"),
        ({"tensors": [tensor("token_embd.weight", (), 0)]}, "has 0 dimensions or one of length 0"),
        ({"tensors": [tensor("token_embd.weight", (1,) * 5, 0)]}, "has 5 dimensions or one of length 0"),
        ({"tensors": [tensor("token_embd.weight", (8, 0), 0)]}, "has 2 dimensions or one of length 0"),
        (
            {"tensors": [tensor("token_embd.weight", (2**40, 2**40), 0)]},
            "is cut short: token_embd.weight lies past its",
        ),
        (
            {"tensors": [tensor("token_embd.weight", (8, 4), 32)]},
            "lies at byte 160, and by the types and shapes before it at 128",
        ),
        ({"tensors": [EMBEDDINGS, tensor("output_norm.weight", (8,), 96)]}, "output_norm.weight lies at byte"),
        (
            {"tensors": [tensor("token_embd.weight", (8, 4), 0, 8)]},
            "rows of 8 numbers, and Q8_0 is stored in blocks of 32",
        ),
        (
            {"tensors": [tensor("token_embd.weight", (8, 4), 0, 4)]},
            "ggml type 4, which this version of the gguf package",
        ),
        ({"data": 160}, "m.gguf is damaged: 32 bytes follow its last tensor"),
        ({"tensors": [tensor("tokem_embd.weight", (8, 4), 0)]}, "'tokem_embd.weight' is no tensor of a qwen3 of None"),
        ({"tensors": [tensor("token_embd.wdight", (8, 4), 0)]}, "'token_embd.wdight' is no tensor of a qwen3"),
        ({"tensors": [tensor("blk.01.attn_norm.weight", (8, 4), 0)]}, "'blk.01.attn_norm.weight' is no tensor"),
        (
            {
                "entries": [entry("qwen3.block_count", 4, struct.pack("<I", 1))],
                "tensors": [tensor("blk.1.attn_norm.weight", (8, 4), 0)],
            },
            "'blk.1.attn_norm.weight' is no tensor of a qwen3 of 1 layers",
        ),
        (
            {
                "entries": [entry("qwen3.block_count", 8, string("2"))],
                "tensors": [tensor("blk.1.attn_norm.weight", (8, 4), 0)],
            },
            "config.json num_hidden_layers: expected a positive integer, got '2'",
        ),
        (
            {"entries": [entry("qwen3.block_count", 10, struct.pack("<Q", 10**12))]},
            "num_hidden_layers: expected at most",
        ),
        ({"entries": [entry("tokenizer.ggml.tokens", 8, string("a"))]}, "tokenizer.ggml.tokens is no array of strings"),
        ({"entries": [entry("general.license", 4, struct.pack("<I", 7))]}, "general.license is 7, not a string"),
        (
            {"entries": [entry("split.count", 2, struct.pack("<H", 3))]},
            r"m.gguf says that it is part 0 \(from 0\) of 3",
        ),
    ],
)
def test_damage_is_named(tmp_path, options, message):
    assert re.search(message, refused(written(tmp_path / "m.gguf", **options)))


def test_a_header_past_its_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("extract.stores.gguf_header.LARGEST_HEADER", 50)
    assert "its header is longer than 50 bytes" in refused(written(tmp_path / "m.gguf"))


def test_a_stack_of_too_many_experts(tmp_path):
    stack = tensor("blk.0.ffn_gate_exps.weight", (1, 1, 70_000), 0)
    path = written(tmp_path / "m.gguf", [], [stack], data=280_000, of="qwen3moe")
    assert "blk.0.ffn_gate_exps.weight is of 70000 experts, more than 65536" in refused(path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("split")
    source = write_checkpoint(directory / "m", hidden=32, neurons=64)
    write_gguf(source, directory / "m.gguf", lambda name: Kind.Q8_0, per_file=7)
    return sorted(directory.glob("*.gguf"))


def test_parts_that_do_not_agree(parts, tmp_path):
    def copied(edit):
        for number, part in enumerate(parts):
            (tmp_path / part.name).write_bytes(edit(number, part.read_bytes()))
        return refused(tmp_path / parts[0].name)

    count = len(parts)
    assert count > 1
    swapped = copied(lambda number, content: parts[-1 - number].read_bytes())
    assert f"says that it is part {count - 1} (from 0) of {count}, and is used as part 0" in swapped
    doubled = copied(lambda number, content: parts[0].read_bytes())
    assert f"says that it is part 0 (from 0) of {count}, and is used as part 1 of {count}" in doubled
    tensors = sum(len(read_header(LocalFiles(part.parent), part.name).tensors) for part in parts)
    key = string("split.tensors.count") + struct.pack("<I", 5)
    assert key + bytes([tensors]) in parts[0].read_bytes()
    more = copied(lambda number, content: content.replace(key + bytes([tensors]), key + bytes([tensors + 1])))
    assert f"the model has {tensors + 1} tensors, and its parts {tensors}; download them again" in more
    (tmp_path / "m-00003-of-00002.gguf").write_bytes(b"")
    assert "there is no part 3 of 2; give it the name it had" in refused(tmp_path / "m-00003-of-00002.gguf")


def test_a_tensor_in_two_parts_and_another_architecture(tmp_path):
    def part(number, of, name="token_embd.weight"):
        said = [entry("split.no", 2, struct.pack("<H", number)), entry("split.count", 2, struct.pack("<H", 2))]
        return written(tmp_path / f"m-0000{number + 1}-of-00002.gguf", said, [tensor(name, (8, 4), 0)], of=of)

    first = part(0, "qwen3")
    part(1, "qwen3")
    assert "token_embd.weight is in m-00001-of-00002.gguf too; the parts do not agree" in refused(first)
    part(1, "qwen2", "output.weight")
    assert "is of a model of architecture 'qwen2', the parts before of 'qwen3'" in refused(first)


def test_a_flipped_bit_of_the_header_never_hides_a_tensor(tmp_path):
    source = write_checkpoint(tmp_path / "m", hidden=32, neurons=64, tied=False)
    write_gguf(source, tmp_path / "m.gguf", lambda name: Kind.Q8_0)
    whole, files = (tmp_path / "m.gguf").read_bytes(), LocalFiles(tmp_path)
    header = read_header(files, "m.gguf")
    intact = find_layout(open_checkpoint(str(tmp_path / "m.gguf")))
    names = [at * 8 + bit for t in header.tensors for at in spans(whole, t.name) for bit in range(8)]
    for bit in random.Random(0).sample(names, 300):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "f.gguf").write_bytes(flipped)
        try:
            found = find_layout(open_checkpoint(str(tmp_path / "f.gguf")))
        except CheckpointError:
            continue
        assert [norm.tensor for norm in found.norms] == [norm.tensor for norm in intact.norms] and not found.tied


def spans(content: bytes, name: str) -> range:
    start = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8
    return range(start, start + len(name))
