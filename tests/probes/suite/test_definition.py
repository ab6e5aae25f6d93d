"""Every free choice stands in the docs with its sentence, in the record, and nowhere else in the suite."""

import ast
import inspect
from itertools import pairwise
from pathlib import Path

from probes import suite
from probes.records import plain
from probes.suite import definition

DOCS = Path(__file__).parents[3] / "docs" / "probes.md"


def rows() -> dict[str, str]:
    """The table of choices: name in the record, value, and the sentence that follows it in the source."""
    found = {}
    for node, text in pairwise(ast.parse(inspect.getsource(definition)).body):
        if isinstance(node, ast.Assign) and isinstance(text, ast.Expr) and node.targets[0].id != "VERSION":
            name = node.targets[0].id.lower()
            value = " ".join(f"{one:g}" for one in _several(definition.choices()[name]))
            found[name] = f"| `{name}` | {value} | {' '.join(ast.literal_eval(text.value).split())} |"
    return found


def _several(value):
    return value if isinstance(value, tuple) else (value,)


def test_the_documented_table_is_the_one_in_the_code():
    assert rows().keys() == definition.choices().keys()
    written = DOCS.read_text(encoding="utf-8").splitlines()
    missing = [row for row in rows().values() if row not in written]
    assert not missing, "\n".join(missing)


def test_the_record_has_every_choice(made):
    assert made[2]["choices"] == plain(definition.choices())


def test_no_other_module_of_the_suite_keeps_a_number_of_its_own():
    for path in Path(suite.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body if path.name != "definition.py" else ():
            numbers = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]
            assert not (isinstance(node, ast.Assign | ast.AnnAssign) and numbers), f"{path.name}: {ast.unparse(node)}"
