#!/usr/bin/env bash
# From a fresh checkout to a validated CQIL engine on this machine, on the CPU: installs into .venv, fetches
# SmolLM2-135M, compiles it for two ranks, generates text and compares the engine with the PyTorch reference.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

python builders/build.py --p 2 --d 0
echo
mpirun -n 2 python runtime/run.py --chat --stream --prompt "Explain in one sentence why the sky is blue."
echo
mpirun -n 2 python runtime/run.py --validate
