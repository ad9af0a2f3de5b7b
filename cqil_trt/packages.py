"""Which required package is missing, and what installs it."""

from __future__ import annotations

from importlib.util import find_spec

from cqil_trt import backends

# Import names of packages that no backend lists, and the extra that installs each (None: a plain dependency).
_EXTRAS: dict[str, str | None] = {
    **dict.fromkeys(("numpy", "tqdm", "tokenizers", "sentencepiece", "jinja2", "safetensors", "pycparser", "blake3")),
    **dict.fromkeys(("gguf", "transformers", "peft", "huggingface_hub", "google"), "torch"),
    **dict.fromkeys(("datasets", "lm_eval", "matplotlib", "nltk"), "quality"),
    **dict.fromkeys(("uvicorn", "starlette", "pydantic", "prometheus_client", "llguidance"), "serve"),
    **dict.fromkeys(("ray", "aiohttp"), "ray"),
    "cuda": "cuda",
}


def check(extra: str) -> None:
    """Raises ModuleNotFoundError, which `missing` explains, for a package of this extra that is not installed."""
    for name, installs in _EXTRAS.items():
        if installs == extra and find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


def missing(error: ModuleNotFoundError) -> str | None:
    """The message for a user who lacks one of the required packages; None for any other package."""
    package = (error.name or "").partition(".")[0]
    extras = dict(_EXTRAS)
    for name in backends.names():
        extras = {**backends.load(name).packages, **extras}
    if package not in extras:
        return None
    extra = f"[{extras[package]}]" if extras[package] else ""
    return (
        f"{package} is needed and not installed here: source .venv/bin/activate, or in the checkout pip install "
        f"'.{extra}'"
    )
