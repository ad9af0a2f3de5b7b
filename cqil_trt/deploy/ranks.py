"""`python -m cqil_trt.deploy.ranks ENGINE` prints how many ranks an engine was built for."""

from __future__ import annotations

import sys
from pathlib import Path

from cqil_trt.engine import Engine
from cqil_trt.errors import UserError
from cqil_trt.job import command


def main(arguments: list[str]) -> None:
    with command():
        if len(arguments) != 1:
            raise UserError("expected the directory of one engine")
        print(Engine.open(Path(arguments[0])).world_size)


if __name__ == "__main__":
    main(sys.argv[1:])
