"""The commands: they parse and print, the library does the work."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from cqil_trt.errors import UserError


class Parser(argparse.ArgumentParser):
    """A wrong argument is an error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class RankParser(Parser):
    """All ranks parse the same arguments; one of them speaks."""

    speaks = True

    def print_help(self, file: Any = None) -> None:
        if self.speaks:
            super().print_help(file)
