"""Families that compute what LLaMA does not: one rank against transformers, several against the formulas in float64."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import SEED, write_json
from support.cases import FAMILIES, relative
from support.checkpoints import checkpoint_logits, load_model, make_adapter, make_model, write_gguf
from support.formulas import Formulas
from support.ports import free_port
from support.processes import build
from support.threads import together

import cqil_trt
from cqil_trt import backends, families
from cqil_trt.backends.torch.ops import TorchOps
from cqil_trt.backends.torch.quantized import take_quantized
from cqil_trt.checkpoint import Checkpoint
from cqil_trt.collectives import HostCommunicator, LocalCommunicator, split
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.errors import UserError
from cqil_trt.model import ModelConfig
from cqil_trt.network.decoder import decode
from cqil_trt.reference import CqilModel, from_reader, load_hugging_face, score
from cqil_trt.schedule import Peers
from cqil_trt.shard import plan

# Two prompts, of which one is longer than the windows, and tokens that follow both beyond them.
LENGTHS, FOLLOW = (14, 3), 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {
        name: make_model(root / name, architecture, seed=SEED + i, rms_norm_eps=1e-3, **changes)
        for i, (name, (architecture, changes)) in enumerate(FAMILIES.items())
    }


def sequences(seed):
    random = np.random.default_rng([SEED, seed])
    return [random.integers(3, 131, length + FOLLOW).tolist() for length in LENGTHS]


def computed(checkpoint, shape, tokens, stored="dense"):
    """What every rank's decoder says after each token of both sequences, and the last stream that it joined.

    The prompts are read apart, the first in two chunks; then both sequences get three tokens at once, as with drafts,
    and a token at a time.
    """
    ranks = plan(checkpoint.model, CqilConfig(**shape), weights=stored)
    longest = max(map(len, tokens))
    limits = EngineLimits(max_batch_size=2, max_seq_len=longest)
    stores = [stored_weights(rank, checkpoint.reader) for rank in ranks]  # readers are for one thread at a time

    def work(comm, number):
        rank, communicators = ranks[number], {Peers.ALL: LocalCommunicator()}
        if len(ranks) > 1:
            communicators = {kind: HostCommunicator(part) for kind, part in split(comm, rank.peers).items()}
        weights = stores[number]
        products = take_quantized(rank, weights, torch.float32)
        ops = TorchOps(rank, weights, communicators, limits, checkpoint.rotary, products=products)
        found = [[], []]

        def step(slots, new, past):
            ops.begin(slots, LENGTHS[slots[0]] if len(slots) == 1 else None)
            select = torch.arange(len(new[0])).expand(len(slots), -1)
            out = decode(ops, torch.tensor(new), torch.tensor(past), select)
            if rank.schedule.predicts:
                for slot, logits in zip(slots, out):
                    found[slot].extend(logits)

        with torch.inference_mode():
            for slot, spans in ((0, ((0, 5), (5, LENGTHS[0]))), (1, ((0, LENGTHS[1]),))):
                for first, last in spans:
                    step([slot], [tokens[slot][first:last]], [first])
            for first, last in ((0, 3), *((i, i + 1) for i in range(3, FOLLOW))):
                new = [s[n + first : n + last] for s, n in zip(tokens, LENGTHS)]
                step([0, 1], new, [n + first for n in LENGTHS])
        return found, ops.joined

    results = together(len(ranks), work)
    logits = [torch.cat([torch.stack(found[i]) for found, _ in results if found[i]], -1) for i in range(2)]
    return logits, [joined for _, joined in results]


def stored_weights(rank, reader):
    """The rank's tensors by name, as an engine's file holds them."""
    blocks = iter(rank.blocks(reader))
    weights = {}
    for tensor in rank.tensors:
        parts = []
        while sum(part.numel() for part in parts) < tensor.elements:
            parts.append(next(blocks).reshape(-1))
        weights[tensor.name] = torch.cat(parts).view(tensor.shape) if parts else torch.empty(tensor.shape)
    if rank.shares_embedding:
        weights["lm_head.weight"] = weights["embedding.weight"][slice(*rank.vocabulary)]
    return weights


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_computes_what_transformers_does(name, models):
    checkpoint, network, tokens = Checkpoint(models[name], None), load_model(models[name]), sequences(0)
    found, _ = computed(checkpoint, {"p": 1}, tokens)
    for logits, sequence, length in zip(found, tokens, LENGTHS):
        assert checkpoint.model.sliding_window is None or len(sequence) > checkpoint.model.sliding_window
        assert relative(logits.numpy(), cached(network, sequence, length)) < 1e-5


def cached(network, sequence, length):
    """transformers' logits after each token: of the prompt at once, then token by token with its cache."""
    found, cache = [], None
    for new in [sequence[:length], *([token] for token in sequence[length:])]:
        with torch.inference_mode():
            out = network(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0].numpy())
    return np.concatenate(found)


