"""Checkpoint (+ adapter) → engine directory: `build` checks everything, then writes."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cqil_trt import engine as engine_directory
from cqil_trt.config import CqilConfig, EngineConfig, ModelConfig
from cqil_trt.errors import UserError
from cqil_trt.lora import LoraReader
from cqil_trt.presets import preset as find_preset
from cqil_trt.schedule import Group, Layer
from cqil_trt.shard import Piece, RankPlan, checkpoint_shapes, plan
from cqil_trt.tokenizer import save_tokenizer
from cqil_trt.weights import WeightReader, check_shapes, open_checkpoint

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Elements handled at a time: small enough that a block and its float32 copy stay in the caches while the adapter is
# merged, large enough that a block's matrix product is efficient.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class BuildPlan:
    """A build that has been checked and only needs writing."""

    model: ModelConfig
    cqil: CqilConfig
    limits: EngineConfig
    ranks: tuple[RankPlan, ...]
    reader: WeightReader
    source: engine_directory.Source
    output: Path
    replace: bool
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(rank.stored_bytes(self.limits.dtype) for rank in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """What the build will do, for people and machines: placement of layers, bytes, collectives."""
        dtype = self.limits.dtype
        alone = plan(self.model, CqilConfig(1))[0].bytes_per_token(dtype)
        ranks = [
            {
                "rank": rank.rank,
                "steps": describe_steps(rank),
                "weight_bytes": rank.stored_bytes(dtype),
                "bytes_per_token": rank.bytes_per_token(dtype),
                "kv_cache_bytes_per_token": rank.cache_bytes_per_token(dtype),
                "all_reduces_per_token": rank.schedule.all_reduces,
                "broadcasts_per_token": rank.schedule.broadcasts,
            }
            for rank in self.ranks
        ]
        # The slowest rank reads the most; in placement leader that is rank 0, which all others wait for.
        critical = max(rank["bytes_per_token"] for rank in ranks)
        return {
            "model": self.source.model,
            "lora": self.source.lora,
            "architecture": self.model.architecture,
            "layers": self.model.num_layers,
            "cqil": self.cqil.to_dict(),
            "limits": self.limits.to_dict(),
            "output": str(self.output),
            "ranks": ranks,
            "bytes_per_token_one_rank": alone,
            "bytes_per_token_critical_path": critical,
            "saving": 1 - critical / alone,
            "notes": list(self.notes),
        }


def describe_steps(rank: RankPlan) -> str:
    """A rank's layers as a person would write them, e.g. `0-11 split, 12 14 … 28, 30-31 split`."""
    parts: list[str] = []
    run: list[int] = []
    split = False

    def flush() -> None:
        if run:
            parts.append(f"{run[0]}-{run[-1]}" + (f" (1/{rank.world_size} of each)" if split else ""))
            run.clear()

    own = [step.index for step in rank.schedule.layers if isinstance(step, Group)]
    for step in rank.schedule.layers:
        if isinstance(step, Layer):
            split = step.split
            run.append(step.index)
        elif step.index == own[0]:
            flush()
            parts.append(" ".join(map(str, own)) if len(own) <= 4 else f"{own[0]} {own[1]} … {own[-1]}")
    flush()
    return ", ".join(parts) or "none"


def prepare(
    model: str | Path,
    lora: str | Path | None = None,
    preset: str | None = None,
    p: int | None = None,
    d: int | None = None,
    start: int | None = None,
    end: int | None = None,
    bypass: str | None = None,
    placement: str | None = None,
    dtype: str | None = None,
    backend: str = "torch",
    max_batch_size: int = 8,
    max_seq_len: int | None = None,
    output: str | Path | None = None,
    force: bool = False,
) -> BuildPlan:
    """Opens and checks everything a build needs without writing anything; arguments as in `build`."""
    path = Path(model)
    config, reader = open_checkpoint(path)
    check_shapes(reader, checkpoint_shapes(config))
    if lora is not None:
        reader = LoraReader(reader, Path(lora), config.tie_embeddings)

    notes: list[str] = []
    cqil = _choose_cqil(config, notes, preset, p, d, start, end, bypass, placement)
    if max_seq_len is None:
        max_seq_len = min(2048, config.max_position, config.sliding_window or config.max_position)
    limits = EngineConfig(max_batch_size, max_seq_len, dtype or config.dtype, backend)
    limits.check_model(config)
    ranks = plan(config, cqil)

    chosen = output is not None
    target = Path(output) if output is not None else Path("engines") / _default_name(path, cqil, limits, lora)
    if chosen and target.exists() and not force:
        raise UserError(f"--output {target}: exists already (--force replaces it)")
    source = engine_directory.Source(str(path.resolve()), None if lora is None else str(Path(lora).resolve()))
    # Under a name of our own making, building the same again replaces it; another model of that name does not.
    if not chosen and target.exists() and not force:
        if engine_directory.source_of(target) not in (None, source):
            raise UserError(f"{target}: holds an engine of another model (--force replaces it, or give --output)")
    return BuildPlan(config, cqil, limits, ranks, reader, source, target, force or not chosen, tuple(notes))


def _choose_cqil(model: ModelConfig, notes: list[str], name, p, d, start, end, bypass, placement) -> CqilConfig:
    given = {"p": p, "d": d, "start": start, "end": end, "bypass": bypass, "placement": placement}
    given = {field: value for field, value in given.items() if value is not None}
    if given.get("placement") == "tensor":
        ignored = [f"--{field}" for field in ("d", "start", "end", "bypass") if given.get(field)]
        if ignored:
            notes.append(f"placement tensor has no groups: {', '.join(ignored)} not used")
        return CqilConfig(given.get("p", find_preset(name).p if name else 2), placement="tensor")
    if name is not None:
        config = replace(find_preset(name), **given)
        config.check_depth(model.num_layers)
        return config
    config = CqilConfig.choose(model.num_layers, **{"p": 2, **given})
    if config.groups and ("start" not in given or "end" not in given):
        notes.append(
            f"layers [{config.start}, {config.end}) of {model.num_layers} run concurrently: without both --start and "
            "--end the rest is chosen around the middle of the model"
        )
    elif config.p > 1 and not config.groups:
        notes.append("no layers run concurrently: the range is empty, so this is plain tensor parallelism or one rank")
    return config


