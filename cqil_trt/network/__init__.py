"""The network definition: `decoder.py`, written once against `ops.Ops`; each backend is one file beside it."""
