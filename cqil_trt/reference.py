"""CQIL on Hugging Face's own modules, in one process: the reference for every engine, and the model that is trained.

Nothing is shared with `network/`: attention, MLP, norms, forward loop, masks, cache and generate() are those of the
Hugging Face model. Of the sharding only the rule is shared by which heads and neurons are dealt to ranks.
"""

from __future__ import annotations

import gc
import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cqil_trt import families
from cqil_trt.config import AUTO, CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.gguf_files import gguf_parts, open_gguf
from cqil_trt.json_fields import read_json
from cqil_trt.model import ModelConfig
from cqil_trt.probes import TOP, Probe
from cqil_trt.shard import even_split
from cqil_trt.weights import GgufReader, WeightReader, open_checkpoint
from cqil_trt.weights.quantized import is_quantized


class CqilModel(nn.Module):
    """A Hugging Face causal language model with CQIL's forward pass.

    The modules are shared with `model` and keep their names, so PEFT and Trainer work on it and an adapter trained
    with it fits the original model. Everything else (`config`, `generate`, `device`, …) is the model's own. While the
    wrapper exists `model` itself computes CQIL too; inside `with wrapper.sequential():` both compute the original.
    `drop_attention_join`: as `CqilConfig.dropping` takes it; these layers compute what the ranks that share them do,
    which is all that `ranks_per_layer` decides here.

    Raises UserError when the configuration does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        p: int = 2,
        d: int = 0,
        start: int | None = None,
        end: int | None = None,
        bypass: str = "mlp",
        drop_attention_join: str | Iterable[int] = (),
        ranks_per_layer: int = 1,
    ):
        super().__init__()
        layers = model.get_submodule("model.layers")
        self.cqil = CqilConfig.choose(
            len(layers),
            p,
            d,
            start,
            end,
            bypass,
            drop_attention_join=drop_attention_join,
            ranks_per_layer=ranks_per_layer,
        )
        # Register the children but not the model itself, so that parameters keep the checkpoint's names.
        for name, child in model.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_model", model)
        for layer in layers:  # undoes an earlier wrapper
            layer.__class__ = _original(type(layer))
        parts = dict(families.of_type(model.config.model_type).layer)
        kinds = getattr(model.config, "layer_types", None)
        if self.cqil.drop_attention_join and "attention_post_norm" in parts:
            raise UserError("drop_attention_join: the model normalises attention outputs before they are added")
        for index in self.cqil.changed_layers:
            layers[index].cqil_config, layers[index].cqil_parts = self.cqil, parts
        for group in self.cqil.groups:
            *others, last = (layers[index] for index in group)
            last.cqil_others = tuple(others)
            last.cqil_dropped = tuple(index in self.cqil.drop_attention_join for index in group)
            for layer, index in zip(others, group):
                layer.cqil_own_arguments = None if kinds is None or kinds[index] == kinds[group[-1]] else {}
            # Replace the class, not an attribute of the layer: gradient checkpointing wraps the class's forward.
            for layer in others:
                _replace_forward(layer, _waiting_forward)
            _replace_forward(last, _group_forward)
        for index in self.cqil.split_layers(len(layers)):
            if index in self.cqil.drop_attention_join:
                _replace_forward(layers[index], _split_forward)

    @classmethod
    def of(cls, model: nn.Module, cqil: CqilConfig) -> CqilModel:
        """The model with this configuration. What is computed does not depend on the placement."""
        dropped, ranks_per_layer = cqil.drop_attention_join, cqil.ranks_per_layer
        return cls(model, cqil.p, cqil.d, cqil.start, cqil.end, cqil.bypass, dropped, ranks_per_layer)

    # Trainer reads the names of its input columns from this signature.
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The Hugging Face model's forward. `kwargs`: its other arguments (position_ids, a cache, inputs_embeds, …)."""
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
        installed = [(layer, type(layer)) for layer in self.get_submodule("model.layers")]
        for layer, kind in installed:
            layer.__class__ = _original(kind)
        try:
            yield
        finally:
            for layer, kind in installed:
                layer.__class__ = kind


