"""A training of a few steps, and data for it."""

from __future__ import annotations

from probes.gates.data import read_forget, read_retain
from probes.gates.encode import forget_example, retain_example
from probes.gates.options import TrainOptions
from probes.gates.train import Data

SHORT = TrainOptions(batch_size=4, micro_batch=4, max_steps=4)


def data_for(loaded, options: TrainOptions, count: int = 40) -> Data:
    settings = {"chat": options.chat, "max_tokens": options.max_tokens}
    facts, sums = read_forget(None, count)[0], read_retain(None, count)[0]
    return Data(
        [forget_example(row, loaded.tokenizer, **settings) for row in facts],
        [retain_example(row, loaded.tokenizer, **settings) for row in sums],
        {"rows": count},
    )
