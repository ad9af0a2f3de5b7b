"""`python -m cqil_trt.kernels build`: compiles the CUDA kernels."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cqil_trt.commands import Parser
from cqil_trt.gpu import kernel_library
from cqil_trt.job import command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m cqil_trt.kernels", description="Build the CUDA kernels.")
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("build", help="compile the library (needs cmake and nvcc)")
    make.add_argument("--tensorrt-root", type=Path, metavar="DIR", help="with TensorRT plugins, from headers in DIR")
    make.add_argument("--architectures", metavar="LIST", help='e.g. "80;90" (default: all that apply)')
    make.add_argument("--output", type=Path, metavar="FILE", help=f"default: the cache ({kernel_library.LIBRARY})")
    make.add_argument("--package", type=Path, metavar="DIR", help="for a wheel: DIR/cudaN/, with a record")
    actions.add_parser("path", help="print where the library is")
    with command():
        options = parser.parse_args(arguments)
        if options.action == "build":
            print("compiling (about five minutes on two cores) ...", file=sys.stderr)
            given = options.tensorrt_root or os.environ.get("TENSORRT_ROOT")
            root = Path(given) if given else None
            progress = sys.stderr.isatty()
            if options.package is not None:
                print(kernel_library.build_packaged(options.package, root, options.architectures, progress))
            else:
                print(kernel_library.build(root, options.architectures, options.output, progress))
        else:
            print(kernel_library.library_path())


if __name__ == "__main__":
    main()
