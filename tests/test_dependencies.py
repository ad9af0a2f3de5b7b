"""pyproject.toml says of every dependency from which release on it works, and why it is there.

That the bounds are true is what scripts/lowest_versions.sh shows.
"""

import re

from packaging.requirements import Requirement
from packaging.version import Version
from support import ROOT

TEXT = (ROOT / "pyproject.toml").read_text()


def entries():
    """Each requirement of the lists of dependencies, with its comment."""
    lists = re.findall(r"^[\w-]+ = \[\n(.*?)^\]$", TEXT.split("[project.scripts]")[0], re.MULTILINE | re.DOTALL)
    for line in "".join(lists).splitlines():
        requirement, _, comment = line.strip().partition("#")
        if requirement:
            yield Requirement(requirement.strip().rstrip(",").strip('"')), comment.strip()


def test_each_dependency_has_a_lower_bound_a_reason_and_a_licence():
    found = list(entries())
    assert len(found) > 50
    for requirement, comment in found:
        if requirement.name == "cqil-trt":  # its own extras
            continue
        operators = {bound.operator for bound in requirement.specifier}
        assert operators & {">=", "=="}, f"{requirement}: no lower bound"
        assert re.fullmatch(r"\S.+ \([^()]+\)", comment), f"{requirement}: no reason with a licence"


def test_a_package_has_one_lower_bound():
    bounds: dict[str, set[Version]] = {}
    for requirement, _ in entries():
        bounds.setdefault(requirement.name, set()).update(
            Version(bound.version) for bound in requirement.specifier if bound.operator in (">=", "==")
        )
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}
