"""CQIL on Hugging Face's own modules, in one process: the judge of every engine, and the model that is trained.

Nothing here is shared with `network/`: attention, MLP and norms are the Hugging Face model's own, and so are its
forward loop, masks, cache and generate().
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from cqil_trt.config import CqilConfig
from cqil_trt.errors import UserError


class CqilModel(nn.Module):
    """A Hugging Face causal language model with CQIL's forward pass.

    The modules are shared with `model` and keep their names, so PEFT and Trainer work on it and an adapter trained
    with it fits the original model. Everything else (`config`, `generate`, `device`, …) is the model's own. While the
    wrapper exists `model` itself computes CQIL too; inside `with wrapper.sequential():` both compute the original.

    Raises UserError when the range does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        p: int = 2,
        d: int = 0,
        start: int | None = None,
        end: int | None = None,
        bypass: str = "mlp",
    ):
        super().__init__()
        layers = model.get_submodule("model.layers")
        self.cqil = CqilConfig.choose(len(layers), p, d, start, end, bypass)
        # Registered under the model's own names, and the model itself not: parameter names stay the checkpoint's.
        for name, child in model.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_model", model)
        for layer in layers:  # a model wrapped before starts over
            layer.__dict__.pop("forward", None)
        for group in self.cqil.groups:
            members = [layers[index] for index in group]
            members[0].cqil_members = tuple(members[1:])
            members[0].cqil_config = self.cqil
            members[0].forward = MethodType(_group_forward, members[0])
            for layer in members[1:]:
                layer.forward = MethodType(_absorbed_forward, layer)

    # Trainer reads the names of the columns it feeds from this signature.
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the Hugging Face model's forward, which takes more: position_ids, past_key_values, inputs_embeds, …"""
        return self._model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_model")
            if model is None:
                raise
            return getattr(model, name)

    @contextmanager
    def sequential(self) -> Iterator[None]:
        """Inside, the layers run one after the other: the original model."""
        layers = self.get_submodule("model.layers")
        installed = [(layer, layer.__dict__.pop("forward")) for layer in layers if "forward" in layer.__dict__]
        try:
            yield
        finally:
            for layer, method in installed:
                layer.forward = method


def _group_forward(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The forward of a group's first layer: the whole group. `self` is that Hugging Face decoder layer."""
    cqil: CqilConfig = self.cqil_config
    members = (self, *self.cqil_members)
    x = hidden_states
    attended = [layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)[0] for layer in members]
    output = x
    for j, (layer, a) in enumerate(zip(members, attended)):
        before = attended[max(0, j - cqil.d) : j]
        b = sum(before[1:], before[0]) if before else None
        mlp_input = x + a if b is None else x + a + b
        m = layer.mlp(layer.post_attention_layernorm(mlp_input))
        output = output + a + m
        if b is not None and cqil.bypass == "residual":
            output = output + b
    return output


def _absorbed_forward(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The forward of a group's other layers, which ran within the first."""
    return hidden_states


def load_hugging_face(model: str, lora: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Hugging Face model of a directory or .gguf file, with an adapter merged by PEFT, in evaluation mode.

    Raises UserError when transformers or PEFT cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = Path(model)
    place, options = (path, {}) if path.suffix != ".gguf" else (path.parent, {"gguf_file": path.name})
    if not path.exists():
        raise UserError(f"the reference needs {path}, which the engine was built from and is gone")
    # transformers shows a progress bar for GGUF that it cannot be told to leave out of a log file.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with quiet:
            network = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, trust_remote_code=False, local_files_only=True, **options
            )
        if lora is not None:
            from peft import PeftModel

            network = PeftModel.from_pretrained(network, lora).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the reference cannot be loaded from {model}: {error}") from None
    return network.eval()


@torch.inference_mode()
def score(model: nn.Module, prompt: Sequence[int]) -> torch.Tensor:
    """Logits after every token of the prompt, float32 [tokens, vocabulary]."""
    return model(torch.tensor([list(prompt)]), use_cache=False).logits[0].float()


@torch.inference_mode()
def greedy(model: nn.Module, prompt: Sequence[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """`steps` greedy tokens, and the logits each was chosen from, float32 [steps, vocabulary]."""
    tokens: list[int] = []
    logits: list[torch.Tensor] = []
    new, cache = list(prompt), None
    for _ in range(steps):
        out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
        new = tokens[-1:]
    return tokens, torch.stack(logits)
