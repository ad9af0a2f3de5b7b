#!/bin/sh
# Serves the engine in $CQIL_ENGINE with as many ranks as it was built for. Arguments go to cqil-serve.
set -eu
ranks=$(python3 -m cqil_trt.deploy.ranks "$CQIL_ENGINE")
exec mpirun -n "$ranks" cqil-serve --engine "$CQIL_ENGINE" --host 0.0.0.0 --port "${CQIL_PORT:-8000}" "$@"
