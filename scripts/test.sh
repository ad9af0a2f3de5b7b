#!/usr/bin/env bash
# Runs style checks and all tests in .venv; arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check .
exec python -m pytest "$@"