@cache
def _with_forward(kind: type, forward: Callable[..., torch.Tensor]) -> type:
    """The decoder layer's class with another forward."""
    return type(f"Cqil{kind.__name__}", (kind,), {"forward": forward, "cqil_original": kind})


def _replace_forward(layer: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    kind: type = type(layer)
    layer.__class__ = _with_forward(kind, forward)


def _original(kind: type) -> type:
    return getattr(kind, "cqil_original", kind)


def _input_norm(layer: nn.Module, part: str, x: torch.Tensor) -> torch.Tensor:
    """The input of the layer's attention or MLP (`part`): x, or its norm."""
    name = layer.cqil_parts.get(f"{part}_norm")
    return x if name is None else layer.get_submodule(name)(x)


def _contribution(layer: nn.Module, part: str, output: torch.Tensor) -> torch.Tensor:
    """What is added of the output of the layer's attention or MLP."""
    name = layer.cqil_parts.get(f"{part}_post_norm")
    output = output if name is None else layer.get_submodule(name)(output)
    scale = getattr(layer, "residual_multiplier", None)
    return output if scale is None else output * scale


# Arguments of a layer's forward that differ between kinds of layers (windows, rotary embeddings).
_OWN_ARGUMENTS = ("attention_mask", "position_embeddings")


def _waiting_forward(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The forward of a group's layers before the last, which computes them. `self` is a Hugging Face decoder layer."""
    if self.cqil_own_arguments is not None:
        self.cqil_own_arguments = {name: kwargs[name] for name in _OWN_ARGUMENTS}
    return hidden_states


def _group_forward(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The forward of a group's last layer: the whole group. `self` is that Hugging Face decoder layer."""
    cqil: CqilConfig = self.cqil_config
    members = (*self.cqil_others, self)
    x = hidden_states
    given = [kwargs | ({} if layer is self else layer.cqil_own_arguments or {}) for layer in members]
    if any(self.cqil_dropped):  # no bypass then
        changes = (
            _split_change(layer, x, cqil.ranks_per_layer, own) if dropped else _change(layer, x, own)
            for layer, own, dropped in zip(members, given, self.cqil_dropped)
        )
        return sum(changes, x)
    attended = [_attended(layer, x, own) for layer, own in zip(members, given)]
    output = x
    for j, (layer, a) in enumerate(zip(members, attended)):
        before = attended[max(0, j - cqil.d) : j]
        b = sum(before[1:], before[0]) if before else None
        mlp_input = x + a if b is None else x + a + b
        m = _contribution(layer, "mlp", layer.mlp(_input_norm(layer, "mlp", mlp_input)))
        output = output + a + m
        if b is not None and cqil.bypass == "residual":
            output = output + b
    return output


def _split_forward(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The forward of a layer that all ranks share and whose attention join is dropped."""
    return hidden_states + _split_change(self, hidden_states, self.cqil_config.ranks, kwargs)


def _attended(layer: nn.Module, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a decoder layer's attention adds to its input x."""
    a = layer.self_attn(hidden_states=_input_norm(layer, "attention", x), **kwargs)[0]
    return _contribution(layer, "attention", a)


def _change(layer: nn.Module, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a decoder layer adds to its input x."""
    a = _attended(layer, x, kwargs)
    return a + _contribution(layer, "mlp", layer.mlp(_input_norm(layer, "mlp", x + a)))


def _split_change(layer: nn.Module, x: torch.Tensor, ranks: int, kwargs: dict[str, Any]) -> torch.Tensor:
    """As `_change`, for a layer that `ranks` ranks share without an all-reduce after attention.

    Values of all ranks are stacked, [ranks, B, T, …].
    """
    attention = layer.self_attn
    # The projections' inputs are split, never their weights: whatever adapts the modules stays in effect.
    with _replaced(attention, "o_proj", _EachRank(attention.o_proj, ranks, attention.head_dim)):
        a = _attended(layer, x, kwargs)
    with _replaced(layer.mlp, "down_proj", _OverRanks(layer.mlp.down_proj, ranks)):
        return a.sum(0) + _contribution(layer, "mlp", layer.mlp(_input_norm(layer, "mlp", x + a)))


class _EachRank(nn.Module):
    """The o projection of each rank's heads: [B, T, heads * D] → [ranks, B, T, H].

    The last rank adds the bias, as in `shard.LayerShard`.
    """

    def __init__(self, projection: nn.Module, ranks: int, head_dim: int):
        super().__init__()
        self.projection, self.ranks, self.head_dim = projection, ranks, head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width, parts = x.shape[-1], []
        for rank in range(self.ranks):
            first, last = even_split(width // self.head_dim, self.ranks, rank)
            first, last = first * self.head_dim, last * self.head_dim
            parts.append(F.pad(x[..., first:last], (first, width - last)).flatten(0, -2))
        # One call, as a module may read its weights when it is called. A row of zeros gives the bias, LoRA's included.
        found = self.projection(torch.cat([*parts, x.new_zeros(1, width)]))
        *others, last_part, bias = found.split([*map(len, parts), 1])
        return torch.stack([*(part - bias for part in others), last_part]).view(self.ranks, *x.shape[:-1], -1)


class _OverRanks(nn.Module):
    """The down projection of the neurons [ranks, B, T, I] that ranks have: summed over the ranks, [B, T, H]."""

    def __init__(self, projection: nn.Module, ranks: int):
        super().__init__()
        self.projection, self.ranks = projection, ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spans = [even_split(x.shape[-1], self.ranks, rank) for rank in range(self.ranks)]
        return self.projection(torch.cat([part[..., first:last] for part, (first, last) in zip(x, spans)], -1))


@contextmanager
def _replaced(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Inside, `module` is the submodule `name` of `parent`."""
    original = getattr(parent, name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, original)


def load_hugging_face(model: str, lora: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Hugging Face model of a directory or .gguf file, with an adapter merged by PEFT, in evaluation mode.

    Raises UserError when transformers or PEFT cannot load it.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = Path(model)
    if not path.exists():
        raise UserError(f"the reference needs {path}, which the engine was built from and which is gone")
    # transformers cannot turn off its progress bar for GGUF: keep it out of log files.
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with quiet:
            network = _load_gguf(path, dtype) if path.suffix == ".gguf" else _load_directory(path, dtype)
        if lora is not None:
            network = _merged_by_peft(network, lora)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        adapter = "" if lora is None else f" with {lora}"
        raise UserError(f"the reference cannot be loaded from {model}{adapter}: {error}") from None
    return network.eval()


# Keys with an adapter's name, and the older forms of modules_to_save, mapped to what PEFT expects.
_PEFT_KEYS = {
    r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$": r"\1\2",
    r"(\.lora_embedding_[AB]|\.token_adapter\.trainable_tokens_(?:delta|original))\.[^.]+$": r"\1",
    r"(\.lora_magnitude_vector)(?:\.[^.]+)+$": r"\1",
    r"\.modules_to_save\.(?:(?!\w+_proj\.)[^.]+\.)?(?=(?:\w+_proj\.)?(?:weight|bias)$)": ".",
}
_VOCABULARY_TABLE = re.compile(r"\.(embed_tokens|lm_head)\.(?!lora_)(?:.+\.)?weight$")


def _merged_by_peft(network: nn.Module, lora: str) -> nn.Module:
    """The network with the adapter merged by PEFT; embeddings are first resized to the adapter's tables."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about every tied model
        weights = load_peft_weights(lora, device="cpu")
        sizes = {tensor.shape[0] for key, tensor in weights.items() if _VOCABULARY_TABLE.search(key)}
        modules = {key.partition(".lora_")[0] for key in weights if ".lora_" in key}
        older = [module.removeprefix("base_model.model.") for module in modules if f"{module}.bias" in weights]
        del weights
        if sizes - {network.config.vocab_size}:
            network.resize_token_embeddings(max(sizes), mean_resizing=False)
        # Older PEFT wrote an adapted module's own tensors without the infix base_layer.
        mapping = {**_PEFT_KEYS, **{rf"^({re.escape(m)})\.bias$": r"\1.base_layer.bias" for m in older}}
        return PeftModel.from_pretrained(network, lora, key_mapping=mapping).merge_and_unload()


@contextmanager
def peft_attributes() -> Iterator[None]:
    """Silences the warning about a model attribute that PEFT reads and transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def _load_directory(path: Path, dtype: torch.dtype) -> nn.Module:
    """As transformers loads it.

    Quantized matrices come from our reader: transformers needs a GPU for most of them. So does the text model of a
    larger one, which transformers loads as a whole.
    """
    import transformers

    if is_quantized(path) or families.reads_more_than_text(path / "config.json"):
        model, reader = open_checkpoint(path)
        return from_reader(model, reader, dtype, pieces=False)
    kind, model = transformers.AutoModelForCausalLM, families.read_config(path / "config.json")
    if "model_type" not in read_json(path / "config.json"):  # AutoModel needs it
        kind = getattr(transformers, model.architecture)
    options = {"trust_remote_code": False, "local_files_only": True, **attention_options(model)}
    return kind.from_pretrained(path, dtype=dtype, **options)


@contextmanager
def _parsed(file: Any) -> Iterator[None]:
    """transformers parses a file at each use, which takes seconds for a large vocabulary: it gets this one, parsed."""
    import gguf

    original, gguf.GGUFReader = gguf.GGUFReader, lambda path: file
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _load_gguf(path: Path, dtype: torch.dtype) -> nn.Module:
    """The tensors as transformers reads them, with the rope and biases of the metadata, which it ignores.

    llama.cpp's rope is implemented here again, independently of `weights` and `network/rotary`, which it checks:
    transformers does the scaling, and frequency factors and the attention factor are set on its module.
    transformers does not read split files, nor all that families have which compute more than LLaMA does; they come
    from our reader.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    reader = GgufReader(path)
    model = reader.model_config()
    known = reader.architecture in GGUF_SUPPORTED_ARCHITECTURES
    if not known or model.features(model.max_position) or model.rope.kind == "longrope":
        return from_reader(model, reader, dtype, pieces=False)
    files = [open_gguf(part) for part in gguf_parts(path)]
    file, tensors = files[0], {tensor.name: tensor.data for each in files for tensor in each.tensors}
    architecture = file.fields["general.architecture"].contents()

    def field(name: str, default: Any) -> Any:
        found = file.fields.get(f"{architecture}.{name}")
        return default if found is None else found.contents()

    options = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    with _parsed(file):
        config = AutoConfig.from_pretrained(path.parent, **options)
    kind, factor = field("rope.scaling.type", "linear"), field("rope.scaling.factor", field("rope.scale_linear", 0))
    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base", 10000.0)}
    if factor and kind != "none":
        rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = field("rope.scaling.original_context_length", config.max_position_embeddings)
        rope["original_max_position_embeddings"] = original
    config.rope_parameters = rope
    config.head_dim = field("attention.key_length", config.hidden_size // config.num_attention_heads)
    for part, switch in (("attn_", "attention_bias"), ("ffn_", "mlp_bias")):
        if hasattr(config, switch):
            stored = any(name.startswith(f"blk.0.{part}") and name.endswith(".bias") for name in tensors)
            setattr(config, switch, stored)
    config.update(dict(families.of(model).reference))
    if len(files) > 1:
        network = from_reader(model, reader, dtype, pieces=False)
    else:
        with _parsed(file):
            network = AutoModelForCausalLM.from_pretrained(path.parent, config=config, dtype=dtype, **options)
    device = device_of(network)
    rotary = network.model.rotary_emb = type(network.model.rotary_emb)(config).to(device)
    if "rope_freqs.weight" in tensors:
        rotary.inv_freq /= torch.tensor(tensors["rope_freqs.weight"], dtype=torch.float32, device=device)
    rotary.attention_scaling *= field("rope.scaling.attn_factor", 1.0)
    return network


def with_cqil(network: nn.Module, cqil: CqilConfig) -> nn.Module:
    """The network that engines of this configuration compute; unchanged if that is the original model."""
    return CqilModel.of(network, cqil) if cqil.changed_layers else network


# Begins the names, among transformers' attention functions, of those that round keys and values.
_FP8_CACHE = "fp8 cache, "


def with_kv_cache(network: nn.Module, limits: EngineLimits) -> nn.Module:
    """The network with keys and values rounded as the KV cache of an engine with these limits stores them.

    All tokens see them rounded, as an engine's do. Unchanged where the cache has the engine's own type.
    """
    if limits.kv_dtype == AUTO:
        return network
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    kind = network.config._attn_implementation.removeprefix(_FP8_CACHE)
    name = f"{_FP8_CACHE}{kind}"
    AttentionInterface.register(name, _attention_over_fp8)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    for index, layer in enumerate(network.get_submodule("model.layers")):
        layer.self_attn.cqil_kind, layer.self_attn.cqil_scales = kind, limits.scales_of(index)
    network.config._attn_implementation = name
    return network


def _attention_over_fp8(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **keywords: Any
) -> Any:
    """Attention of a Hugging Face module over keys and values that an FP8 cache has rounded."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.cqil_kind, eager)
    key, value = (_rounded_to_fp8(x, scale) for x, scale in zip((key, value), module.cqil_scales))
    return attend(module, query, key, value, *arguments, **keywords)


def _rounded_to_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale in E4M3, times scale; the largest number of E4M3 in place of larger ones."""
    most = torch.finfo(torch.float8_e4m3fn).max
    codes = (x.float() * (1 / torch.tensor(scale, dtype=torch.float32))).clamp(-most, most).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


# The largest model, in bytes, that stays in host memory; a larger one is read from its files in every pass.
_RESIDENT_BYTES = 2 << 30


def free_memory() -> None:
    """Returns the memory of discarded models, which PyTorch caches, to the GPU."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def fits_gpu(elements: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether PyTorch sees a GPU with room for a model of this many elements."""
    if not torch.cuda.is_available():
        return False
    free_memory()
    return dtype.itemsize * elements < 0.8 * torch.cuda.mem_get_info()[0]


def from_reader(
    model: ModelConfig, reader: WeightReader, dtype: torch.dtype = torch.float32, pieces: bool | None = None
) -> nn.Module:
    """Hugging Face's modules with the weights of `reader`, in evaluation mode; on the GPU if there is one.

    `pieces`: a module's weights are read when it is called and freed afterwards. By default this is so for a model that
    does not fit on the GPU or, without a GPU, takes more than 2 GiB.
    """
    kind, config = hugging_face_config(model)
    with torch.device("meta"):
        network = kind(config).eval()
    sizes = [sum(p.numel() for p in module.parameters(recurse=False)) for module in network.modules()]
    device = "cuda" if fits_gpu(max(sizes), dtype) else "cpu"
    # Buffers are computed, not stored: create the modules that have some again, off the meta device.
    rotary = network.model.rotary_emb = type(network.model.rotary_emb)(network.config).to(device)
    # GGUF files can have divisors and attention factors, unlike any rope type of transformers.
    if model.rope.divisors:
        rotary.inv_freq /= torch.tensor(model.rope.divisors, device=device)
    if model.local_rope is None:
        rotary.attention_scaling = model.rope.attention_factor
    if (scale := getattr(network.model.embed_tokens, "scalar_embed_scale", None)) is not None:
        network.model.embed_tokens.embed_scale = torch.tensor(scale, device=device)
    whole = sum(sizes)
    if pieces is None:
        pieces = not fits_gpu(whole, dtype) if device == "cuda" else dtype.itemsize * whole > _RESIDENT_BYTES
    for name, module in network.named_modules():
        names = [key for key, _ in module.named_parameters(recurse=False)]
        if not names:
            continue
        load = _loader(reader, name, names, model.tie_embeddings, device, dtype)
        if pieces:
            module.register_forward_pre_hook(load)
            module.register_forward_hook(_unload)
        else:
            load(module)
    return network


def hugging_face_config(model: ModelConfig) -> tuple[Any, Any]:
    """The class of the model in transformers, and its configuration."""
    import transformers

    values = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "eos_token_id": list(model.eos_token_ids) or None,
        **families.written(model),
        **families.of(model).reference,
        **attention_options(model),
    }
    kind = getattr(transformers, model.architecture)
    return kind, kind.config_class(**values)


def attention_options(model: ModelConfig) -> dict[str, str]:
    """What transformers must be told to compute the model's attention.

    By default releases up to 5.20 take PyTorch's own attention for Gemma 2, which ignores the soft cap.
    """
    return {} if model.attention_cap is None else {"attn_implementation": "eager"}


def _loader(
    reader: WeightReader, prefix: str, names: list[str], tied: bool, device: str, dtype: torch.dtype
) -> Callable[..., None]:
    """A function that reads a module's parameters; also a forward pre-hook."""

    def load(module: nn.Module, *_: Any) -> None:
        for name in names:
            source = f"{prefix}.{name}"
            # A quantized copy of the table is another matrix.
            if tied and source == "lm_head.weight" and source not in reader.quantized_names:
                source = "model.embed_tokens.weight"
            value = reader.read(source).to(device=device, dtype=dtype)
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    return load


def _unload(module: nn.Module, *_: Any) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def probe(model: nn.Module, prompts: Sequence[Sequence[int]], steps: Sequence[int], progress: bool) -> list[Probe]:
    """The model's answers to prompts of token ids, with `steps` greedy tokens for each."""
    from tqdm import tqdm

    found = []
    for prompt, count in zip(tqdm(prompts, desc="reference", disable=not progress, leave=False), steps):
        tokens, step_logits = greedy(model, prompt, count)
        logits, order = step_logits.topk(min(TOP, step_logits.shape[1]), dim=1)
        scored = score(model, prompt)
        found.append(
            Probe(
                prompt=list(prompt),
                logits=scored.numpy(),
                tokens=tokens,
                top_tokens=order.to(torch.int32).numpy(),
                top_logits=logits.numpy(),
            )
        )
    return found


@torch.inference_mode()
def score(model: nn.Module, prompt: Sequence[int]) -> torch.Tensor:
    """Logits after every token of the prompt, float32 [tokens, vocabulary]."""
    _forget_lengths(model)
    tokens = torch.tensor([list(prompt)], device=device_of(model))
    return model(tokens, use_cache=False).logits[0].float().cpu()


@torch.inference_mode()
def greedy(model: nn.Module, prompt: Sequence[int], steps: int) -> tuple[list[int], torch.Tensor]:
    """`steps` greedy tokens, and the logits each was chosen from, float32 [steps, vocabulary]."""
    from transformers import DynamicCache

    _forget_lengths(model)
    device = device_of(model)
    tokens: list[int] = []
    logits: list[torch.Tensor] = []
    new = list(prompt)
    options = {_cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
    for _ in range(steps):
        out = model(torch.tensor([new], device=device), **options)
        logits.append(out.logits[0, -1].float().cpu())
        tokens.append(int(logits[-1].argmax()))
        new = tokens[-1:]
    return tokens, torch.stack(logits)


def _cache_argument(model: nn.Module) -> str:
    """The name of the KV cache in the model's forward, which changed between releases of transformers 5."""
    network = model._model if isinstance(model, CqilModel) else model
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def _forget_lengths(model: nn.Module) -> None:
    """Resets dynamic rope, which otherwise keeps the frequencies of the longest sequence it has seen."""
    rotary = model.get_submodule("model.rotary_emb")
    if rotary.rope_type == "dynamic":
        rotary.inv_freq = rotary.original_inv_freq.clone()
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def device_of(model: nn.Module) -> torch.device:
    """The device of a Hugging Face model, taken from a buffer: the weights of a model in pieces have none."""
    return next(model.get_submodule("model.rotary_emb").buffers()).device