SHAPES = [
    {"p": 2, "d": 0, "start": 1, "end": 5},
    {"p": 2, "d": 1, "start": 2, "end": 6, "placement": "leader"},
    {"p": 2, "d": 1, "start": 0, "end": 4, "bypass": "residual"},
    {"p": 3, "d": 1, "start": 3, "end": 6},
    {"p": 4, "d": 0, "start": 1, "end": 5, "placement": "leader"},
    {"p": 4, "d": 1, "start": 2, "end": 6},
    {"p": 4, "placement": "tensor"},
    {"p": 3, "placement": "tensor"},
    {"p": 2, "ranks_per_layer": 2, "d": 1, "start": 1, "end": 5},
    {"p": 2, "ranks_per_layer": 3, "d": 1, "start": 2, "end": 6, "bypass": "residual"},
]


@pytest.mark.parametrize("name", [name for name in FAMILIES if "longrope" not in name])
def test_ranks_compute_the_definition(name, models):
    checkpoint, network = Checkpoint(models[name], None), load_model(models[name])
    formulas = Formulas(network.config, network.state_dict())
    # The formulas themselves say what transformers does, without groups.
    ids = torch.tensor(sequences(0)[:1])
    with torch.inference_mode():
        assert relative(formulas.logits(ids).numpy(), network(ids, use_cache=False).logits.numpy()) < 1e-5
    for number, shape in enumerate(SHAPES):
        tokens = sequences(number)
        found, joined = computed(checkpoint, shape, tokens)
        for logits, sequence in zip(found, tokens):
            expected = formulas.logits(torch.tensor([sequence]), **shape)[0]
            assert relative(logits.numpy(), expected.numpy()) < 1e-5, shape
        assert all(torch.equal(joined[0], other) for other in joined[1:])  # bit for bit
        if shape.get("placement") != "tensor":
            wrapped = CqilModel(network, **{k: v for k, v in shape.items() if k != "placement"})
            with torch.inference_mode():
                judged = cached(wrapped, tokens[0], LENGTHS[0])
            expected = formulas.logits(torch.tensor(tokens[:1]), **shape)[0]
            assert relative(judged, expected.numpy()) < 1e-5, shape
            with wrapped.sequential(), torch.inference_mode():
                again = wrapped(ids, use_cache=False).logits
            assert relative(again.numpy(), formulas.logits(ids).numpy()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_descriptions_survive_json(name, models):
    model = Checkpoint(models[name], None).model
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


@pytest.mark.parametrize("name", ["gemma3", "olmo3", "granite"])
def test_gradients_are_those_of_the_definition(name, models):
    """With gradient checkpointing, too, where a group computes its layers again with the arguments of each."""
    network, shape = load_model(models[name]).train(), {"p": 2, "d": 1, "start": 1, "end": 5}
    exact = {key: value.double().requires_grad_() for key, value in network.state_dict().items()}
    ids = torch.tensor(sequences(6)[:1])
    weights = torch.randn(1, ids.shape[1], 131, dtype=torch.float64)
    (Formulas(network.config, exact).logits(ids, **shape) * weights).sum().backward()
    model = CqilModel(network, **shape)
    for checkpointed in (False, True):
        if checkpointed:
            network.gradient_checkpointing_enable()
            network.enable_input_require_grads()
        network.zero_grad()
        (model(ids, use_cache=False).logits * weights).sum().backward()
        for key, parameter in network.named_parameters():
            if ".layers." in key:
                assert (parameter.grad - exact[key].grad).norm() < 1e-4 * exact[key].grad.norm(), (key, checkpointed)


ADAPTED = ["gemma3", "granite", "olmo3", "smollm3"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_merged_as_peft_merges_them(name, models, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel

    adapter = make_adapter(models[name], tmp_path / "adapter")
    checkpoint = Checkpoint(models[name], adapter)
    merged = PeftModel.from_pretrained(load_model(models[name]), adapter).merge_and_unload()
    formulas, tokens = Formulas(merged.config, merged.state_dict()), sequences(9)
    shape = {"p": 2, "d": 1, "start": 2, "end": 6}
    found, _ = computed(checkpoint, shape, tokens)
    for logits, sequence in zip(found, tokens):
        assert relative(logits.numpy(), formulas.logits(torch.tensor([sequence]), **shape)[0].numpy()) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["gemma2", "olmo3", "granite", "phi3-partial"])
def test_quantized_engines_compute_what_their_values_do(name, weights, models):
    """The matrices that transformers' class is given are those that the codes stand for."""
    checkpoint, tokens = Checkpoint(models[name], None), sequences(3)
    checkpoint.quantize(EngineLimits(weights=weights))
    network = from_reader(checkpoint.model, checkpoint.reader)
    shape = {"p": 2, "start": 1, "end": 5}
    with torch.inference_mode():
        expected = [CqilModel(network, **shape)(torch.tensor([s]), use_cache=False).logits[0] for s in tokens]
    found, _ = computed(checkpoint, shape, tokens, weights)
    for logits, judged in zip(found, expected):
        assert relative(logits.numpy(), judged.numpy()) < 1e-5


def test_a_join_before_a_norm_cannot_be_dropped(models):
    for name in ("gemma2", "gemma3", "olmo2", "olmo3"):
        model = Checkpoint(models[name], None).model
        cqil = CqilConfig(p=2, start=2, end=4, drop_attention_join=(1,))
        with pytest.raises(UserError, match=f"--drop-attention-join: {model.architecture} normalises"):
            plan(model, cqil)
        with pytest.raises(UserError, match="drop_attention_join"):
            CqilModel(load_model(models[name]), p=2, start=2, end=4, drop_attention_join=(1,))


def test_a_join_after_a_scaled_sub_layer_can_be_dropped(models):
    network, shape = load_model(models["granite"]), {"p": 3, "start": 3, "end": 6, "drop_attention_join": (0, 2)}
    formulas, tokens = Formulas(network.config, network.state_dict()), sequences(5)
    found, _ = computed(Checkpoint(models["granite"], None), shape, tokens)
    for logits, sequence in zip(found, tokens):
        expected = formulas.logits(torch.tensor([sequence]), **shape)[0].numpy()
        assert relative(logits.numpy(), expected) < 1e-5
        judged = CqilModel(network, **shape)(torch.tensor([sequence]), use_cache=False).logits[0]
        assert relative(judged.detach().numpy(), expected) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_backends_refuse_by_name_what_they_lack(name, models):
    model = Checkpoint(models[name], None).model
    limits = EngineLimits(max_seq_len=16)
    backends.load("torch").check_model(model, limits)
    backends.load("onnx").check_model(model, limits)
    words = [feature.value for feature in model.features(16)]
    with pytest.raises(UserError, match=f"--backend tensorrt-llm: {model.architecture} has {words[0]}"):
        backends.load("tensorrt-llm").check_model(model, limits)
    backends.load("tensorrt").check_model(model, limits)


def tensorrt(version, *layers):
    """A release, as far as `compiler.describe` asks what it can do."""
    return SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        INetworkDefinition=SimpleNamespace(**dict.fromkeys(("add_plugin_v2", *layers))),
        NetworkDefinitionCreationFlag=SimpleNamespace(),
    )


def test_tensorrts_own_attention_refuses_soft_caps(models, monkeypatch):
    """As a release that has its own attention layers; our plugins have caps."""
    from cqil_trt.backends.tensorrt import compiler

    new = tensorrt("10.15.0", "add_rotary_embedding", "add_kv_cache_update", "add_attention_v2")
    monkeypatch.setattr(compiler, "import_package", lambda names: new)
    model = Checkpoint(models["gemma2"], None).model
    with pytest.raises(UserError, match="tensorrt 10.15.0: Gemma2.* has soft caps of attention scores.* before 10.15"):
        compiler.describe(EngineLimits(max_seq_len=10), {}, plan(model, CqilConfig(p=1)))


def test_plugins_refuse_heads_that_are_too_large(models, monkeypatch):
    from cqil_trt.backends.tensorrt import compiler

    monkeypatch.setattr(compiler, "import_package", lambda names: tensorrt("10.14.1"))
    model = replace(Checkpoint(models["gemma2"], None).model, head_dim=258)
    with pytest.raises(UserError, match="with tensorrt 10.14.1: the model has heads of 258 elements"):
        compiler.describe(EngineLimits(max_seq_len=10), {}, plan(model, CqilConfig(p=1)))


def make_images_model(directory):
    """A random Gemma 3 that reads images too."""
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "sliding_window": 9}
    text |= {"query_pre_attn_scalar": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    numbers = {"boi_token_index": 120, "eoi_token_index": 121, "image_token_index": 122, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, eos_token_id=[1, 106], **numbers)
    network = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3)
    network.save_pretrained(directory)
    return network


