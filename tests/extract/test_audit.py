"""An audit tells what is wrong with directions: each verdict on weights whose directions are known, and each error."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import extract
import vindex
from extract.ffn import Weight
from extract.measuring import measure
from tests.checkpoints import write_checkpoint
from tests.conftest import build_quietly
from tests.extract.test_stopped_build import stop_after
from vindex.__main__ import app
from vindex.audits import draw
from vindex.errors import FormatError, NumericError, QueryError, TargetError
from vindex.verdicts import OF_A_ROW, VERDICTS, choices, judge, sentences

ROOT = Path(__file__).parents[2]
NEURONS, HIDDEN, KEPT = 90, 64, 16
RANDOM = torch.Generator().manual_seed(0)


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Orthonormal rows at random."""
    return torch.linalg.qr(torch.randn(columns, rows, generator=RANDOM, dtype=torch.float64)).Q.T


LEFT, RIGHT = orthonormal(HIDDEN, NEURONS).T, orthonormal(HIDDEN, HIDDEN)
SPECTRUM = 10 * 0.95 ** torch.arange(HIDDEN, dtype=torch.float64)


def weight_of(spectrum: torch.Tensor) -> torch.Tensor:
    """(I, H) with these singular values and the rows of RIGHT as directions, as float32."""
    return ((LEFT * spectrum) @ RIGHT).float()


WEIGHT = weight_of(SPECTRUM)
SIGNS = torch.sign((WEIGHT.double() @ RIGHT.T).gather(0, (WEIGHT.double() @ RIGHT.T).abs().argmax(0)[None]))[0]
TRUE = (RIGHT * SIGNS[:, None])[:KEPT]
SIGMA = SPECTRUM[:KEPT].numpy()


def turned(rows: int, angle: float) -> torch.Tensor:
    """A rotation of so many dimensions, each axis by about `angle` (rad)."""
    generator = torch.randn(rows, rows, generator=RANDOM, dtype=torch.float64)
    return torch.linalg.matrix_exp(angle * (generator - generator.T) / (2 * rows) ** 0.5)


def iterated(steps: int) -> torch.Tensor:
    """Directions by so many power iterations of a random block, without oversampling."""
    weight = WEIGHT.double()
    block = orthonormal(KEPT, HIDDEN).T
    for _ in range(steps):
        block = torch.linalg.qr(weight.T @ (weight @ block)).Q
    return block.T


def verdict(rows: torch.Tensor, weight: torch.Tensor = WEIGHT, sigma: np.ndarray | None = None):
    return judge(measure(rows.to(torch.float16).numpy(), sigma, weight, "w"))


