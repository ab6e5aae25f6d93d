"""A response is the regression of what an FFN writes on what a direction reads.

What is planted is found exactly, what is unrelated gets the null, and the command adds what Python measures.
"""

from __future__ import annotations

import json
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

import extract
import probes
import vindex
from probes import texts
from probes.live.experts import fire, outputs
from probes.live.hooks import capture, edited
from probes.live.sites import ffns
from probes.live.tokens import encode
from probes.responses import linear
from tests.probes.mixtures import save
from tests.probes.test_command import run
from vindex.demo import CHECKPOINT
from vindex.errors import ProbeError

TEXTS = ("factual", "story")
N = 2 * 255  # tokens without the first of each text; the tiny model has no other sinks


@pytest.fixture(scope="module")
def live(tiny_checkpoint):
    return probes.load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def v(tiny_vindex):
    return vindex.open(tiny_vindex)


@pytest.fixture(scope="module")
def found(live, v):
    return probes.respond(live, vindex=v.path, texts=iter(TEXTS))


@pytest.fixture
def copy(tiny_vindex, tmp_path):
    return shutil.copytree(tiny_vindex, tmp_path / "copy.vindex")


def noise(seed, width=32):
    return torch.randn(2, 256, width, generator=torch.Generator().manual_seed(seed))


def test_a_planted_response_is_found_exactly_and_the_others_get_the_null(live, v):
    """Layer 1 reads noise x and writes (v·x) d, d of length 3, plus a constant: that is v's response, no other's."""
    x, d = noise(1), noise(2)[0, 0]
    d = 3 * d / d.norm()
    planted = torch.tensor(v.gate[1, 5].astype(np.float32))
    with edited(live.model, {("mlp_in", 1): lambda _: x, ("mlp_out", 1): lambda _: (x @ planted)[..., None] * d + 7.0}):
        r = probes.respond(live, vindex=v, texts=TEXTS)
    r2, null, random, slope, tokens, mean_random = r.figures[32:64].T
    assert (r2[5], slope[5], tokens[5]) == (pytest.approx(1, abs=1e-5), pytest.approx(3, rel=1e-4), N)
    np.testing.assert_allclose(r.direction[32 + 5], d / 3, atol=1e-3)
    assert null[5] < 0.05 and r.strongest(1)[0]["feature"] == 5 and r.strongest(1)[0]["layer"] == 1
    others = np.delete(np.arange(32), 5)  # at right angles to v: what they read is independent of it
    assert 0.4 < r2[others].mean() * (N - 1) < 1.8 and (r2[others] > null[others]).sum() <= 6
    assert mean_random[0] == pytest.approx(1 / 32, rel=0.3), "a random direction has its squared cosine with v"
    assert random[0] > mean_random[0] > 5 / (N - 1)


def test_a_planted_place_is_found_with_its_z_and_its_words(live, copy):
    """Layer 1 reads noise, but 30 v at token 100 of the story and −20 v at token 7 of the factual text."""
    x, v = noise(1), vindex.open(copy)
    planted = torch.tensor(v.gate[1, 5].astype(np.float32))
    x[1, 100], x[0, 7] = 30 * planted, -20 * planted
    x[:, 0] = 99 * planted  # where sinks are left out
    with edited(live.model, {("mlp_in", 1): lambda _: x, ("mlp_out", 1): lambda _: noise(3)}):
        v = probes.respond(live, vindex=v, texts=TEXTS).add()
    read = (x[:, 1:].reshape(-1, 32).double() @ planted.double()).numpy()
    best, *_, last = sorted((read - read.mean()) / read.std())[::-1]
    first, against = v.snippets(1, 5)[0], v.snippets(1, 5)[3]
    assert (first.pole, first.text, first.position) == ("+", "story", 100) and first.z == pytest.approx(best, rel=1e-5)
    assert (against.pole, against.text, against.position) == ("−", "factual", 7)
    assert against.z == pytest.approx(last, rel=1e-5)
    words = [v.piece(token) for token in encode(live.tokenizer, texts.read("story")).ids[92:104]]
    assert (first.before, first.token, first.after) == ("".join(words[:8]), words[8], "".join(words[9:]))
    assert [one.pole for one in v.snippets(1, 5)] == ["+"] * 3 + ["−"] * 3 and vindex.verify(v).holds
    assert first.z > 10 and all(abs(one.z) < 5 for f in (4, 6) for one in v.snippets(1, f)), "at right angles to it"


