"""The documentation's references to the code hold."""

import ast
import re

import pytest
from support import ROOT

ROWS = [
    line
    for line in (ROOT / "docs" / "models.md").read_text().splitlines()
    if re.match(r"\| (?!---|kind |field |name )", line)
]


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:60] for row in ROWS])
def test_every_kind_of_model_is_backed_by_a_test(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.rsplit(" | ", 1)[-1])
    assert named
    for file, name in named:
        functions = [
            node.name for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text())) if hasattr(node, "name")
        ]
        assert name in functions, f"{file} has no {name}"
