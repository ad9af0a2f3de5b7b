"""Random checkpoints and adapters, as their makers' libraries save them, and the same weights read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import SEED, write_json
from support.needs import need


def make_model(directory: Path, architecture: str = "LlamaForCausalLM", seed: int = SEED, **changes: Any) -> Path:
    """A random Hugging Face checkpoint with logits of useful size, saved by transformers; returns its directory."""
    need("transformers>=5")
    import torch
    import transformers

    torch.manual_seed(seed)
    save_dtype = changes.pop("save_dtype", torch.float32)
    shard_size = changes.pop("max_shard_size", "50GB")
    values: dict[str, Any] = {
        "num_hidden_layers": 6,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "head_dim": 8,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**values)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name else 0.8 / 7))
    model.to(save_dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory


def make_first_llama(directory: Path, **changes: Any) -> Path:
    """A random LLaMA-1 as it was first converted: .bin in parts, and the config.json and names of early 2023."""
    import torch
    from safetensors.torch import load_file

    make_model(directory, num_key_value_heads=6, rms_norm_eps=1e-6, **changes)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "generation_config.json").unlink()
    sizes = json.loads((directory / "config.json").read_text())
    layers, half = sizes["num_hidden_layers"], sizes["head_dim"] // 2
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(half) for i in range(layers)}
    names, weight_map = sorted(tensors), {}
    for number, members in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in members}, directory / file)
        weight_map |= dict.fromkeys(members, file)
    write_json(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    counts = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    config = {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "pad_token_id": -1,
        "torch_dtype": sizes["dtype"],
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        **{name: sizes[name] for name in (*counts, "rms_norm_eps")},
    }
    write_json(directory / "config.json", config)
    return directory


def rank_weights(rank: Any, reader: Any, dtype: str = "float32") -> dict[str, Any]:
    """The rank's tensors by name, put together from the builder's blocks: rounded to `dtype`, held in float32."""
    import torch

    blocks = [block.reshape(-1).float() for block in replace(rank, dtype=dtype).blocks(reader)]
    parts = torch.cat([torch.empty(0), *blocks]).split([tensor.elements for tensor in rank.tensors])
    weights = {tensor.name: part.view(tensor.shape) for tensor, part in zip(rank.tensors, parts)}
    if rank.shares_embedding:
        weights["lm_head.weight"] = weights["embedding.weight"][slice(*rank.vocabulary)]
    return weights


def checkpoint_logits(checkpoint: Any, prompt: list[int]) -> Any:
    """What an engine of one rank computes after every token of a prompt, float32 [tokens, vocabulary], unbuilt."""
    import torch

    from cqil_trt.backends.torch.ops import TorchOps
    from cqil_trt.collectives import LocalCommunicator
    from cqil_trt.config import CqilConfig, EngineLimits
    from cqil_trt.network.decoder import decode
    from cqil_trt.schedule import Peers
    from cqil_trt.shard import plan

    [rank] = plan(checkpoint.model, CqilConfig(p=1))
    limits, weights = EngineLimits(max_batch_size=1, max_seq_len=len(prompt)), rank_weights(rank, checkpoint.reader)
    ops = TorchOps(rank, weights, {Peers.ALL: LocalCommunicator()}, limits, checkpoint.rotary)
    ops.begin([0], len(prompt))
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        return decode(ops, tokens, torch.zeros(1, dtype=torch.long), torch.arange(len(prompt))[None])[0]


def write_gguf(
    path: Path, source: Path, quantization: str = "F32", add: Any = lambda writer: None, **options: Any
) -> Path:
    """The checkpoint in `source` as llama.cpp's converter writes it (q and k rows of llama permuted).

    `add` is called with the GGUFWriter before tensors are written, `options` are the writer's. Returns the first file.
    """
    import gguf
    import numpy as np
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    name = {"gemma3_text": "gemma3", "olmo3": "olmo2", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name, **options)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type in ("gemma2", "gemma3_text", "olmo3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    factors = {}
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        factor = config.max_position_embeddings / rope["original_max_position_embeddings"]
        magnitude = np.sqrt(1 + np.log(factor) / np.log(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(float(magnitude))
        factors = {part: np.array(rope[f"{part}_factor"], np.float32) for part in ("short", "long")}
    add(writer)
    for part, values in factors.items():
        writer.add_tensor(f"rope_factors_{part}.weight", values)
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in load_model(source).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        permuted = config.model_type in ("llama", "smollm3", "granite")
        if permuted and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else kv_heads
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if config.model_type.startswith("gemma") and "norm" in name:
            values = values + 1
        kind = gguf.GGMLQuantizationType[quantization if values.ndim == 2 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=kind)
    parts = writer.format_shard_names(path)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parts[0]


def load_model(directory: Path):
    """The checkpoint as transformers loads it, float32."""
    need("transformers>=5")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # By default releases up to 5.20 ignore soft caps.
    capped = getattr(AutoConfig.from_pretrained(directory), "attn_logit_softcapping", None) is not None
    options = {"attn_implementation": "eager"} if capped else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def make_adapter(model_directory: Path, directory: Path, seed: int = SEED, **options: Any) -> Path:
    """A random LoRA adapter for the model, made and saved by PEFT; returns its directory.

    `vocabulary` resizes the embeddings before; `save` holds arguments of save_pretrained.
    """
    need("peft>=0.18")
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    vocabulary, save = options.pop("vocabulary", None), options.pop("save", {})
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **options,
    }
    base = load_model(model_directory)
    if vocabulary is not None:
        base.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:  # starts as the length of a row
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory, **save)
    return directory
