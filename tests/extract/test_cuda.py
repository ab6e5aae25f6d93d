"""A build on a GPU says what a build on the CPU says. Run by `pytest -m cuda` where torch sees one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from extract.cast import to_half
from extract.checkpoint import open_checkpoint
from extract.device import page_locked, wide
from extract.rederive import evenly, rederive, sample_blocks
from extract.svd import top_directions
from tests.checkpoints import write_checkpoint, write_mixture
from tests.conftest import build_quietly
from tests.extract.test_svd import spectrum_matrix
from vindex import format as form
from vindex.checks import verify
from vindex.errors import NumericError
from vindex.reader import open_vindex

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

FEATURES = 24
SIGMA = 1e-4  # relative: what `verify --source` allows
SCORE = 2e-3  # of a token at a pole, whose direction may turn by residual / gap, as a share of the layer's largest


@pytest.fixture(scope="module")
def stored() -> torch.Tensor:
    """(1400, 1104) bfloat16, large enough for the iteration."""
    return spectrum_matrix(1400, 1104).bfloat16()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two layers large enough for the iteration, in bfloat16, untied."""
    directory = tmp_path_factory.mktemp("cuda") / "tiny"
    return write_checkpoint(directory, hidden=512, neurons=768, vocabulary=3000, tied=False)


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory):
    """Vindexes of it made on the GPU and on the CPU."""
    where = tmp_path_factory.mktemp("vindex")
    for device in ("cuda", "cpu"):
        build_quietly(checkpoint, where / device, device=device, features=FEATURES)
    return tuple(open_vindex(where / device) for device in ("cuda", "cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_arrives_as_it_was_stored(stored, dtype):
    weight = stored.to(dtype)
    there = wide(weight.T, "cuda")
    assert there.is_cuda and there.dtype == torch.float32 and there.stride() == weight.T.stride()
    assert there.cpu().equal(weight.T.float())


def test_reading_for_a_gpu_uses_page_locked_memory_again(checkpoint):
    name, source = "model.layers.0.mlp.gate_proj.weight", open_checkpoint(str(checkpoint))
    there, places = source.reading_into(page_locked), set()
    for _ in range(8):
        stored = there.stored(name)
        assert stored.is_pinned() and stored.equal(source.stored(name))
        assert wide(stored, "cuda").cpu().equal(source.tensor(name))
        places.add(stored.data_ptr())
    assert len(places) < 4  # two by turns: the next is read while `stored` still stands for the last


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_directions_are_certified_and_those_of_the_cpu(stored, turned, seed):
    """Of a spectrum like a real one's, and of flat ones, where the small eigenproblem has 256 rows."""
    weight = stored if seed is None else torch.randn(768, 512, generator=torch.Generator().manual_seed(seed)).bfloat16()
    weight = weight.T.contiguous().T if turned else weight
    ours = top_directions(wide(weight, "cuda"), FEATURES, 1e-4, "t")
    theirs = top_directions(weight.float(), FEATURES, 1e-4, "t")
    assert ours.rows.is_cuda and ours.rank == theirs.rank == FEATURES and ours.method == theirs.method
    assert ours.residuals.max() < min(1e-5, 10 * theirs.residuals.max())
    torch.testing.assert_close(ours.sigma.cpu(), theirs.sigma, rtol=SIGMA, atol=0)
    overlaps = torch.linalg.svdvals(ours.rows.cpu() @ theirs.rows.T)
    torch.testing.assert_close(overlaps, torch.ones(FEATURES), rtol=0, atol=1e-4)


def test_a_bad_entry_is_named_on_the_gpu_too(stored):
    broken = stored.clone()
    broken[7, 11] = torch.nan
    with pytest.raises(NumericError, match=r"\[7, 11\] is nan"):
        top_directions(wide(broken, "cuda"), FEATURES, 1e-4, "t")


def test_halves_and_their_report_are_the_same_bits(stored):
    source = stored.float() * torch.logspace(-9, 0, stored.shape[1])
    ours, theirs = to_half(source.to("cuda"), "t"), to_half(source, "t")
    assert (
        ours.values.is_pinned()
        and ours.values.equal(theirs.values)
        and ours[1:] == theirs[1:]
        and theirs.flushed_to_zero > 0
    )


def test_certificates_hold(built):
    """As those of the CPU do, not only within the tolerance."""
    worst = []
    for v in built:
        certificates = v.manifest.certificates
        assert {certificate.method for certificate in certificates} == {"block-lanczos"} and len(certificates) == 4
        worst.append(max(certificate.max_residual for certificate in certificates))
    assert worst[0] < 1e-5 and worst[0] < 10 * worst[1]


def test_verify_passes_beside_the_source_on_the_cpu(built, checkpoint):
    ours, _ = built
    assert all(check.holds for check in verify(ours))
    source = open_checkpoint(str(checkpoint))
    found = list(rederive(ours, source, sample_blocks(ours, source, evenly(2, 2), 1)))
    assert len(found) == 4 and all(weight.holds for weight in found), found


def test_what_is_only_cast_has_the_same_bytes(built):
    ours, theirs = built
    for spec in (form.EMBEDDINGS, form.NORMS):
        assert (ours.path / spec.name).read_bytes() == (theirs.path / spec.name).read_bytes()
    np.testing.assert_allclose(ours.singular_values, theirs.singular_values, rtol=SIGMA)


def test_directions_have_the_same_tokens_at_their_poles(built):
    ours, theirs = built
    for file in (form.GATE_META, form.DOWN_META):
        mine, other = (_scores(v.path / file.name, v) for v in (ours, theirs))
        np.testing.assert_allclose(mine, other, atol=SCORE * np.abs(other).max())


def test_a_mixture_is_built(tmp_path):
    source = write_mixture(tmp_path / "mixture")
    build_quietly(source, tmp_path / "v", device="cuda", features=4)
    assert all(check.holds for check in verify(open_vindex(tmp_path / "v")))


def _scores(path, v) -> np.ndarray:
    """(L, F, 2 POLE) scores of a meta file."""
    records = [
        np.frombuffer(path.read_bytes(), form.meta_record(form.META_TOP_K), FEATURES, start + form.META_COUNT.itemsize)
        for start in (form.meta_offset(v.index, layer) for layer in range(v.index.num_layers))
    ]
    return np.stack([each["tokens"]["score"] for each in records])