def test_the_text_model_of_a_model_that_reads_images(tmp_path):
    network, prompt = make_images_model(tmp_path / "model"), sequences(0)[0]
    with torch.inference_mode():
        expected = network(torch.tensor([prompt])).logits[0].numpy()
    flags = {"p": 2, "start": 6, "end": 6, "max_seq_len": 64, "probes": "never"}
    # In files of transformers 4, and under the names that the modules have in transformers 5.
    newer = tmp_path / "newer"
    newer.mkdir()
    save_file(network.state_dict() | {"lm_head.weight": network.lm_head.weight.clone()}, newer / "model.safetensors")
    (newer / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    for directory in (tmp_path / "model", newer):
        checkpoint = Checkpoint(directory, None)
        assert checkpoint.model.eos_token_ids == (1, 106) and checkpoint.model.sliding_window == 9
        assert relative(checkpoint_logits(checkpoint, prompt).numpy(), expected) < 1e-5
        assert relative(score(load_hugging_face(str(directory)), prompt).numpy(), expected) < 1e-5
        engine = cqil_trt.build(model=directory, output=tmp_path / "engine", force=True, **flags)
        assert engine.model.architecture == "Gemma3ForCausalLM" and engine.model.tie_embeddings
    done = build("--model", newer, "--output", tmp_path / "again", "--dry-run")
    assert done.returncode == 0 and "reads more than text: only its text model is built" in done.stdout, done.stderr


def test_what_a_text_config_leaves_out_is_transformers_default(tmp_path):
    # As the published configurations have it.
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    values = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106], "torch_dtype": "bfloat16"}
    model = families.read_config(write_json(tmp_path / "config.json", values))
    expected = transformers.Gemma3Config(**json.loads(json.dumps(values))).text_config
    assert (model.num_heads, model.num_kv_heads) == (expected.num_attention_heads, expected.num_key_value_heads)
    assert (model.vocab_size, model.intermediate_size) == (expected.vocab_size, expected.intermediate_size)
    assert (model.head_dim, model.max_position) == (expected.head_dim, expected.max_position_embeddings)
    windowed = [i for i, kind in enumerate(expected.layer_types) if kind == "sliding_attention"]
    assert (model.windowed, model.dtype) == (tuple(windowed), "bfloat16")


