#!/usr/bin/env bash
# Are the lower bounds in pyproject.toml true? Installs the lowest releases that they allow, on the lowest Python, into
# .venv-lowest, and runs the style checks and the fast tests there. Arguments go to pytest.
# It needs uv (pip install uv): pip has no choice of the lowest releases. uv finds that Python or downloads it; PYTHON
# names one otherwise. It takes 7 GB, because PyTorch from PyPI brings CUDA's libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v uv > /dev/null; then
    echo "error: uv is needed: pip install uv" >&2
    exit 2
fi
environment=.venv-lowest
lowest=$(sed -n 's/^requires-python = ">=\(.*\)"$/\1/p' pyproject.toml)
[ -x "$environment/bin/python" ] || uv venv --quiet --seed --python "${PYTHON:-$lowest}" "$environment"
uv pip install --quiet --python "$environment" --upgrade --resolution lowest-direct --editable '.[torch,test]'
export PATH="$PWD/$environment/bin:$PATH"

ruff check .
ruff format --check .
mypy
lint-imports --no-logo --no-cache
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