def _default_name(model: Path, cqil: CqilConfig, limits: EngineConfig, lora: str | Path | None) -> str:
    parts = [model.stem if model.suffix == ".gguf" else model.resolve().name]
    if lora is not None:
        parts.append(Path(lora).resolve().name)
    parts.append(f"p{cqil.p}-d{cqil.d}-{cqil.start}-{cqil.end}")
    if cqil.d:
        parts.append(cqil.bypass)
    return "-".join([*parts, cqil.placement, limits.backend, limits.dtype])


def build(*, progress: bool = False, **arguments: Any) -> engine_directory.Engine:
    """Builds an engine directory and opens it.

    Args:
        model: a Hugging Face directory or a .gguf file.
        lora: a PEFT adapter directory, merged in float32.
        preset: a published configuration (`presets.PRESETS`); p, d, start, end, bypass and placement override it.
        p, d, start, end, bypass, placement: see `CqilConfig`; start and end default to the middle of the model.
        dtype: float32, float16 or bfloat16; default the checkpoint's (float32 for GGUF).
        backend: which network the ranks execute.
        max_batch_size, max_seq_len: limits in sequences and tokens; default 8 and min(2048, the model's).
        output: the directory to make; default engines/NAME, which replaces an engine of that name.
        force: replace an engine at `output`.
        progress: show a progress bar on standard error.

    Raises:
        UserError: a wrong input; nothing is left behind.
    """
    return write(prepare(**arguments), progress=progress)


def write(job: BuildPlan, progress: bool = False) -> engine_directory.Engine:
    """Writes the engine of a checked plan: every rank's weights, the tokenizer, config.json last."""
    from tqdm import tqdm

    bar = tqdm(total=job.total_bytes, unit="B", unit_scale=True, desc="writing", disable=not progress, leave=False)
    with bar, engine_directory.new_directory(job.output, job.replace) as directory:
        # The tokenizer first: what is wrong with it should not come out after gigabytes of weights.
        tokenizer = save_tokenizer(Path(job.source.model), directory)
        files = {path.name: engine_directory.fingerprint(path) for path in tokenizer}
        for rank in job.ranks:
            name = engine_directory.rank_file(rank.rank)
            files[name] = write_rank(directory / name, rank, job.reader, job.limits.dtype, bar.update)
        engine_directory.write_config(
            directory,
            {
                "model": job.model.to_dict(),
                "cqil": job.cqil.to_dict(),
                "limits": job.limits.to_dict(),
                "source": {"model": job.source.model, "lora": job.source.lora},
                "backend_version": torch.__version__,
                "architecture": "any",
                "created": datetime.now(timezone.utc).isoformat(),
                "files": files,
            },
        )
    return engine_directory.Engine.open(job.output)


def rank_tensors(rank: RankPlan, reader: WeightReader, dtype: str) -> Iterator[torch.Tensor]:
    """The elements of the rank's tensors, in the order of `rank.tensors`, in blocks of bounded size."""
    target = getattr(torch, dtype)
    for tensor in rank.tensors:
        for piece in tensor.pieces:
            for block in _blocks(reader, piece):
                yield block.to(target).contiguous()


def _blocks(reader: WeightReader, piece: Piece) -> Iterator[torch.Tensor]:
    shape = reader.shapes()[piece.source]
    first, last = piece.rows or (0, shape[0])
    width = shape[1] if len(shape) > 1 else 1
    step = max(1, _BLOCK_ELEMENTS // width)
    for row in range(first, last, step):
        yield reader.read(piece.source, (row, min(row + step, last)), piece.columns)


def write_rank(
    path: Path, rank: RankPlan, reader: WeightReader, dtype: str, advance: Callable[[int], Any] = lambda count: None
) -> dict[str, Any]:
    """Writes a rank's tensors as one safetensors file; returns its size in bytes and sha256.

    The layout is known before the first weight is read, so blocks go straight to disk and memory stays bounded.
    A second thread hashes and writes while this one reads and merges.
    """
    header: dict[str, Any] = {}
    offset = 0
    itemsize = getattr(torch, dtype).itemsize
    for tensor in rank.tensors:
        size = tensor.elements * itemsize
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    blocks: queue.Queue[memoryview | bytes | None] = queue.Queue(maxsize=8)
    failure: list[BaseException] = []

    file = open(path, "wb", buffering=0)

    def drain() -> None:
        while (block := blocks.get()) is not None:
            if failure:
                continue  # keep emptying the queue, so that the producer is not left waiting
            try:
                digest.update(block)
                rest = memoryview(block)
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException as error:
                failure.append(error)

    writer = threading.Thread(target=drain, name="engine-writer")
    writer.start()
    try:
        blocks.put(len(text).to_bytes(8, "little") + text)
        for block in rank_tensors(rank, reader, dtype):
            if failure:
                break
            blocks.put(memoryview(block.view(torch.uint8).numpy()).cast("B"))
            advance(block.nbytes)
    finally:
        blocks.put(None)
        writer.join()
        file.close()
    if failure:
        raise failure[0]
    return {"size": 8 + len(text) + offset, "sha256": digest.hexdigest()}
