"""Checkpoint (+ adapter), or an engine of another backend → engine directory: checks everything, then writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqil_trt import backends, families, probes
from cqil_trt import engine as engine_directory
from cqil_trt.config import AUTO, KV_FP8, CqilConfig, EngineLimits, layer_list
from cqil_trt.config_file import ConfigFile
from cqil_trt.demo import demo_adapter, is_demo_model
from cqil_trt.errors import UserError
from cqil_trt.formats import DENSE
from cqil_trt.hub import Found, find_adapter, find_model
from cqil_trt.job import Job
from cqil_trt.model import ModelConfig
from cqil_trt.presets import preset as find_preset
from cqil_trt.schedule import Group, Layer
from cqil_trt.scheduler import Circle
from cqil_trt.shard import RankPlan, plan

if TYPE_CHECKING:
    from cqil_trt.checkpoint import Checkpoint
    from cqil_trt.tokenizer import TokenizerFiles

PROBES = ("auto", "always", "never")
# The value of --lora that asks for no adapter.
NO_ADAPTER = "none"
# The value of --quantize that asks for the checkpoint's own codes.
STORED = "stored"


class EngineWeights:
    """A plain engine as the source of another one: its files hold merged, sharded weights. Needs no PyTorch."""

    def __init__(self, path: Path):
        self.engine = engine_directory.Engine.open(path)
        self.model, self.source, self.rotary = self.engine.model, self.engine.source, self.engine.rotary
        self.note = ""
        if self.engine.backend != backends.PLAIN:
            raise UserError(
                f"--model {path}: an engine of backend {self.engine.backend}; only one of backend {backends.PLAIN} can "
                "be compiled"
            )
        for rank in range(self.engine.world_size):
            self.engine.files_of(rank, backends.load(backends.PLAIN).rank_files(rank))

    def write_shared(self, directory: Path) -> list[Path]:
        return [self._take(name, directory / name) for name in self.engine.shared_files if name != probes.FILE]

    def write_rank(self, path: Path, rank: RankPlan, advance: Callable[[int], Any]) -> dict[str, Any]:
        self._take(path.name, path)
        entry = self.engine.files[path.name]
        advance(entry["size"])
        return dict(entry)

    def write_probes(
        self, directory: Path, cqil: CqilConfig, limits: EngineLimits, wanted: str, progress: bool
    ) -> list[Path]:
        if probes.FILE not in self.engine.files:
            return []
        return [self._take(probes.FILE, directory / probes.FILE)]

    def _take(self, name: str, target: Path) -> Path:
        """Hard-links the file, or copies it where the file system cannot link."""
        self.engine.verify(name)
        target.parent.mkdir(exist_ok=True)
        try:
            os.link(self.engine.path / name, target)
        except OSError:
            shutil.copyfile(self.engine.path / name, target)
        return target


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The arguments of a build.

    Attributes:
        model: a Hugging Face directory, a .gguf file, a name on the hub (see `hub`), or an engine of the plain backend
            to compile for another backend.
        lora: a PEFT adapter (a directory or a name on the hub), merged in float32. If it contains a CQIL configuration,
            that replaces the defaults of the next two. None: the adapter bundled with this package, for the demo model
            in the configuration it was trained for. "none": no adapter.
        preset: a published configuration (`presets.PRESETS`), which the next two override.
        config: a file of `similarity.py --write` instead of a preset. It also has the placement and the defaults of
            dtype, quantize, quantize_head and kv_dtype.
        p, d, start, end, bypass, placement, ranks_per_layer: see `CqilConfig`; start and end default to the middle of
            the model.
        drop_attention_join: as `CqilConfig.dropping` takes it.
        dtype: float32, float16 or bfloat16; default the file's of `config`, or the checkpoint's (float32 for GGUF).
        quantize: the format that the matrices of layers are quantized to: one of `formats.names()`, default that of
            `config`, or dense; or "stored", the codes of a quantized checkpoint.
        keep: what stays dense all the same, as `parse_keep` reads it.
        quantize_head: the format of the last projection, default that of `config`, or dense.
        kv_dtype: how the KV cache is stored, one of `config.KV_DTYPES`, default that of `config`, or in the engine's
            type ("auto").
        backend: one of `backends.names()`.
        max_batch_size, max_seq_len: limits in sequences and tokens; default 8 and min(2048, the model's context, with
            dynamic rope and longrope the one before scaling; a sliding window, if nothing else keeps the model from
            GPUs).
        prefill_chunk: prompt tokens per forward pass; default 512.
        probes: whether to store the float32 reference's answers to a few prompts, for validation without PyTorch:
            "always", "never", or "auto" (models up to 2 GiB in float32, or that fit on a GPU visible to PyTorch).
        tokenizer: whether to include the tokenizer; without it the engine accepts token ids only.
        output: the directory to create; default engines/NAME, where an engine of the same model is replaced.
        force: replace an engine at `output`.
        options: the backend's own options (`Backend.options`), by name.
    """

    model: str | Path | Found
    lora: str | Path | Found | None = None
    preset: str | None = None
    config: str | Path | None = None
    p: int | None = None
    d: int | None = None
    start: int | None = None
    end: int | None = None
    bypass: str | None = None
    placement: str | None = None
    drop_attention_join: str | tuple[int, ...] | None = None
    ranks_per_layer: int | None = None
    dtype: str | None = None
    quantize: str | None = None
    keep: str | None = None
    quantize_head: str | None = None
    kv_dtype: str | None = None
    backend: str = backends.PLAIN
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    prefill_chunk: int | None = None
    probes: str = "auto"
    tokenizer: bool = True
    output: str | Path | None = None
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **arguments: Any) -> BuildRequest:
        """The request with these fields and backend options, mixed as the command's flags are."""
        known = {f.name for f in fields(cls)}
        return cls(
            **{name: value for name, value in arguments.items() if name in known},
            options={name: value for name, value in arguments.items() if name not in known},
        )

    @property
    def cqil_flags(self) -> dict[str, Any]:
        """The flags for `choose_cqil`."""
        known = {field.name for field in fields(CqilConfig)}
        names = ("preset", *(field.name for field in fields(self) if field.name in known))
        return {name: getattr(self, name) for name in names}

    def locate(self, job: Job) -> BuildRequest:
        """The same request with model and adapter located, on every rank. Only rank 0 downloads from the hub."""
        model, adapter = job.share(lambda: (find_model(self.model), self.find_adapter()))
        return replace(self, model=model, lora=adapter or self.lora)

    def find_adapter(self) -> Found | None:
        """The adapter that `lora` names, if any."""
        return None if self.lora is None or self.lora == NO_ADAPTER else find_adapter(self.lora)


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """A build that has been checked and only needs writing.

    `description`, `options`: as in `Compilation`. `replace`: whether an engine at `output` is replaced. `notes`:
    messages for the user. `found`, `adapter`: where model and adapter came from.
    """

    model: ModelConfig
    cqil: CqilConfig
    limits: EngineLimits
    backend: str
    description: backends.Description
    options: Mapping[str, Any]
    ranks: tuple[RankPlan, ...]
    weights: Checkpoint | EngineWeights
    output: Path
    replace: bool
    notes: tuple[str, ...]
    probes: str
    found: Found
    adapter: Found | None

    @property
    def source(self) -> engine_directory.Source:
        return self.weights.source

    def to_dict(self) -> dict[str, Any]:
        """What the build will do: placement of layers, bytes, collectives."""
        limits = self.limits
        stored = limits.dtype, limits.weights, limits.keep, limits.head
        alone = plan(self.model, CqilConfig(p=1), *stored)[0].bytes_per_token
        ranks: list[dict[str, Any]] = [
            {
                "rank": rank.rank,
                "steps": describe_steps(rank),
                "weight_bytes": rank.stored_bytes,
                "bytes_per_token": rank.bytes_per_token,
                "kv_cache_bytes_per_token": rank.cache_bytes_per_token(limits.cache_dtype),
                "kv_cache_bytes_per_sequence": rank.cache_bytes(limits),
                "all_reduces_per_token": rank.all_reduces,
                "broadcasts_per_token": rank.schedule.broadcasts,
                "bypasses_per_token": rank.bypasses,
            }
            for rank in self.ranks
        ]
        # The slowest rank reads the most; in placement leader that is rank 0, which all others wait for.
        critical = max(rank["bytes_per_token"] for rank in ranks)
        return {
            "model": self.source.model if self.found.commit is None else self.found.name,
            "model_commit": self.found.commit,
            "lora": self.source.lora if self.adapter is None or self.adapter.commit is None else self.adapter.name,
            "lora_commit": None if self.adapter is None else self.adapter.commit,
            "architecture": self.model.architecture,
            "layers": self.model.num_layers,
            "cqil": self.cqil.to_dict(),
            "limits": {**self.limits.to_dict(), "backend": self.backend},
            "backend_version": self.description.version,
            "gpus": self.description.architecture,
            "output": str(self.output),
            "ranks": ranks,
            "bytes_per_token_one_rank": alone,
            "bytes_per_token_critical_path": critical,
            "saving": 1 - critical / alone,
            "notes": list(self.notes),
        }


