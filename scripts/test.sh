#!/usr/bin/env bash
# Runs style checks and all tests in .venv, two files at a time; --fast leaves out the slow ones. Other arguments go to
# pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

options=(-n 2 --dist loadfile --no-loadscope-reorder)
if nvidia-smi > /dev/null 2>&1; then
    options=()  # tests would share the GPUs, whose memory and time limits are for one
fi
if [ "${1:-}" = --fast ]; then
    shift
    options+=(-m "not slow")
fi
ruff check .
ruff format --check .
find plugins tests -name "*.cu" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.h" | xargs clang-format --dry-run --Werror
mypy
lint-imports --no-logo --no-cache
exec python -m pytest "${options[@]}" "$@"
