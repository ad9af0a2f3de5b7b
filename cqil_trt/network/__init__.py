"""The network definition: `decoder`, written once against `ops.Ops`, which each backend implements in its folder."""