def describe_steps(rank: RankPlan) -> str:
    """A rank's layers in short form, e.g. `0-11 (1/2 of each), 12 14 … 28, 30-31 (1/2 of each, one join)`.

    With four ranks, two per layer: `0-11 (1/4 of each), 12 14 … 28 (1/2 of each), 30-31 (1/4 of each)`.
    """
    parts: list[str] = []
    run: list[Layer] = []

    def flush() -> None:
        if run:
            of_each = " of each" if len(run) > 1 else ""
            join = ", one join" if run[0].drops_join else ""
            how = f" (1/{rank.world_size}{of_each}{join})" if run[0].split else ""
            parts.append(layer_list([step.index for step in run]) + how)
            run.clear()

    groups = [step for step in rank.schedule.layers if isinstance(step, Group)]
    own = [step.index for step in groups]
    for step in rank.schedule.layers:
        if isinstance(step, Layer):
            if run and run[0].drops_join != step.drops_join:
                flush()
            run.append(step)
        elif step.index == own[0]:
            flush()
            shared = f" (1/{step.parts}{' of each' if len(own) > 1 else ''})" if step.parts > 1 else ""
            parts.append((" ".join(map(str, own)) if len(own) <= 4 else f"{own[0]} {own[1]} … {own[-1]}") + shared)
    flush()
    return ", ".join(parts) or "none"


