"""Trains the adapter that recovers what CQIL loses: LoRA, distilled from the unchanged model (Zou et al., ACL 2024).

Teacher and student are one model in memory, run twice: the layers in sequence without the adapter, then CQIL with it.
The loss is the Kullback-Leibler divergence of the student's next-token distribution from the teacher's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from cqil_trt import families
from cqil_trt.config import CqilConfig
from cqil_trt.reference import CqilModel, device_of, peft_attributes

# Rows of logits whose float32 probabilities are in memory at a time.
_ROWS = 4096
# Tokens after the first, random one that are chosen greedily, as LLM-QAT samples from a model without data (arXiv
# 2305.17888, section 3.1): the text begins coherently and then varies.
_GREEDY_TOKENS = 4


class Student:
    """A Hugging Face model as teacher and student: with CQIL's forward pass and a fresh LoRA adapter.

    `model` is the PEFT model that is trained. `concurrent_only`: whether only `CqilConfig.changed_layers`
    are adapted. Raises UserError when the configuration does not fit the model.
    """

    def __init__(
        self,
        network: nn.Module,
        cqil: CqilConfig,
        rank: int,
        alpha: float,
        dropout: float,
        concurrent_only: bool = False,
    ):
        self.cqil = CqilModel.of(network, cqil)
        lora = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            # Every projection, as the authors of CQIL adapted them.
            target_modules=list(families.of_type(network.config.model_type).linear_modules),
            layers_to_transform=list(cqil.changed_layers) if concurrent_only else None,
            task_type="CAUSAL_LM",
        )
        with peft_attributes():
            self.model = get_peft_model(network, lora)
        self.divergence_of_rows = _divergence

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Inside, the model is the teacher: layers in sequence, no adapter, no gradients."""
        with torch.no_grad(), self.cqil.sequential(), self.model.disable_adapter():
            yield

    def compile(self) -> None:
        """Applies torch.compile to each layer's attention, MLP and norms, and to the loss, to fuse everything except
        the matrix products. All layers share the few compiled forms."""
        self.divergence_of_rows = torch.compile(_divergence)
        for layer in self.model.get_base_model().get_submodule("model.layers"):
            for module in layer.children():
                module.compile()

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the adapter as PEFT does, its weights in `dtype`, with the CQIL configuration inside."""
        weights = {name: weight.to(dtype) for name, weight in self.model.state_dict().items() if ".lora_" in name}
        self.model.save_pretrained(str(directory), state_dict=weights)
        self.cqil.cqil.save_with_adapter(directory)


class DistillationTrainer(Trainer):
    """transformers' Trainer with the distillation loss. `bfloat16`: matrix products in bfloat16, by autocast."""

    def __init__(self, student: Student, bfloat16: bool, **options: Any):
        super().__init__(model=student.model, **options)
        self._student = student
        self._bfloat16 = bfloat16
        # The loss is a mean over this batch's tokens, which Trainer divides when it accumulates gradients.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        tokens = inputs["input_ids"]
        with torch.autocast(tokens.device.type, torch.bfloat16) if self._bfloat16 else nullcontext():
            with self._student.teaching():
                teacher = self._student.model(input_ids=tokens, use_cache=False).logits
            student = model(input_ids=tokens, use_cache=False)
        loss = divergence(teacher, student.logits, self._student.divergence_of_rows)
        return (loss, student) if return_outputs else loss


def _divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    target, log_probability = F.log_softmax(teacher.float(), -1), F.log_softmax(student.float(), -1)
    return F.kl_div(log_probability, target, reduction="sum", log_target=True)


def divergence(
    teacher: torch.Tensor, student: torch.Tensor, of_rows: Callable[..., torch.Tensor] = _divergence
) -> torch.Tensor:
    """KL(teacher || student) of logits [B, T, vocabulary], mean over tokens, in float32.

    Probabilities are computed a few thousand rows at a time, and again for the gradient: those of a whole batch would
    take several times the memory of the model. `of_rows`: the function of some rows, possibly compiled.
    """
    vocabulary = teacher.shape[-1]
    pairs = list(zip(teacher.reshape(-1, vocabulary).split(_ROWS), student.reshape(-1, vocabulary).split(_ROWS)))
    total = sum(checkpoint(of_rows, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs)
    return total / sum(len(rows) for rows, _ in pairs)


def largest_rise(losses: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], tuple[int, float]] | None:
    """Where a training diverged: (step, loss) of the lowest loss so far and of a later one that is more than twice as
    high; of several such pairs the one with the largest ratio, None if there is none."""
    found, low = None, None
    for point in losses:
        if low is None or point[1] < low[1]:
            low = point
        elif point[1] > 2 * low[1] and (found is None or point[1] * found[0][1] > found[1][1] * low[1]):
            found = low, point
    return found


class Blocks(torch.utils.data.Dataset):
    """Blocks of token ids, int [N, T], as Trainer takes them."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self._tokens[index].astype(np.int64))}


def self_generated(
    network: nn.Module,
    count: int,
    length: int,
    beginnings: np.ndarray,
    batch: int,
    seed: int,
    top_p: float,
    progress: bool,
) -> np.ndarray:
    """Blocks [count, length] of text that the model samples itself, int32.

    Each begins with a random row of `beginnings` (token ids [N, K], K below `length`) and continues with top-p sampling
    from the model; after a single token, the next few are chosen greedily. An end-of-text token does not end a block:
    the model continues with another text.
    """
    from tqdm import tqdm
    from transformers import GenerationConfig

    device = device_of(network)
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    coherent = 1 + _GREEDY_TOKENS if beginnings.shape[1] == 1 else 0
    greedy = GenerationConfig(max_length=min(coherent, length), do_sample=False, pad_token_id=0)
    free = GenerationConfig(max_length=length, do_sample=True, top_k=0, top_p=top_p, pad_token_id=0)
    found = np.zeros((count, length), np.int32)
    own = network.generation_config
    with tqdm(total=count, unit="block", desc="sampling text", disable=not progress, leave=False) as bar:
        for first in range(0, count, batch):
            rows = min(batch, count - first)
            tokens = torch.from_numpy(random.choice(beginnings, rows).astype(np.int64)).to(device)
            for network.generation_config in (greedy, free):
                if tokens.shape[1] < network.generation_config.max_length:
                    tokens = network.generate(tokens, attention_mask=torch.ones_like(tokens))
            found[first : first + rows] = tokens.cpu().numpy()
            bar.update(rows)
    network.generation_config = own
    return found


def last_checkpoint(directory: Path) -> Path | None:
    """Trainer's newest complete checkpoint in `directory`; incomplete ones, left by killed runs, are removed."""
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_bytes())  # Trainer writes this last
            return path
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)  # another process may remove it, too
    return None