SHUFFLED = torch.randperm(KEPT, generator=RANDOM)
REPEATED = torch.cat([TRUE[:5], TRUE[:11]])
OF_ANOTHER = orthonormal(HIDDEN, HIDDEN)[:KEPT]
CASES = {
    "the true ones": (TRUE, "correct"),
    "one sign": (TRUE * torch.where(torch.arange(KEPT) == 3, -1.0, 1.0)[:, None], "signs only: 1 of 16 against"),
    "rows of length two": (2 * TRUE, "not orthonormal: |row·row − identity| up to 3.0e+00"),
    "shuffled": (TRUE[SHUFFLED], f"a permutation: {int((torch.arange(KEPT) != SHUFFLED).sum())} of 16 at another's"),
    "the next ones": (RIGHT[KEPT : 2 * KEPT], "others of its directions: 16 of 16 repeated or not among the leading"),
    "repeated": (REPEATED, "others of its directions: 11 of 16 repeated or not among the leading 16"),
    "mixed among themselves": (turned(KEPT, 0.005) @ TRUE, "same subspace, rotated: "),
    "wholly mixed": (orthonormal(KEPT, KEPT) @ TRUE, "same subspace, rotated: 16 of 16 are mixtures of true ones"),
    "four power iterations": (iterated(4), "stops early: "),
    "turned in space": (TRUE @ turned(HIDDEN, 0.02), "near, not exact: 16 of 16 are turned away"),
    "its neurons": (torch.nn.functional.normalize(WEIGHT[:KEPT].double(), dim=1), "its neurons: rows are neurons"),
    "of another weight": (OF_ANOTHER, "not of these weights: overlap 0."),
    "zeros": (torch.zeros(KEPT, HIDDEN), "not of these weights: overlap 0.00"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_verdict_on_known_weights(name):
    rows, said = CASES[name]
    assert str(verdict(rows)).startswith(said)


def test_every_verdict_is_among_the_cases():
    told = {said.partition(":")[0] for _, said in CASES.values()}
    assert told == set(VERDICTS) - {"wrong σ"}


def test_the_documented_limits_and_words_are_those_in_the_code():
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8").splitlines()
    wanted = [f"| `{name}` | {choices()[name]:g} | {sentence} |" for name, sentence in sentences().items()]
    assert not [row for row in wanted if row not in page], "\n".join(wanted)
    assert all(any(line.startswith(f"| {word} |") for line in page) for word in VERDICTS)


def test_a_stated_sigma_is_held_against_the_weight():
    assert verdict(TRUE, sigma=SIGMA).word == "correct"
    off = SIGMA * np.where(np.arange(KEPT) == 2, 1.01, 1.0)
    assert str(verdict(TRUE, sigma=off)) == "wrong σ: 1 of 16 stated σ are not ‖Wv‖"
    half = TRUE.half().numpy()
    with_it, without = measure(half, off, WEIGHT, "w"), measure(half, None, WEIGHT, "w")
    assert with_it.residual[2] > 1e-2 > without.residual[2], "the residual is the stated σ's"


@pytest.mark.parametrize("exponent", [-40, -70, -100])
def test_a_weight_of_tiny_numbers_has_the_figures_of_the_same_one_near_1(exponent):
    """All but σ, which is so much smaller: a certificate of 0 would be that of a perfect direction."""
    rows, power = CASES["four power iterations"][0].half().numpy(), 2.0**exponent
    found, tiny = (measure(rows, SIGMA * of, WEIGHT * of, "w") for of in (1.0, power))
    for name in ("residual", "own", "outside", "rounded", "angles", "held", "best"):
        np.testing.assert_array_equal(getattr(tiny, name), getattr(found, name), name)
    for name in ("quotient", "sigma", "stated"):
        np.testing.assert_array_equal(getattr(tiny, name), getattr(found, name) * np.float32(power), name)
    assert judge(tiny) == judge(found) and (tiny.residual > 0).all()


def test_a_rotation_among_equal_singular_values_is_no_fault():
    """Two σ that are closer than a thousandth have no directions of their own, only a plane."""
    near = SPECTRUM.clone()
    near[5] = near[4] * (1 - 1e-4)
    mixed = RIGHT[:KEPT].clone()
    mixed[4:6] = orthonormal(2, 2) @ mixed[4:6]
    assert verdict(mixed, weight_of(near)).word in ("correct", "signs only")
    assert verdict(mixed).word == "same subspace, rotated", "where they are further apart it is one"


@pytest.mark.parametrize("fall", [0.95, 0.7])
def test_what_others_decompose_and_keep_in_float32_is_right(fall):
    """Float32 stores more digits than a decomposition in float32 gets right, the fewer the more the spectrum falls."""
    weight = weight_of(10 * fall ** torch.arange(HIDDEN, dtype=torch.float64))
    by_svd = np.linalg.svd(weight.numpy())[2][:KEPT]
    by_gram = np.linalg.eigh(weight.numpy().T @ weight.numpy())[1][:, ::-1].T[:KEPT]
    for rows in (by_svd, by_gram):
        assert judge(measure(rows, None, weight, "w")).word in ("correct", "signs only")
    slightly = (turned(KEPT, 2e-5).float() @ torch.from_numpy(by_svd)).numpy()
    assert judge(measure(slightly, None, weight, "w")).word == "same subspace, rotated"


def test_figures_are_those_of_numpy():
    rows = iterated(2).to(torch.float16).numpy()
    found = measure(rows, None, WEIGHT, "w")
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    weight = WEIGHT.double().numpy()
    lengths = np.linalg.norm(weight @ unit.T, axis=0)
    residual = np.linalg.norm(unit @ weight.T @ weight - lengths[:, None] ** 2 * unit, axis=1) / lengths**2
    np.testing.assert_allclose(found.residual, residual, rtol=1e-3)
    basis, true = np.linalg.qr(unit.T)[0], np.linalg.svd(weight)[2][:KEPT]
    assert found.held == pytest.approx(np.linalg.norm(weight @ basis) ** 2 / np.linalg.norm(weight) ** 2, rel=1e-5)
    assert found.best == pytest.approx(float((SPECTRUM[:KEPT] ** 2).sum() / (SPECTRUM**2).sum()), rel=1e-5)
    cosines = np.linalg.svd(basis.T @ true.T)[1]
    np.testing.assert_allclose(np.sort(np.cos(found.angles)), np.sort(cosines), atol=1e-6)
    matches = np.abs(unit @ true.T)
    assert (found.match == matches.argmax(axis=1)).all()
    np.testing.assert_allclose(found.cosine, matches.max(axis=1), atol=1e-5)


def test_rows_past_the_rank_are_zero_or_no_directions():
    low = weight_of(SPECTRUM * (torch.arange(HIDDEN) < 6))
    padded = TRUE * (torch.arange(KEPT) < 6)[:, None]
    assert verdict(padded, low).word == "correct"
    assert str(verdict(TRUE, low)) == "others of its directions: 10 rows past the rank, 6, where there is no direction"
    assert verdict(torch.zeros(KEPT, HIDDEN), torch.zeros(NEURONS, HIDDEN)).word == "correct"
    nothing = "not of these weights: 16 rows where the weight has no such direction"
    assert str(verdict(TRUE, torch.zeros(NEURONS, HIDDEN))) == nothing


def test_more_rows_than_directions_can_only_be_neurons():
    assert verdict(torch.nn.functional.normalize(WEIGHT, dim=1)).word == "its neurons"
    assert verdict(torch.randn(NEURONS, HIDDEN, generator=RANDOM)).word == "not of these weights"


def test_rows_that_fill_the_space_are_judged_by_themselves():
    """Any 64 orthonormal rows span a space of 64."""
    assert verdict(RIGHT * SIGNS[:, None]).word == "correct"
    assert str(verdict(orthonormal(HIDDEN, HIDDEN))) == "not of these weights: 64 of 64 are not its directions"
    assert str(verdict(RIGHT @ turned(HIDDEN, 0.1))) == "near, not exact: 64 of 64 are turned away"


@pytest.mark.parametrize("pair", [("built", "checkpoint"), ("built_mixture", "mixture")])
def test_what_was_built_of_a_model_is_found_right(pair, request):
    directory, source = (request.getfixturevalue(name) for name in pair)
    found = extract.audit(directory, source)
    assert found.holds and found.missed < 1e-6 and {row["verdict"] for row in found.rows()} == {"correct"}
    names = ["embeddings", "gate_meta.bin", "down_meta.bin", "norms", *(["routers"] if "mix" in pair[1] else [])]
    assert [check.what for check in found.contents] == names
    assert found.summary == f"{len(found.weights)} weights: {len(found.weights)} correct"
    groups = sum(entry.groups for entry in vindex.open(directory).index.layers)
    assert len(found.weights) == 2 * groups and len(found.rows()) == 2 * vindex.open(directory).index.num_layers


def test_a_vindex_of_another_model_is_found_out(built, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=5)
    found = extract.audit(built, other, layers=1)
    assert not found.holds and {one.layer for one in found} == {0} and found.missed > 0.01
    assert {one.verdict.word for one in found} == {"not of these weights"}
    assert [check.what for check in found.contents if not check.holds] == [check.what for check in found.contents]
    assert "other embeddings, gate_meta.bin, down_meta.bin, norms" in found.summary


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy.vindex")


def change(directory, name: str, dtype: str, edit) -> None:
    values = np.fromfile(directory / name, dtype)
    edit(values)
    values.tofile(directory / name)


@pytest.mark.parametrize(
    "name, dtype, edit, what, detail",
    [
        (
            "embeddings.bin",
            "<f2",
            lambda v: v.__setitem__(16 * 7, 9),
            "embeddings",
            "1 of 40 rows are not the source's",
        ),
        ("norms.bin", "<f2", lambda v: v.__setitem__(0, 9), "norms", "first layers.0.input_layernorm"),
        ("gate_meta.bin", "<u4", lambda v: v.__setitem__(7, 30), "gate_meta.bin", "1 of 16 directions have other"),
        ("down_meta.bin", "<u4", lambda v: v.__setitem__(8, 0), "down_meta.bin", "1 of 16 directions have other"),
    ],
)
def test_what_stands_beside_directions_is_compared(copy, checkpoint, name, dtype, edit, what, detail):
    change(copy, name, dtype, edit)
    (check,) = [check for check in extract.audit(copy, checkpoint).contents if not check.holds]
    assert check.what == what and detail in check.detail


def test_a_router_that_is_another_is_named(built_mixture, mixture, tmp_path):
    copied = shutil.copytree(built_mixture, tmp_path / "m.vindex")
    change(copied, "router_weights.bin", "<f2", lambda v: v.__setitem__(0, 9))
    (check,) = [check for check in extract.audit(copied, mixture).contents if not check.holds]
    assert (
        check.what == "routers" and check.detail == "1 of 4 are not the source's, first model.layers.1.mlp.gate.weight"
    )


def test_our_format_fixes_signs_and_an_audit_holds_it_to_that(copy, checkpoint):
    change(copy, "gate_vectors.bin", "<f2", lambda v: v[:16].__imul__(np.float16(-1)))
    found = extract.audit(copy, checkpoint)
    (wrong,) = [one for one in found if one.verdict.word != "correct"]
    assert (wrong.layer, wrong.side, wrong.verdict.word) == (0, "gate", "signs only") and not found.holds


def command(*words):
    return CliRunner().invoke(app, ["audit", *map(str, words)])


def test_the_command_prints_records_draws_and_repairs(copy, checkpoint, tmp_path, monkeypatch):
    change(copy, "gate_vectors.bin", "<f2", lambda v: v[:32].__setitem__(slice(None), np.roll(v[:32], 16)))
    monkeypatch.chdir(tmp_path)
    done = command(copy, "--source", checkpoint, "-o", "r.json", "--plot", "r.html")
    message = (
        "4 weights: 3 correct, 1 a permutation; other gate_meta.bin; give the source that it is of, or write one of"
    )
    assert isinstance(done.exception, FormatError) and message in str(done.exception)
    assert "a permutation: 2 of 8 at another's place" in " ".join(done.output.split())
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["record"] == "vindex-audit/1" and written["weights"][0]["directions"]["match"][:3] == [1, 0, 2]
    draw(written, tmp_path / "again.html")
    pages = [(tmp_path / name).read_text() for name in ("r.html", "again.html")]
    assert all("residual by rank" in page for page in pages)
    done = command(copy, "--source", checkpoint, "--layers", 1, "--repair", "right.vindex")
    assert done.exit_code == 0 and "next: vindex audit right.vindex --source" in done.output
    assert vindex.open("right.vindex").layer(0).gate.shape == vindex.open(copy).layer(0).gate.shape
    done = command("right.vindex", "--source", checkpoint, "--json")
    printed = json.loads(done.stdout)
    assert printed["holds"] and printed["sigma"] == "stated" and len(printed["weights"]) == 4


def test_what_cannot_be_audited_is_one_line(built, built_mixture, checkpoint, tmp_path):
    wider = write_checkpoint(tmp_path / "wider", hidden=24)
    with pytest.raises(QueryError, match="wider has 2 layers of width 24, and tiny.vindex 2 layers of width 16; give"):
        extract.audit(built, wider)
    with pytest.raises(
        QueryError, match="has 2 layers of width 16, and mixture.vindex 3 layers of width 16, 4 experts"
    ):
        extract.audit(built_mixture, checkpoint)
    holed = TRUE.clone()
    holed[2, 3] = torch.nan
    with pytest.raises(
        NumericError, match="row 2 of the directions said to be of w holds what is no finite number; run v"
    ):
        verdict(holed)
    for layers in (0, -1):
        with pytest.raises(QueryError, match=f"layers {layers}: expected a positive integer"):
            extract.audit(built, checkpoint, layers=layers)
        with pytest.raises(QueryError, match=f"layers {layers}: expected a positive integer"):
            extract.verify(built, checkpoint, layers=layers)
    with pytest.raises(QueryError, match="experts 0: expected a positive integer"):
        extract.verify(built, checkpoint, experts=0)
    with pytest.raises(FormatError, match="nowhere is not a directory"):
        extract.audit(tmp_path / "nowhere", checkpoint)
    with pytest.raises(TargetError, match=r"already exists; choose another place, or replace it with --force"):
        raise command(built, "--source", checkpoint, "--repair", built).exception
    for option in ("--resume", "--force"):
        with pytest.raises(QueryError, match="--resume and --force are for a repair: give --repair DIR, or leave them"):
            raise command(built, "--source", checkpoint, option).exception
    with pytest.raises(TargetError, match="plots are written as .html or .png"):
        extract.audit(built, checkpoint, layers=1).plot(tmp_path / "p.pdf")


def test_a_repair_that_was_stopped_goes_on(built, checkpoint, tmp_path, monkeypatch):
    words = (built, "--source", checkpoint, "--layers", 1, "--repair", tmp_path / "r.vindex")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        done = command(*words)
    assert done.exit_code == 130 and "what is finished is kept in" in done.output
    with pytest.raises(TargetError, match=r"an unfinished build is in .*; continue it with --resume"):
        raise command(*words).exception
    assert command(*words, "--resume").exit_code == 0 and vindex.verify(vindex.open(tmp_path / "r.vindex")).holds
    assert command(*words, "--force").exit_code == 0, "what is there is replaced"


def test_memory_holds_one_weight_and_the_next(tmp_path, monkeypatch):
    """Alive are at most the last weight, this one and the one ahead; all figures lie where room was taken for them."""
    source = write_checkpoint(tmp_path / "m", layers=6)
    build_quietly(source, tmp_path / "v")
    alive, most, read = set(), [0], Weight.by_neuron

    def watched(self, checkpoint):
        weight = read(self, checkpoint).clone()
        alive.add(id(weight))
        weakref.finalize(weight, alive.discard, id(weight))
        most[0] = max(most[0], len(alive))
        return weight

    monkeypatch.setattr(Weight, "by_neuron", watched)
    found = extract.audit(tmp_path / "v", source)
    assert 1 <= most[0] <= 3
    assert len({id(getattr(one.figures, name).base) for one in found for name in OF_A_ROW}) == len(OF_A_ROW)