def prepare(request: BuildRequest) -> BuildPlan:
    """Opens and checks everything a build needs; writes nothing. Raises UserError for a wrong input."""
    backend = backends.load(request.backend)
    found = find_model(request.model)
    adapter = request.find_adapter()
    notes = [f"{place.name}: {place.note}" for place in (found, adapter) if place is not None and place.note]
    if engine_directory.is_engine(found.path):
        opened = _open_engine(request, found.path)
    else:
        opened, adapter = _open_checkpoint(request, found, adapter, notes)
    limits = _choose_limits(request, opened)
    if opened.weights.note:
        stored = limits.dtype if limits.weights == DENSE else limits.weights
        notes.append(f"{found.name}: {opened.weights.note}; the engine stores them in {stored}")
    if limits.kv_dtype == KV_FP8:
        scales = "those of the checkpoint" if limits.kv_scales else "1, as the checkpoint has none"
        notes.append(f"the scales of the KV cache are {scales}")
    elif not isinstance(opened.weights, EngineWeights) and opened.weights.has_kv_scales:
        notes.append(f"the checkpoint's scales of an FP8 KV cache are not used: --kv-dtype {KV_FP8} takes them")
    backend.check_model(opened.weights.model, limits)
    options = _backend_options(request)
    if not isinstance(opened.weights, EngineWeights):
        opened.weights.quantize(limits)
    ranks = plan(opened.weights.model, opened.cqil, limits.dtype, limits.weights, limits.keep, limits.head)
    description = backend.describe(limits, options, ranks)
    circle = Circle.length_for(opened.weights.model.sliding_window, limits) if description.circles else None
    limits = replace(limits, circle=circle)
    name = opened.name or _default_name(request.backend, found, opened.cqil, limits, adapter)
    target, may_replace = _choose_output(request, name, opened.weights.source, notes)
    return BuildPlan(
        model=opened.weights.model,
        cqil=opened.cqil,
        limits=limits,
        backend=request.backend,
        description=description,
        options=options,
        ranks=ranks,
        weights=opened.weights,
        output=target,
        replace=may_replace,
        notes=(*notes, *description.notes),
        probes=request.probes,
        found=found,
        adapter=adapter,
    )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The source of a build. `dtype`, `defaults`: what the request may override.

    `name`: the new engine's name; None derives it from the model.
    """

    weights: Checkpoint | EngineWeights
    cqil: CqilConfig
    dtype: str
    defaults: EngineLimits
    name: str | None = None


def _open_engine(request: BuildRequest, path: Path) -> _Opened:
    weights = EngineWeights(path)
    decided = {
        "lora": request.lora,
        **request.cqil_flags,
        "config": request.config,
        "dtype": request.dtype,
        "quantize": request.quantize,
        "keep": request.keep,
        "quantize_head": request.quantize_head,
        "kv_dtype": request.kv_dtype,
        "no-tokenizer": None if request.tokenizer else True,
    }
    if given := [f"--{name.replace('_', '-')}" for name, value in decided.items() if value is not None]:
        raise UserError(f"--model {path}: an engine, which fixes {', '.join(given)}: omit it")
    plain = f"-{backends.PLAIN}-"
    name = f"{path.name}-{request.backend}"
    if plain in path.name:
        name = path.name.replace(plain, f"-{request.backend}-")
    limits = weights.engine.limits
    return _Opened(weights=weights, cqil=weights.engine.cqil, dtype=limits.dtype, defaults=limits, name=name)


def _open_checkpoint(
    request: BuildRequest, found: Found, adapter: Found | None, notes: list[str]
) -> tuple[_Opened, Found | None]:
    """The checkpoint with its adapter, and the adapter that was merged."""
    from cqil_trt.checkpoint import Checkpoint

    path = found.path
    weights = Checkpoint(path, None if adapter is None else adapter.path, request.tokenizer)
    trained = None if adapter is None else CqilConfig.of_adapter(adapter.path)
    config = read_config(request.config, weights.model, request.preset)
    cqil = choose_cqil(weights.model, request.cqil_flags, notes, trained, config)
    if request.lora is None and (shipped := demo_adapter(path, cqil)) is not None:
        adapter = Found(name=str(shipped), path=shipped)
        weights.merge(shipped)
        notes.append(
            f"the adapter {shipped} was trained for this model and these layers (--lora {NO_ADAPTER} leaves it out)"
        )
    elif request.lora is None and cqil.groups and is_demo_model(path):
        notes.append(
            "the demo model's adapter was trained for another configuration and is not merged (--lora merges it)"
        )
    model = weights.model
    if path.is_dir() and families.reads_more_than_text(path / "config.json"):
        notes.append(f"{found.name} reads more than text: only its text model is built")
    if request.tokenizer:
        notes += _tokenizer_notes(weights.tokenizer, None if adapter is None else adapter.path, model.vocab_size)
    longest = min(2048, model.context, model.fixed_context)
    if model.sliding_window is not None and not model.features(model.sliding_window):
        longest = min(longest, model.sliding_window)  # within it, every backend computes the model
    defaults = EngineLimits(max_seq_len=longest)
    if config is not None:
        defaults = replace(defaults, **config.stored)
    dtype = model.dtype if config is None else config.dtype
    return _Opened(weights=weights, cqil=cqil, dtype=dtype, defaults=defaults), adapter


def _choose_limits(request: BuildRequest, opened: _Opened) -> EngineLimits:
    names = ("max_batch_size", "max_seq_len", "prefill_chunk")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.quantize == STORED:
        given["weights"], given["keep"] = _own_format(request, opened)
    elif request.quantize is not None:
        given["weights"] = request.quantize
    if request.quantize != STORED and request.keep is not None:
        if given.get("weights", opened.defaults.weights) == DENSE:
            raise UserError("--keep needs --quantize")
        given["keep"] = parse_keep(request.keep, opened.weights.model.num_layers)
    keeps_head = "lm_head" in (request.keep or "").split(",")
    if keeps_head and request.quantize_head not in (None, DENSE):
        raise UserError("--keep lm_head and --quantize-head contradict each other")
    if keeps_head or request.quantize_head is not None:
        given["head"] = request.quantize_head or DENSE
    given["kv_dtype"] = request.kv_dtype or opened.defaults.kv_dtype
    if given["kv_dtype"] == KV_FP8 and not isinstance(opened.weights, EngineWeights):
        given["kv_scales"] = opened.weights.kv_scales
    limits = replace(opened.defaults, dtype=request.dtype or opened.dtype, circle=None, **given)
    limits.check_model(opened.weights.model)
    return limits


def _own_format(request: BuildRequest, opened: _Opened) -> tuple[str, tuple[int, ...]]:
    if request.keep is not None:
        raise UserError(f"--keep: --quantize {STORED} keeps what is not quantized")
    dtype = request.dtype or opened.dtype
    found = None if isinstance(opened.weights, EngineWeights) else opened.weights.own_format(dtype)
    if found is None:
        model = opened.weights.source.model
        raise UserError(
            f"--quantize {STORED}: no format of an engine in {dtype} holds the matrices of {model} exactly, or an "
            "adapter changes them: leave it out, or choose a format"
        )
    return found


def parse_keep(text: str | None, num_layers: int) -> tuple[int, ...]:
    """The layers in a list like `lm_head,layers.0,layers.30-31`. Raises UserError for other text.

    The embedding table always stays dense, and the last projection unless it is asked for (`quantize_head`), so naming
    them changes nothing.
    """
    kept: set[int] = set()
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"layers\.(\d{1,4})(?:-(\d{1,4}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match and first <= last < num_layers:
            kept |= {*range(first, last + 1)}
        elif part not in ("lm_head", "embed_tokens"):
            raise UserError(
                f"--keep {part!r:.60}: expected lm_head, embed_tokens, or layers from 0 to {num_layers - 1} like "
                "layers.0 or layers.2-5"
            )
    return tuple(sorted(kept))


def _backend_options(request: BuildRequest) -> dict[str, Any]:
    """The backend options in the request. Raises UserError for one that the backend does not have."""
    # argparse gives None for an option and False for a switch that the user left out; 0 is a value.
    options = {name: value for name, value in request.options.items() if value is not None and value is not False}
    known = backends.all_options()
    for name in options:
        if name not in known:
            raise TypeError(f"build() has no argument {name}")
        _, takers = known[name]
        if request.backend not in takers:
            only = f"backend {takers[0]} takes" if len(takers) == 1 else f"backends {' and '.join(takers)} take"
            raise UserError(f"--{name.replace('_', '-')}: only {only} it, found backend {request.backend}")
    return options


def _choose_output(
    request: BuildRequest, name: str, source: engine_directory.Source, notes: list[str]
) -> tuple[Path, bool]:
    """The output directory, and whether an engine there may be replaced."""
    chosen = request.output is not None
    if request.output == "":
        raise UserError("--output is empty")
    target = Path(request.output or Path("engines") / name)
    if target.parent.exists() and not target.parent.is_dir():
        raise UserError(f"--output {target}: {target.parent} is not a directory")
    if target.exists():
        engine_directory.check_replaceable(target, request.force or not chosen)
    old = engine_directory.existing(target)
    # Under a default name, a build replaces an engine of the same model but not of another.
    if old is not None and old.source != source and not (chosen or request.force):
        raise UserError(f"{target}: holds an engine of another model or commit (--force replaces it, or give --output)")
    if old is None and engine_directory.is_engine(target):
        notes.append(f"replaces what is left of an engine in {target}")
    elif old is not None:
        built = datetime.fromisoformat(old.created).strftime("%Y-%m-%d, %H:%M UTC")
        notes.append(f"replaces the engine built on {built} in {target}")
    return target, request.force or not chosen


def _tokenizer_notes(tokenizer: TokenizerFiles | None, adapter: Path | None, vocab_size: int) -> list[str]:
    """Notes for the user about the tokenizer. Raises UserError if it cannot be read."""
    if tokenizer is None:
        return ["the model has no tokenizer: the engine accepts token ids only"]
    parts = {"tokenizer": tokenizer.place, "chat template": tokenizer.template}
    found = [f"the {part} is the adapter's" for part, place in parts.items() if place is not None and place == adapter]
    if tokenizer.guesses:
        found.append(
            "the GGUF file does not say how text is split (tokenizer.ggml.pre): using llama.cpp's default, which may "
            "be wrong for this model"
        )
    size = tokenizer.open().vocabulary.size()
    if size > vocab_size:
        found.append(
            f"the tokenizer has {size} tokens, the model {vocab_size}: prompts with tokens beyond those are refused"
        )
    return found


def read_config(path: str | Path | None, model: ModelConfig, preset: str | None) -> ConfigFile | None:
    """The file of --config, for `choose_cqil`. Raises UserError for a wrong one, or next to a preset."""
    if path is None:
        return None
    if preset is not None:
        raise UserError("--config and --preset both choose a configuration: give one of them")
    return ConfigFile.read(Path(path), model.num_layers)


def choose_cqil(
    model: ModelConfig,
    flags: Mapping[str, Any],
    notes: list[str],
    trained: CqilConfig | None = None,
    config: ConfigFile | None = None,
) -> CqilConfig:
    """The configuration that the flags choose.

    Flags override a preset or a `config` file, that overrides what an adapter was `trained` for, and that overrides the
    defaults. `flags`: preset and fields of `CqilConfig`; None where one was not given. Choices made for the user are
    appended to `notes`. Raises UserError for a configuration that does not fit the model.
    """
    given = {field: value for field, value in flags.items() if value is not None}
    preset = given.pop("preset", None)
    basis = config.cqil if config is not None else trained
    if preset is not None:
        basis = _preset_for(model, preset, given, notes)
    found = _choose_cqil(model, given, notes, basis, trained)
    if config is not None and found != config.cqil:
        there, here = (f"{cqil.summary}, {cqil.placement}" for cqil in (config.cqil, found))
        notes.append(f"the file of --config has {there}, and flags make it {here}")
    return found


def _preset_for(model: ModelConfig, name: str, given: Mapping[str, Any], notes: list[str]) -> CqilConfig:
    """The preset, which is noted to be for another depth where it is. Raises UserError for one beyond the model."""
    found, layers = find_preset(name), model.num_layers
    grouped = given.get("placement") != "tensor"
    if grouped and "end" not in given and found.cqil.end > layers:
        raise UserError(
            f"--preset {name}: its layers [{found.cqil.start}, {found.cqil.end}) are beyond the model, which has "
            f"{layers}: give --start and --end, or --p and --d instead of the preset"
        )
    if grouped and found.layers != layers:
        notes.append(f"--preset {name} was published for a model of {found.layers} layers, and this one has {layers}")
    return found.cqil


def _choose_cqil(
    model: ModelConfig, given: dict[str, Any], notes: list[str], basis: CqilConfig | None, trained: CqilConfig | None
) -> CqilConfig:
    if given.get("placement") == "tensor":
        ignored = [f"--{field}" for field in ("d", "start", "end", "bypass") if given.get(field)]
        if ignored:
            notes.append(f"placement tensor has no groups: {', '.join(ignored)} not used")
        sizes = {name: given.get(name, getattr(basis or CqilConfig(p=2), name)) for name in ("p", "ranks_per_layer")}
        config = CqilConfig(**sizes, placement="tensor")
        return config.dropping(given.get("drop_attention_join", ()), model.num_layers)
    if basis is not None:
        # Last, because the rest decides which layers have a join.
        dropped = given.pop("drop_attention_join", basis.drop_attention_join)
        config = replace(basis, **given, drop_attention_join=()).dropping(dropped, model.num_layers)
        if trained is not None and not config.computes_as(trained):
            notes.append(f"the adapter was trained for {trained.summary}, and this build is {config.summary}")
        return config
    config = CqilConfig.choose(model.num_layers, **{"p": 2, **given})
    if config.groups and ("start" not in given or "end" not in given):
        notes.append(
            f"layers [{config.start}, {config.end}) of {model.num_layers} run concurrently: a range around the "
            "middle of the model (--start and --end choose another)"
        )
    elif config.ranks > 1 and not config.groups:
        notes.append("no layers run concurrently, so this is tensor parallelism")
    return config


def _default_name(backend: str, model: Found, cqil: CqilConfig, limits: EngineLimits, adapter: Found | None) -> str:
    parts = [model.stem] if adapter is None else [model.stem, adapter.stem]
    parts.append(cqil.name)
    if cqil.d:
        parts.append(cqil.bypass)
    stored = [limits.dtype] if limits.weights == DENSE else [limits.weights, limits.dtype]
    stored += [] if limits.head == DENSE else [f"head-{limits.head}"]
    stored += [] if limits.kv_dtype == AUTO else [f"kv-{limits.kv_dtype}"]
    return "-".join([*parts, cqil.placement, backend, *stored])


def build(*, progress: bool = False, job: Job | None = None, **arguments: Any) -> engine_directory.Engine:
    """Builds an engine directory and opens it.

    Args:
        progress: show a progress bar on standard error.
        job: in an MPI job, every process makes the same call and builds its share of the ranks.
        arguments: fields of `BuildRequest` and options of the backend.

    Raises:
        UserError: a wrong input; nothing is left behind.
    """
    job = job or Job()
    request = BuildRequest.of(**arguments).locate(job)
    return write(job.agree(lambda: prepare(request)), progress, job)


def write(build: BuildPlan, progress: bool = False, job: Job | None = None) -> engine_directory.Engine:
    """Writes the engine of a checked plan: shared files, every rank's weights and network, config.json last."""
    job, backend = job or Job(), backends.load(build.backend)
    writing = engine_directory.writing(build.output)  # what one rank meets, all end with
    with ExitStack() as cleanup:
        new = engine_directory.new_directory(build.output, build.replace)
        directory = job.share(lambda: cleanup.enter_context(new))
        # The tokenizer first: its errors should be reported before gigabytes of weights are written.
        shared = job.share(writing(lambda: _write_shared(build, directory, progress)))
        mine = build.ranks[job.rank :: job.size]
        own = job.agree(writing(lambda: _write_ranks(build, directory, mine, shared, progress)))
        files = {name: entry for part in (shared, *job.gather(own)) for name, entry in part.items()}

        @writing
        def finish() -> None:
            backend.finish(
                backends.CompiledEngine(
                    directory=directory,
                    ranks=build.ranks,
                    limits=build.limits,
                    description=build.description,
                    progress=progress,
                )
            )
            engine_directory.write_config(
                directory,
                {
                    "model": build.model.to_dict(),
                    "cqil": build.cqil.to_dict(),
                    "limits": build.limits.to_dict(),
                    "backend": build.backend,
                    "rotary": build.weights.rotary,
                    "source": {"model": build.source.model, "lora": build.source.lora},
                    "backend_version": build.description.version,
                    "architecture": build.description.architecture,
                    "build": dict(build.description.build),
                    "created": datetime.now(timezone.utc).isoformat(),
                    "files": (found := _all_files(directory, files)),
                    "owners": _owners(found.keys() - shared.keys()),
                },
            )
            cleanup.close()

        job.share(finish)
    return job.agree(lambda: engine_directory.Engine.open(build.output))


