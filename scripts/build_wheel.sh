#!/usr/bin/env bash
# Builds a wheel with the compiled kernels inside, and checks it: scripts/build_wheel.sh [DIRECTORY], by default dist/.
# Needs the project's environment (source scripts/environment.sh), cmake, and nvcc 13 on the PATH. The variant for
# drivers of CUDA 12 is added where a CUDA 12 toolkit is in /usr/local, or in CQIL_WHEEL_TOOLKIT_12.
# CQIL_WHEEL_ARCHITECTURES picks the GPUs (default "80;90;100;120", as far as nvcc knows them); CQIL_WHEEL_LIBRARIES names
# a directory of libraries that are compiled already. CMAKE_BUILD_PARALLEL_LEVEL limits how many compilers run.
set -euo pipefail
target=$(realpath -m "${1:-dist}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
libraries=${CQIL_WHEEL_LIBRARIES:-$work/libraries}

compile() {
    python -m cqil_trt.kernels build --package "$libraries" \
        ${CQIL_WHEEL_ARCHITECTURES:+--architectures "$CQIL_WHEEL_ARCHITECTURES"}
}

if [ -z "${CQIL_WHEEL_LIBRARIES:-}" ]; then
    compile
    # One, the newest: there is one library for each major version.
    found=$(find /usr/local/cuda-12*/bin -name nvcc -executable 2>/dev/null | sort -V | tail -n 1 || true)
    toolkit=${CQIL_WHEEL_TOOLKIT_12:-${found%/bin/nvcc}}
    if [ -n "$toolkit" ]; then
        PATH="$toolkit/bin:$PATH" CUDACXX="$toolkit/bin/nvcc" compile
    fi
fi
CQIL_WHEEL_LIBRARIES=$libraries python -m pip wheel --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --wheel-dir "$work/wheel" .
auditwheel show "$work"/wheel/*.whl
# Renames the wheel to the oldest manylinux that its libraries run on; they need no others.
auditwheel repair --wheel-dir "$target" "$work"/wheel/*.whl