@pytest.mark.parametrize("kind, why", [("qwen3_vl", "images"), ("llama4", "mixtures of experts")])
def test_families_that_are_refused_say_why(kind, why, tmp_path):
    with pytest.raises(UserError, match=f"{kind} is not supported: .*{why}"):
        families.read_config(write_json(tmp_path / "config.json", {"model_type": kind}))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_theta must be given for full_attention"),
        ("gemma2", {"hidden_activation": "relu"}, "activation 'relu'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 6}, "layer_types: 'chunked_attention'"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must be a list of 6"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must be a list of 6"),
        ("granite", {"residual_multiplier": "much"}, "residual_multiplier must be a number"),
        ("phi3-longrope", {"partial_rotary_factor": 2.0}, "rotating 32"),
    ],
)
def test_wrong_fields_are_named(name, changes, message, models, tmp_path):
    values = json.loads((models[name] / "config.json").read_text())
    if "partial_rotary_factor" in changes:
        values.pop("rope_parameters")
    with pytest.raises(UserError, match=message):
        families.read_config(write_json(tmp_path / "config.json", {**values, **changes}))


def test_mistral_with_layer_types_is_ministral(models, tmp_path):
    """As transformers' AutoConfig takes it."""
    values = json.loads((models["ministral"] / "config.json").read_text())
    path = write_json(tmp_path / "config.json", {**values, "model_type": "mistral"})
    assert families.read_config(path) == families.read_config(models["ministral"] / "config.json")
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "ministral"