def _write_shared(build: BuildPlan, directory: Path, progress: bool) -> dict[str, dict[str, Any]]:
    paths = build.weights.write_shared(directory)
    paths += build.weights.write_probes(directory, build.cqil, build.limits, build.probes, progress)
    return {path.relative_to(directory).as_posix(): engine_directory.fingerprint(path) for path in paths}


def _write_ranks(
    build: BuildPlan, directory: Path, ranks: tuple[RankPlan, ...], shared: Collection[str], progress: bool
) -> dict[str, dict[str, Any]]:
    """Writes and compiles these ranks; returns their files, as config.json lists them."""
    from tqdm import tqdm

    files: dict[str, dict[str, Any]] = {}
    total = sum(rank.stored_bytes for rank in ranks)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress, leave=False) as bar:
        for rank in ranks:
            name = engine_directory.rank_file(rank.rank)
            entry = build.weights.write_rank(directory / name, rank, bar.update)
            files[name] = entry
    backend = backends.load(build.backend)
    for rank in ranks:
        backend.compile(
            backends.Compilation(
                directory=directory,
                plan=rank,
                limits=build.limits,
                rotary=build.weights.rotary,
                description=build.description,
                options=build.options,
                progress=progress,
            )
        )
        for path in sorted(directory.rglob(f"rank{rank.rank}.*")):
            name = path.relative_to(directory).as_posix()
            if name not in files and name not in shared:  # a chat template may have such a name
                files[name] = engine_directory.fingerprint(path)
    return files


def _all_files(directory: Path, known: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """An engine's files: the known ones that still exist, and those that `Backend.finish` added."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != engine_directory.LOCK:
            found[name] = known.get(name) or engine_directory.fingerprint(path)
    return found


def _owners(names: Collection[str]) -> dict[str, int]:
    """The rank of each file that is named after one."""
    matches = ((name, re.fullmatch(r"(?:.+/)?rank(\d+)\..+", name)) for name in sorted(names))
    return {name: int(match[1]) for name, match in matches if match}
