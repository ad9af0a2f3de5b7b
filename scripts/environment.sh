# Sourced by the other scripts: creates .venv in the checkout once, and installs the project with its dependencies.
# CQIL_TORCH picks the PyTorch to install, e.g. CQIL_TORCH="torch==2.11.0". On PyPI a Linux torch brings CUDA's libraries
# (gigabytes); CQIL_TORCH_INDEX=https://download.pytorch.org/whl/cpu gets the small one for a machine without GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed: none found (set PYTHON=/path/to/python)" >&2
    return 2
}

# The stamp holds what was installed, so a changed pyproject.toml installs again.
stamp=.venv/.cqil-installed
wanted=$(sha256sum pyproject.toml | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    python=$(find_python)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    echo "installing into .venv (a few minutes the first time) ..." >&2
    install() {
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
    }
    torch=${CQIL_TORCH:-torch==2.13.0}
    if [ -n "${CQIL_TORCH_INDEX:-}" ]; then
        # That index is for torch alone. As an extra index, it could give any package of the same name as one on PyPI.
        install --no-deps --index-url "$CQIL_TORCH_INDEX" "$torch"
    fi
    install "$torch"
    install --editable '.[torch,test]'
    unset -f install
    echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