def test_where_nothing_depends_on_what_is_read_every_direction_gets_the_null(live, v):
    y = noise(3)
    with edited(live.model, {("mlp_out", 2): lambda _: y}):
        r = probes.respond(live, vindex=v, texts=TEXTS)
    r2, null, random, _, _, mean_random = r.figures[64:].T
    assert 0.85 < r2.mean() * (N - 1) < 1.15 and 0.85 < mean_random[0] * (N - 1) < 1.15
    assert (r2 > null).mean() <= 0.25 and (r2 > random).mean() <= 0.25
    row = r.rows()[2]
    assert row["permuted"] == pytest.approx(1 / (N - 1)) and row["tokens"] == N and row["beyond"] <= 0.25


def test_the_figures_are_those_of_least_squares(live, v, found):
    """Layer 0 by hooks of our own, one text at a time, and numpy's least squares."""
    read, wrote = [], []
    for name in TEXTS:
        ids = torch.tensor([encode(live.tokenizer, texts.read(name)).ids[:256]])
        with torch.inference_mode(), capture(live.model, [("mlp_in", 0), ("mlp_out", 0), ("residual", 0)]) as seen:
            live.model(ids)
        norms = seen["residual", 0][0].norm(dim=1)
        kept = (norms <= 10 * norms.median()) & (torch.arange(256) > 0)
        read.append(seen["mlp_in", 0][0, kept].double().numpy())
        wrote.append(seen["mlp_out", 0][0, kept].double().numpy())
    x, y = np.concatenate(read), np.concatenate(wrote)
    for feature in (0, 7, 31):
        a = x @ v.gate[0, feature].astype(np.float64)
        slope = np.linalg.lstsq(np.stack([a, np.ones_like(a)], axis=1), y, rcond=None)[0][0]
        rest = y - y.mean(0) - np.outer(a - a.mean(), slope)
        r2, _, _, length, tokens, _ = found.figures[feature]
        assert tokens == len(x) and length == pytest.approx(np.linalg.norm(slope), rel=1e-4)
        assert r2 == pytest.approx(1 - (rest**2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-3)
        np.testing.assert_allclose(found.direction[feature], slope / np.linalg.norm(slope), atol=1e-3)


def test_over_all_permutations_r2_is_one_over_n_less_one_whatever_the_numbers():
    generator = torch.Generator().manual_seed(0)
    a, y = (torch.randn(6, width, generator=generator).pow(5) for width in (3, 4))  # with heavy tails
    both = linear.centred(a, y)
    shares = [both.share(both.products(torch.tensor(order))) for order in permutations(range(6))]
    torch.testing.assert_close(torch.stack(shares).mean(0), torch.full((3,), 1 / 5), rtol=1e-4, atol=0)


def test_one_unrelated_direction_in_twenty_passes_all_permutations_however_the_numbers_are_distributed():
    generator = torch.Generator().manual_seed(1)
    passed = [
        linear.respond(
            torch.randn(40, 60, generator=generator).pow(3), torch.randn(40, 3, generator=generator), generator
        )
        for _ in range(40)
    ]
    assert np.mean([float((each.r2 > each.null).float().mean()) for each in passed]) == pytest.approx(0.05, abs=0.015)


def test_what_is_constant_and_what_fires_at_two_tokens_have_no_response():
    generator = torch.Generator().manual_seed(0)
    a, y = torch.randn(50, 3, generator=generator), torch.randn(50, 4, generator=generator)
    a[:, 1] = 1e3
    some = linear.respond(a, y, generator)
    assert some.r2[1] == some.null[1] == some.slope[1] == 0 and not some.direction[1].any() and some.r2[0] > 0
    for none in (linear.respond(a[:2], y[:2], generator), linear.respond(a, torch.ones(50, 4), generator)):
        assert not any(part.any() for part in none[:4])
    at = torch.arange(50) + 7
    found = linear.strongest(a, at)
    assert found[0, 0, 0] == 7 + a[:, 0].argmax() and found[0, 0, 3] == 7 + a[:, 0].argmin()
    assert (found[0, 1] == -1).all() and not found[1, 1].any(), "what is constant is read most nowhere"
    assert (linear.strongest(a[:2], at[:2])[0] == -1).all()
    assert not linear.explained(a[:2], y[:2]).any()


@pytest.mark.parametrize("kind", ["mixed", "qwen2_moe"])
def test_an_expert_responds_at_the_tokens_at_which_it_fires(kind, tmp_path):
    model, target = save(kind, tmp_path / "model"), tmp_path / "m.vindex"
    extract.build(model, target, features=4, threads=1)
    loaded, v = probes.load(model, device="cpu", dtype="float32"), vindex.open(target)
    r = probes.respond(loaded, vindex=v, texts=TEXTS[:1])
    ids = torch.tensor([encode(loaded.tokenizer, texts.read("factual")).ids[:256]])
    wanted = [(role, 0) for role in ("routed", "chosen", "router_weight", "residual")]
    with torch.inference_mode(), capture(loaded.model, wanted) as seen:
        loaded.model(ids)
        routed, chosen, weight, residual = (seen[site].reshape(256, -1) for site in wanted)
        (mixture, *_) = ffns(loaded.model)
        added = {one.expert: one for one in outputs(mixture, fire(mixture, routed, chosen, weight))}
    norms = residual.norm(dim=1)
    kept = (norms <= 10 * norms.median()) & (torch.arange(256) > 0)
    for expert in (2, max(added)):  # the last one is the shared one where there is one
        own = kept[added[expert].token]
        x, y = routed[added[expert].token[own]].double().numpy(), added[expert].output[own].double().numpy()
        a = x @ v.layer(0).gate[expert, 1].astype(np.float64)
        slope = (a - a.mean()) @ (y - y.mean(0)) / np.square(a - a.mean()).sum()
        row = v.row(0, 1, expert)
        assert r.figures[row, 4] == len(x) and r.figures[row, 3] == pytest.approx(np.linalg.norm(slope), rel=1e-3)
        np.testing.assert_allclose(r.direction[row], slope / np.linalg.norm(slope), atol=2e-3)
        assert int(r.places[0, row, 0]) == added[expert].token[own][a.argmax()]
    again = r.add()
    assert vindex.verify(again).holds and again.response(0, 1, expert=2).tokens == r.figures[v.row(0, 1, 2), 4]
    assert {"expert" in row for row in r.strongest(1000)} == ({True, False} if kind == "mixed" else {True})


def test_the_result_is_a_record_rows_and_a_line(found, v, tmp_path):
    found.save(tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["record"] == "vindex-responses/1" and record["vindex"] == v.id and len(record["strongest"]) == 10
    assert record["measured"]["texts"].keys() == set(TEXTS) and record["measured"]["permutations"] == 19
    assert [row["layer"] for row in record["layers"]] == [0, 1, 2] and repr(found).startswith(
        "<96 responses of tiny-qwen3"
    )
    assert "<table>" in found._repr_html_()
    strong = found.strongest(1)[0]
    assert strong["reads"] == [token.piece for token in v.feature(strong["layer"], strong["feature"]).reads]


def test_measuring_writes_nothing_and_adding_twice_replaces(live, copy, found):
    r = probes.respond(live, vindex=vindex.open(copy), texts=TEXTS)
    assert not vindex.open(copy).index.has_responses
    np.testing.assert_array_equal(r.figures, found.figures)
    once = r.add()
    assert vindex.verify(once).holds and once.response_stats.r2[0, 3] == np.float32(found.figures[3, 0])
    again = probes.respond(live, vindex=once, texts=["code"]).add()
    assert list(again.manifest.responses.texts) == ["code"] and vindex.verify(again).holds and again.id == once.id


def test_bad_input_is_one_line(live, v, tmp_path, built_mixture):
    with pytest.raises(ProbeError, match="text story: given twice, and each counts once"):
        probes.respond(live, vindex=v, texts=["story", "code", "story"])
    with pytest.raises(ProbeError, match=r"text .*short.txt: \d+ tokens with this tokenizer, 256 needed"):
        (tmp_path / "short.txt").write_text("too short")
        probes.respond(live, vindex=v, texts=[str(tmp_path / "short.txt")])
    with pytest.raises(ProbeError, match="has num_layers 3, the model|has hidden_size"):
        probes.respond(live, vindex=vindex.open(built_mixture))


def test_a_vindex_of_other_weights_is_refused_by_its_hash(live, tiny_checkpoint, copy, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    live.model.save_pretrained(other)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = (copy / "SHA256SUMS").read_bytes()
    assert run(monkeypatch, "respond", other, copy, "--text", "story") == 1
    shown = capsys.readouterr()
    assert "has SHA-256" in shown.err and "the vindex was built from" in shown.err
    assert (copy / "SHA256SUMS").read_bytes() == before and not shown.out


def test_the_command_adds_and_shows(tiny_checkpoint, copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    common = ("respond", tiny_checkpoint, copy.name, "--text", "story", "--device", "cpu")
    assert run(monkeypatch, *common, "-o", "r.json", "--plot", "r.html", "-k", 2) == 0
    shown = capsys.readouterr()
    assert max(map(len, shown.out.splitlines())) <= 60 and "1 text of 256 tokens" in shown.out
    for words in (
        "random",
        "permuted",
        "beyond",
        "reads → writes",
        "next: vindex feature copy.vindex",
        "added 96 responses",
    ):
        assert words in " ".join(shown.out.split())
    assert "Plotly.newPlot" in Path("r.html").read_text() and vindex.verify(vindex.open(copy)).holds
    assert run(monkeypatch, "plot", "r.json", "-o", "again.html") == 0
    assert capsys.readouterr().out == "wrote again.html: open it in a browser\n"
    assert run(monkeypatch, *common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == json.loads(Path("r.json").read_text())["layers"]


@pytest.mark.parametrize("option", [("--plot", "x.svg"), ("-o", "nowhere/x.json")])
def test_places_that_do_not_do_are_refused_before_the_work(option, copy, monkeypatch, capsys):
    monkeypatch.setattr("probes.cli.respond.load_model", None)
    assert run(monkeypatch, "respond", "atlas", copy, *option) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not vindex.open(copy).index.has_responses


def test_a_place_that_cannot_be_changed_is_refused_before_the_work(copy, monkeypatch, capsys):
    monkeypatch.setattr("probes.cli.respond.load_model", None)
    (copy / "mine.txt").write_text("")
    assert run(monkeypatch, "respond", CHECKPOINT, copy) == 1
    assert "holds mine.txt, which this tool did not write" in capsys.readouterr().err


def test_ctrl_c_leaves_the_vindex_as_it_was(copy, monkeypatch, capsys):
    def stopped(*of, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("probes.cli.respond.load_model", stopped)
    assert run(monkeypatch, "respond", "atlas", copy) == 130
    assert f"stopped; {copy} is as it was" in capsys.readouterr().err
