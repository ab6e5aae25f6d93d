"""An audit of directories in the forms that others publish: the rows, and nothing that ours keeps beside them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import extract
from extract.checkpoint import open_checkpoint
from tests.extract.test_audit import command
from tests.foreign import leading, weights, write_browse, write_published, write_summary
from vindex.errors import FormatError, LackingError


def power_iterated(weight: np.ndarray) -> np.ndarray:
    """(8, H) after one power iteration of a random block."""
    block = np.linalg.qr(np.random.default_rng(3).standard_normal((weight.shape[1], 8)))[0]
    return np.linalg.qr(weight.T @ (weight @ block))[0].T


class Seen(Counter):
    """A `Progress` that counts the steps of each stage."""

    def __call__(self, stage: str, total: int | None):
        return lambda count, note="": self.update({stage: count})


@pytest.fixture(scope="module")
def source(checkpoint):
    """The weights of a checkpoint by tensor name, float32."""
    opened = open_checkpoint(str(checkpoint))
    return {name: opened.tensor(name).float().numpy() for name in opened.tensors}


def stack(source, side: str, make) -> np.ndarray:
    """What `make` gives for the (I, H) weight of each layer."""
    weights = (source[f"model.layers.{layer}.mlp.{side}_proj.weight"] for layer in range(2))
    return np.stack([make(weight if side == "gate" else weight.T) for weight in weights])


@pytest.mark.parametrize(
    "make, words",
    [(lambda w: leading(w, 8), {"correct", "signs only"}), (power_iterated, {"not of these weights", "stops early"})],
)
def test_a_published_directory_is_audited_without_what_it_lacks(source, checkpoint, tmp_path, make, words):
    gate, down = (stack(source, side, make) for side in ("gate", "down"))
    write_published(tmp_path / "p", gate, down, source["model.embed_tokens.weight"])
    seen = Seen()
    found = extract.audit(tmp_path / "p", checkpoint, progress=seen)
    assert seen["vocabulary"] == len(source["model.embed_tokens.weight"]), "read once, for the embeddings"
    assert {one.verdict.word for one in found} <= words and found.holds == ("correct" in words)
    assert found.record()["signs"] == "free" and found.record()["sigma"] == "‖Wv‖" and len(found.weights) == 4
    assert [(check.what, check.holds) for check in found.contents] == [("embeddings", True)]
    right = extract.repair(found, tmp_path / "right.vindex")
    assert right.gate.shape == gate.shape and extract.audit(right, checkpoint).holds


def test_a_summary_of_a_mixture_is_audited_by_expert(mixture, tmp_path):
    opened = open_checkpoint(str(mixture))
    experts = [opened.tensor(f"model.layers.1.mlp.experts.{e}.gate_proj.weight").float().numpy() for e in range(3)]
    right = np.stack([leading(weight, 4) for weight in experts])
    seen = Seen()
    found = extract.audit(write_summary(tmp_path / "s", {1: right}), mixture, progress=seen)
    assert seen == {"audit": 3}, "nothing is said of the vocabulary, so it is not read"
    assert found.holds and found.contents == () and [one.expert for one in found] == [0, 1, 2]
    found = extract.audit(write_summary(tmp_path / "other", {1: right[[0, 2, 1]]}), mixture)
    assert {one.expert: one.verdict.word for one in found if one.verdict.word == "not of these weights"}.keys() == {
        1,
        2,
    }


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_rows_of_a_browse_directory_are_held_against_the_neurons(source, checkpoint, tmp_path, dtype):
    gate, embeddings = stack(source, "gate", lambda w: w), source["model.embed_tokens.weight"]
    said = lambda name: {check.what: check for check in extract.audit(tmp_path / name, checkpoint).contents}  # noqa: E731
    write_browse(tmp_path / "right", [*gate], embeddings, dtype)
    checks = said("right")
    assert checks["neurons"] == ("neurons", True, "48 rows, each the source's in its place") and len(checks) == 2
    swapped = gate.copy()
    swapped[1, [3, 4]] = gate[1, [4, 3]]
    write_browse(tmp_path / "swapped", [*swapped], embeddings, dtype)
    assert said("swapped")["neurons"].detail.startswith("2 of 48 rows are not the source's in their place, cosine ")
    assert said("swapped")["neurons"].detail.endswith("first layer 1, row 3")
    write_browse(tmp_path / "short", [gate[0], gate[1, :20]], embeddings, dtype)
    assert (
        "1 of 44 rows" in said("short")["neurons"].detail and "first layer 1, row 20" in said("short")["neurons"].detail
    )


def test_a_browse_directory_is_neither_drawn_nor_repaired(source, checkpoint, tmp_path):
    directory = tmp_path / "b"
    write_browse(directory, [*stack(source, "gate", lambda w: w)], source["model.embed_tokens.weight"])
    done = command(directory, "--source", checkpoint)
    assert (
        done.exit_code == 0 and "rows are neurons, not directions; all that was compared is the source's" in done.output
    )
    reason = "b holds rows of gate_proj, neuron by neuron: .* choose one, `vindex build MODEL --features F`"
    for option, place in (("--repair", "right.vindex"), ("--plot", "p.html")):
        with pytest.raises(LackingError, match=reason):
            raise command(directory, "--source", tmp_path / "not asked for yet", option, tmp_path / place).exception
    found = extract.audit(directory, checkpoint)
    for ask in (extract.repair, type(found).plot):
        with pytest.raises(LackingError, match=reason):
            ask(found, tmp_path / "p.html")
    write_browse(tmp_path / "other", [weights(24, 16), weights(24, 16)], source["model.embed_tokens.weight"])
    done = command(tmp_path / "other", "--source", checkpoint)
    message = "rows are neurons, not directions; other neurons; give the source that it is of"
    assert isinstance(done.exception, FormatError) and str(done.exception).endswith(message)