# llama.cpp looks GELU up in a table of float16.
JUDGED = {"gemma2": 5e-2, "smollm3": 1e-4, "granite": 1e-4, "olmo3": 1e-4, "phi3-longrope": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize("name", JUDGED)
def test_llama_cpp_says_the_same_of_a_gguf(name, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp (the package xllamacpp) is not installed")
    architecture, changes = FAMILIES[name]
    taken_for_granted = {"gemma2": {"query_pre_attn_scalar": 12}, "smollm3": {"no_rope_layers": None}}
    source = make_model(tmp_path / "hf", architecture, **{**changes, **taken_for_granted.get(name, {})})
    path, prompt = write_gguf(tmp_path / "model.gguf", source, add=add_vocabulary), sequences(4)[0]
    answers = llama_cpp_answers(llama_cpp, path, prompt)
    tokens = prompt + [token for token, _ in answers[:-1]]
    found = torch.log_softmax(checkpoint_logits(Checkpoint(path, None), tokens), -1)[len(prompt) - 1 :]
    for ours, (_, theirs) in zip(found, answers, strict=True):
        likely = {token: value for token, value in theirs.items() if value > -12}
        assert likely and all(abs(float(ours[token]) - value) < JUDGED[name] for token, value in likely.items())


def add_vocabulary(writer):
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(128))])
    writer.add_token_scores([0.0] * 131)
    writer.add_token_types([2, 3, 3] + [1] * 128)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def llama_cpp_answers(llama_cpp, path, prompt):
    """Greedy tokens, and the log-probabilities of all tokens that each was chosen from, computed in float32."""
    options = llama_cpp.CommonParams()
    options.port = free_port()
    options.model.path, options.n_ctx, options.warmup, options.verbosity = str(path), 128, False, -1
    options.cache_type_k = options.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.n_parallel, options.cpuparams.n_threads = 1, 1
    request = {"prompt": prompt, "n_predict": 5, "temperature": 0.0, "n_probs": 131}
    answer = llama_cpp.Server(options).handle_completions(request)
    content = answer["choices"][0]["logprobs"]["content"]
    return [(each["id"], {top["id"]: top["logprob"] for top in each["top_logprobs"]}) for each in content]
