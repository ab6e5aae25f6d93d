"""One tree of errors. A message says what was found, what was expected, where, and the way out, in one line."""


class VindexError(Exception):
    """Base of everything this project raises on purpose; the command prints it as one line and exits 1."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of somebody else's code says, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class FormatError(VindexError):
    """A vindex on disk does not follow docs/format.md."""


class CheckpointError(VindexError):
    """A model checkpoint is missing, damaged or of a kind that is not supported."""


class NumericError(VindexError):
    """A number is not finite, does not fit its type, or misses its certificate."""


class TargetError(VindexError):
    """The place to write to is taken, read-only or full."""


class EngineError(VindexError):
    """What runs the blocks of a build cannot be had, or failed: a scheduler, its workers, a missing extra."""


class QueryError(VindexError):
    """A question about a vindex or a model that it cannot answer: unknown token, layer out of range."""


class LackingError(QueryError):
    """A vindex does not hold what the answer needs; another one of the same model does."""


class ProbeError(VindexError):
    """A measurement on a live model cannot be made as asked."""


class FactError(ProbeError):
    """A fact, or a file of facts, cannot be used with this tokenizer or model."""


class PatchError(VindexError):
    """A patch or gate file does not fit the weights it is applied to."""
