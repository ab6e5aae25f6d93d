"""What is read for a GPU is what is stored; on the CPU nothing is copied that need not be."""

from __future__ import annotations

import pytest
import torch

from extract.checkpoint import open_checkpoint
from extract.device import bfloat16_products, fetched, whole_products, wide
from tests.checkpoints import write_checkpoint
from tests.extract.test_svd import spectrum_matrix


@pytest.fixture(scope="module")
def stored() -> torch.Tensor:
    return spectrum_matrix(140, 110).bfloat16().float()


def test_on_the_cpu_all_is_float32_and_stays_where_it_is(stored):
    assert wide(stored, "cpu") is stored and fetched(stored) is stored
    small = stored.bfloat16()
    for sent in (wide(small, "cpu"), wide(small.T, "cpu").T):
        assert sent.dtype == torch.float32 and sent.equal(stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_read_into_the_memory_that_is_given(tmp_path, dtype):
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "tiny", hidden=32, dtype=dtype)))
    lent: list[torch.Tensor] = []

    def memory(size: int) -> torch.Tensor:
        lent.append(torch.full((size,), 255, dtype=torch.uint8))
        return lent[-1]

    name = "model.embed_tokens.weight"
    there = checkpoint.reading_into(memory)
    whole, blocks = there.stored(name), [rows for _, rows in there.row_blocks(name)]
    assert [block.data_ptr() for block in (whole, *blocks)] == [block.data_ptr() for block in lent]
    assert whole.dtype == dtype and whole.equal(checkpoint.stored(name)) and torch.cat(blocks).equal(whole)
    assert checkpoint.stored(name).data_ptr() not in {block.data_ptr() for block in lent} and len(lent) == 2


@pytest.mark.parametrize("choice", ["highest", "high"])
def test_tf32_is_off_inside_and_as_it_was_afterwards(choice):
    products = torch.backends.cuda.matmul
    default = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(choice)
        before = products.fp32_precision
        with pytest.raises(KeyError), whole_products():
            assert products.fp32_precision == "ieee"
            raise KeyError
        assert products.fp32_precision == before and torch.get_float32_matmul_precision() == choice
    finally:
        torch.set_float32_matmul_precision(default)


def test_the_precision_of_products_on_the_cpu_is_as_it_was_after_either_context():
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with whole_products():
        assert products.fp32_precision == "ieee"
        with bfloat16_products():
            assert products.fp32_precision == "bf16"
        assert products.fp32_precision == "ieee"
    assert products.fp32_precision == before
