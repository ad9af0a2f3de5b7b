"""A checkpoint (+ adapter) as the source of an engine, written rank by rank in bounded memory."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from cqil_trt import families, formats, probes
from cqil_trt.config import CqilConfig, EngineLimits
from cqil_trt.engine import Source, tensor_header
from cqil_trt.families.family import EMBEDDING, LM_HEAD
from cqil_trt.families.layout import checkpoint_shapes, layer_matrices
from cqil_trt.formats.int4 import GROUP
from cqil_trt.gguf_files import gguf_parts
from cqil_trt.lora import LoraReader
from cqil_trt.network.rotary import inverse_frequencies
from cqil_trt.shard import RankPlan
from cqil_trt.tokenizer import find_tokenizer
from cqil_trt.weights import WeightReader, check_shapes, has_kv_scales, kv_scales, open_checkpoint
from cqil_trt.weights.quantized import QuantizedMatrix, QuantizingReader

# The largest model, in bytes of float32, for which "auto" runs the reference without a GPU that it fits on.
_PROBE_BYTES = 2 << 30


class Checkpoint:
    """An opened and checked checkpoint with its adapter. Raises UserError for one that cannot be used.

    `tokenizer`: the files of its tokenizer; None without one, or if it is not wanted.
    """

    def __init__(self, path: Path, lora: Path | None = None, tokenizer: bool = True):
        self._path = gguf_parts(path)[0]  # the part with the metadata and the tokenizer
        self._with_tokenizer = tokenizer
        self.model, self.reader = open_checkpoint(self._path)
        self.note = self.reader.note
        check_shapes(self.reader, checkpoint_shapes(self.model))
        self.rotary = tuple(inverse_frequencies(self.model))
        self.merge(lora)

    def merge(self, lora: Path | None) -> None:
        """Merges an adapter into all later reads; None merges nothing."""
        self._own_formats: dict[str, tuple[str, tuple[int, ...]] | None] = {}
        self.tokenizer = find_tokenizer(self._path, lora) if self._with_tokenizer else None
        # A .gguf file that is a link, as in the hub's cache, keeps its name.
        place = self._path.resolve() if self._path.is_dir() else self._path.parent.resolve() / self._path.name
        self.source = Source(str(place), None if lora is None else str(lora.resolve()))
        if lora is not None:
            self.reader = merged = LoraReader(self.reader, lora, self.model)
            self.model = merged.model

    @property
    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """As in `EngineLimits`: what the checkpoint carries for an FP8 cache."""
        return kv_scales(self.reader, self.model.num_layers)

    @property
    def has_kv_scales(self) -> bool:
        """Whether it carries any, right or wrong."""
        return has_kv_scales(self.reader)

    def quantize(self, limits: EngineLimits) -> None:
        """Quantizes the matrices of all later reads as an engine with these limits stores them.

        A checkpoint that has them in this format already keeps them. With a quantized last projection, reads of
        `lm_head.weight` are of a matrix of its own, even in a model that shares it with the embedding.
        """
        wanted = {}
        stored = formats.load(limits.weights).quantized
        if stored and self.own_format(limits.dtype) != (limits.weights, limits.keep):
            wanted = {name: limits.weights for index, name in layer_matrices(self.model) if index not in limits.keep}
        head, shared = f"{LM_HEAD}.weight", {}
        if limits.head != formats.DENSE:
            wanted[head] = limits.head
            shared = {head: f"{EMBEDDING}.weight"} if self.model.tie_embeddings else {}
        if wanted:
            self.reader = QuantizingReader(self.reader, wanted, limits.dtype, shared)

    def own_format(self, dtype: str) -> tuple[str, tuple[int, ...]] | None:
        """The format in which an engine of type `dtype` holds the checkpoint's own codes, and the layers that have
        others or none.

        None where there is no such format. An adapter turns the matrices that it changes into dense ones. Reads all
        quantized matrices, at the first call for a type.
        """
        if dtype not in self._own_formats:
            kinds: dict[int, set[str | None]] = {}
            for index, name in layer_matrices(self.model):
                kinds.setdefault(index, set()).add(_format_of(self.reader.quantized(name), dtype))
            alike = {index: found.pop() for index, found in kinds.items() if len(found) == 1}
            counts = Counter(kind for kind in alike.values() if kind is not None)
            best = counts.most_common(1)[0][0] if counts else None
            others = tuple(index for index in kinds if alike.get(index) != best)
            self._own_formats[dtype] = None if best is None else (best, others)
        return self._own_formats[dtype]

    def write_shared(self, directory: Path) -> list[Path]:
        """Writes the shared files (the tokenizer) and returns them."""
        return [] if self.tokenizer is None else self.tokenizer.write(directory)

    def write_rank(self, path: Path, rank: RankPlan, advance: Callable[[int], Any]) -> dict[str, Any]:
        """Writes a rank's tensors; returns the size in bytes and BLAKE3."""
        return write_rank(path, rank, self.reader, advance)

    def write_probes(
        self, directory: Path, cqil: CqilConfig, limits: EngineLimits, wanted: str, progress: bool
    ) -> list[Path]:
        """Writes the reference's answers to a few prompts; none for "never", or for "auto" and a large model."""
        from cqil_trt import reference

        elements = sum(torch.Size(shape).numel() for shape in checkpoint_shapes(self.model).values())
        if wanted == "never" or (wanted == "auto" and 4 * elements > _PROBE_BYTES and not reference.fits_gpu(elements)):
            return []
        if not families.of(self.model).in_transformers(self.model):
            return []
        prompts = probes.prompts(directory, self.model.vocab_size, limits.max_seq_len)
        network = reference.with_cqil(reference.from_reader(self.model, self.reader), cqil)
        network = reference.with_kv_cache(network, limits)
        steps = [min(probes.STEPS, limits.max_seq_len - len(prompt) + 1) for prompt in prompts]
        found = reference.probe(network, prompts, steps, progress)
        return [probes.save(directory, found)]


def _format_of(matrix: QuantizedMatrix | None, dtype: str) -> str | None:
    """The format that holds the matrix exactly."""
    if matrix is None or matrix.size is None:
        return None
    if matrix.size == 0 and matrix.zeros is None and matrix.bits == 8:
        return "fp8" if matrix.codes.is_floating_point() else "int8"
    exact = torch.equal(matrix.scales.to(getattr(torch, dtype)).float(), matrix.scales)
    if matrix.size and matrix.zeros is not None and matrix.bits == 4 and exact and matrix.codes.dtype == torch.uint8:
        return "int4" if matrix.size == GROUP else f"int4g{matrix.size}"
    return None


def write_rank(
    path: Path, rank: RankPlan, reader: WeightReader, advance: Callable[[int], Any] = lambda count: None
) -> dict[str, Any]:
    """Writes a rank's tensors as one safetensors file; returns its size in bytes and BLAKE3.

    The layout is known before the first weight is read, so blocks go straight to disk and memory stays bounded.
    A second thread hashes and writes while this one reads and merges.
    """
    header, digest = tensor_header(rank.tensors), blake3()
    blocks: queue.Queue[memoryview | bytes | None] = queue.Queue(maxsize=8)
    failure: list[BaseException] = []

    file = open(path, "wb", buffering=0)

    def drain() -> None:
        while (block := blocks.get()) is not None:
            if failure:
                continue  # keep emptying the queue, so that the producer does not block
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
        blocks.put(header)
        for block in rank.blocks(reader):
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
    return {"size": len(header) + rank.stored_bytes, "blake3": digest.hexdigest()}
