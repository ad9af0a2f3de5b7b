#!/usr/bin/env python
"""Trains the LoRA adapter that recovers what CQIL loses, by distillation from the unchanged model.

    python scripts/finetune.py --model path/to/model --p 2 --text texts/ --output adapters/mine
    python scripts/finetune.py --model path/to/model --p 2 --self-generated 4000000      # without any text
    torchrun --nproc-per-node 4 -- scripts/finetune.py …                                 # on four GPUs

The adapter is for `build.py --lora` and contains the CQIL configuration.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
from plots import check_plot, pyplot

from cqil_trt import formats
from cqil_trt.builder import choose_cqil, read_config
from cqil_trt.commands import (
    RankParser,
    add_cqil_flags,
    check_at_least,
    check_texts,
    chosen_model,
    cqil_flags,
)
from cqil_trt.config import ADAPTER_FILE, CqilConfig
from cqil_trt.errors import UserError
from cqil_trt.job import command
from cqil_trt.json_fields import read_json
from cqil_trt.model import ModelConfig
from cqil_trt.table import table
from cqil_trt.weights import WeightReader, open_checkpoint

CHECKPOINTS = "checkpoints"
SETTINGS = "settings.json"
SAMPLED, CONVERSATIONS = "self-generated.npy", "self-generated-chat.npy"
REPORT = "training.json"
# Options that a resumed run may change: none of them affects what is trained.
FREE = {
    *("output", "resume", "force", "save_steps", "eval_text", "eval_tokens", "plot", "sampling_batch", "compile"),
    "config",  # its content counts
}
# Options that affect the sampled text. A run without a checkpoint may change all others and keep that text.
SAMPLING = {"model", "self_generated", "self_generated_chat", "top_p", "sequence_length", "seed"}
# Bytes of activations kept for the backward pass, per token, hidden element and layer: measured with bfloat16 matrix
# products and LoRA's float32 parameters.
ACTIVATION_BYTES = 55
# Whether this is torchrun's first process: only that one prints and writes.
FIRST = int(os.environ.get("RANK", "0")) == 0


def parser() -> RankParser:
    p = RankParser(prog="finetune.py", description=__doc__.split("\n")[0])
    p.speaks = FIRST
    p.add_argument(
        "--model", metavar="PATH", help="Hugging Face directory, GGUF file, or org/name[@revision] (default: the demo)"
    )
    add_cqil_flags(p)
    p.add_argument("--output", metavar="DIR", type=Path, help="adapter directory to create (default adapters/NAME)")
    p.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    p.add_argument("--force", action="store_true", help="start over if --output exists")
    text = p.add_argument_group("what is trained on")
    text.add_argument(
        "--text", metavar="PATH", type=Path, nargs="+", help="text files, .jsonl, directories; .npy of tokens"
    )
    text.add_argument("--column", default="text", help="field of .jsonl and datasets that holds the text")
    text.add_argument("--self-generated", metavar="N", type=int, help="N tokens sampled from the unchanged model")
    text.add_argument(
        "--self-generated-chat",
        metavar="N",
        type=int,
        help="N tokens of conversations sampled from it, each beginning with its chat template up to the user's text",
    )
    text.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="sample from the most likely tokens that together reach P (default 0.95)",
    )
    text.add_argument(
        "--sampling-batch", metavar="N", type=int, help="texts sampled at a time (default: as memory allows)"
    )
    text.add_argument("--eval-text", metavar="PATH", type=Path, nargs="+", help="held-out text for the final table")
    text.add_argument("--eval-tokens", metavar="N", type=int, default=65536, help="at most N tokens of --eval-text")
    train = p.add_argument_group("training")
    train.add_argument("--sequence-length", metavar="N", type=int, default=1024)
    train.add_argument("--batch-size", metavar="N", type=int, default=16, help="sequences per batch on each GPU")
    train.add_argument("--accumulate", metavar="N", type=int, default=1, help="batches per optimizer step")
    train.add_argument("--steps", metavar="N", type=int, help="optimizer steps (default: one pass over the text)")
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--lora-rank", metavar="R", type=int, default=32)
    train.add_argument("--lora-alpha", metavar="A", type=float, default=32.0)
    train.add_argument(
        "--lora-layers",
        choices=("all", "concurrent"),
        default="all",
        help="which layers are adapted; the concurrent ones and those with a dropped join alone make a smaller adapter",
    )
    train.add_argument(
        "--adapter-dtype", choices=("float32", "bfloat16"), default="float32", help="type of the adapter's file"
    )
    train.add_argument("--lora-dropout", metavar="P", type=float, default=0.0)
    train.add_argument("--precision", choices=("bf16", "fp32"), help="default bf16 on GPUs, fp32 on CPUs")
    train.add_argument(
        "--gradient-checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="saves memory for a third more time (auto: if the activations would not fit on the GPU)",
    )
    train.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="use torch.compile; its first steps take half a minute (auto: on GPUs where it works)",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--save-steps", metavar="N", type=int, default=200, help="checkpoint every N steps")
    p.add_argument("--plot", metavar="F.png", type=Path, help="loss curve (default: loss.png next to the adapter)")
    return p


def main() -> None:
    with command():
        if "RANK" not in os.environ:
            # Trainer would use all visible GPUs from one process, with threads; several GPUs need torchrun.
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        if not FIRST:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        train(parser().parse_args())


def train(options: argparse.Namespace) -> None:
    check(options)
    found = chosen_model(options.model)
    options.model = found.name
    if (options.self_generated or options.self_generated_chat) and options.top_p is None:
        options.top_p = 0.95
    model, reader = open_checkpoint(found.path)
    notes: list[str] = []
    config = read_config(options.config, model, options.preset)
    cqil = choose_cqil(model, cqil_flags(options), notes, config=config)
    stored = {} if config is None else dict.fromkeys((config.weights, config.head))
    if quantized := [name for name in stored if name != formats.DENSE]:
        notes.append(
            f"{options.config}: {', '.join(quantized)} is for build.py; the adapter is trained on the model as it is"
        )
    if not cqil.changed_layers:
        raise UserError("no layers run concurrently: there is nothing to train (give --p above 1, --start and --end)")
    if options.sequence_length > model.max_position:
        raise UserError(f"--sequence-length {options.sequence_length}: the model has {model.max_position} positions")
    print(f"{found}, {model.num_layers} layers: {cqil.summary}")
    for note in notes:
        print(f"note: {note}")
    if options.output is None:
        options.output = Path("adapters") / f"{found.stem}-{cqil.name}"
    settings = check_output(options, cqil, found.pinned)
    report = run(options, found.path, model, reader, cqil, settings)
    if not FIRST:
        return
    (options.output / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    plot(
        report["loss"],
        options.plot or options.output / "loss.png",
        f"{found.stem}, {options.output.name}",
    )
    shutil.rmtree(options.output / CHECKPOINTS, ignore_errors=True)
    print(f"\ntrained {options.output}")
    print(f"build it: python builders/build.py --model {options.model} --lora {options.output}")


def check(options: argparse.Namespace) -> None:
    pyplot()  # a missing package should be reported before hours of training
    counts = (
        "self_generated",
        "self_generated_chat",
        "sampling_batch",
        "eval_tokens",
        "batch_size",
        "accumulate",
        "steps",
        "lora_rank",
    )
    check_at_least(options, 1, *counts, "save_steps")
    check_at_least(options, 2, "sequence_length")
    if not 0 <= options.lora_dropout < 1:
        raise UserError(f"--lora-dropout must be from 0 to below 1, found {options.lora_dropout:g}")
    if not (options.self_generated or options.self_generated_chat) and options.top_p is not None:
        raise UserError("--top-p applies to the text of --self-generated, which is not given")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, found {options.top_p:g}")
    for name in ("learning_rate", "lora_alpha"):
        if not 0 < getattr(options, name) < math.inf:  # NaN is not
            raise UserError(f"--{name.replace('_', '-')} must be above 0, found {getattr(options, name):g}")
    check_plot(options.plot)
    check_texts(options.text, "--text")
    check_texts(options.eval_text, "--eval-text")
    if not (options.text or options.self_generated or options.self_generated_chat):
        raise UserError("what to train on? Give --text PATH …, or --self-generated N to sample text from the model")
    if options.resume and options.force:
        raise UserError("--resume continues what --force removes: give one of them")


def check_output(options: argparse.Namespace, cqil: CqilConfig, model: str) -> dict[str, Any]:
    """Checks that training of `model` can begin, or continue, in the output directory; returns what determines it."""
    output, path = options.output, options.output / CHECKPOINTS / SETTINGS
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings = json.loads(json.dumps({**settings, "model": model, "cqil": cqil.to_dict()}, default=str))
    if options.resume:
        if not path.exists():
            raise UserError(f"--resume: no unfinished training in {output}")
        begun = read_json(path)
        # As it was written before there was such a thing.
        begun["cqil"] = {"ranks_per_layer": 1, **begun.get("cqil", {})}
        for name, value in settings.items():
            changed = name in begun and begun[name] != value
            if changed and (name in SAMPLING or any(path.parent.glob("checkpoint-*"))):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"--resume: {output} was begun with {flag} {begun[name]}, found {value}")
    elif output.exists():
        if not options.force:
            unfinished = "; --resume continues it" if path.exists() else ""
            raise UserError(f"--output {output}: exists already (--force starts over{unfinished})")
        if not path.exists() and not (output / "adapter_config.json").exists():
            raise UserError(f"--output {output}: --force replaces an adapter, and this is none")
    return settings


def begin_output(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    if options.force and options.output.exists():
        shutil.rmtree(options.output)
    path = options.output / CHECKPOINTS / SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def run(
    options: argparse.Namespace,
    path: Path,
    model: ModelConfig,
    reader: WeightReader,
    cqil: CqilConfig,
    begun: dict[str, Any],
) -> dict[str, Any]:
    """Trains and saves the adapter; returns the report. `begun`: what determines the training, to be stored."""
    import torch
    import transformers
    from peft.helpers import disable_input_dtype_casting
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from cqil_trt import reference
    from cqil_trt.quality import open_tokenizer, text_blocks
    from cqil_trt.quality.distillation import Blocks, DistillationTrainer, Student, largest_rise, last_checkpoint

    on_gpu = torch.cuda.is_available()
    bfloat16 = (options.precision or ("bf16" if on_gpu else "fp32")) == "bf16"
    recompute = checkpoint_gradients(options, model, reader, cqil)
    if recompute:
        print("gradient checkpointing: layers are recomputed for the backward pass")
    # transformers renamed the option between releases of version 5.
    fields = transformers.TrainingArguments.__dataclass_fields__
    recomputing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    settings = transformers.TrainingArguments(
        output_dir=str(options.output / CHECKPOINTS),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        **({recomputing: True} if recompute else {}),
        ddp_find_unused_parameters=False,
        max_steps=options.steps or -1,
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        seed=options.seed,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=[],
        report_to=[],
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        ddp_backend="gloo" if not on_gpu and "RANK" in os.environ else None,
        ddp_timeout=24 * 3600,
        disable_tqdm=not sys.stderr.isatty(),
    )
    if on_gpu:
        torch.cuda.set_device(settings.device)
    network = reference.from_reader(model, reader, torch.bfloat16 if bfloat16 else torch.float32, pieces=False)
    tokenizer = open_tokenizer(path)
    length = options.sequence_length
    parts = []
    if options.text:
        parts.append(text_blocks(options.text, tokenizer, model, length, None, options.column))
    held_out = options.eval_text and text_blocks(
        options.eval_text, tokenizer, model, length, options.eval_tokens, options.column
    )
    sampled = sampled_texts(options, tokenizer)
    count = sum(map(len, parts)) + sum(-(-tokens // length) for _, tokens, _ in sampled)
    step_blocks = options.batch_size * options.accumulate * settings.world_size
    if count < step_blocks:
        raise UserError(
            f"{count} blocks of {length} tokens are fewer than one step's {step_blocks}: give more text, or a smaller "
            "--batch-size"
        )
    compiled = choose_compile(options, on_gpu)
    if FIRST:
        begin_output(options, begun)
    for name, tokens, beginnings in sampled:
        with settings.main_process_first(desc="sampling text"):
            parts.append(generated(options, model, network, options.output / name, tokens, beginnings))
    data = np.concatenate(parts)

    transformers.set_seed(options.seed)
    student = Student(
        network,
        cqil,
        options.lora_rank,
        options.lora_alpha,
        options.lora_dropout,
        concurrent_only=options.lora_layers == "concurrent",
    )
    if compiled:
        student.compile()
    if recompute:
        student.model.enable_input_require_grads()
    trainer = DistillationTrainer(student, bfloat16, args=settings, train_dataset=Blocks(data))
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(reporter(length * step_blocks))
    start = last_checkpoint(options.output / CHECKPOINTS) if options.resume else None
    print(
        f"{data.size} tokens in blocks of {length}, {step_blocks} blocks a step" + (f", from {start}" if start else "")
    )
    began = time.perf_counter()
    try:
        with disable_input_dtype_casting(student.model, bfloat16):  # autocast does it, only for matrix products
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is full: take a smaller --batch-size (with --accumulate), or --gradient-checkpointing on"
        ) from None
    seconds = time.perf_counter() - began
    if not all(weight.isfinite().all() for weight in student.model.parameters() if weight.requires_grad):
        raise diverged(trainer.state.global_step, options.learning_rate)
    if FIRST:
        save(student, options.output, getattr(torch, options.adapter_dtype))

    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "model": options.model,
        "cqil": cqil.to_dict(),
        "tokens": data.size,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "loss": losses,
    }
    if (rise := largest_rise(losses)) is not None:
        (best, low), (worst, high) = rise
        print(
            f"note: KL rose from {low:.3f} at step {best} to {high:.3f} at step {worst}: the training diverged for "
            "a while; a lower --learning-rate may give a better result"
        )
    if held_out is not None and FIRST:
        with torch.compiler.set_stance("force_eager"):  # not worth compiling for
            report["held_out"] = evaluate(student, held_out)
    return report


def diverged(step: int, learning_rate: float) -> UserError:
    return UserError(
        f"the training diverged to NaN or infinity at step {step}: start over with a --learning-rate below "
        f"{learning_rate:g} and --force"
    )


def choose_compile(options: argparse.Namespace, on_gpu: bool) -> bool:
    """Whether to compile: as requested, or on a GPU if torch.compile finds the compilers that it needs."""
    import torch

    if options.compile == "off" or (options.compile == "auto" and not on_gpu):
        return False
    try:
        torch.compile(torch.nn.functional.silu)(torch.ones(64, device="cuda" if on_gpu else "cpu"))
    except Exception as error:  # compilers, and what they run, fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if options.compile == "on":
            raise UserError(f"--compile on: torch.compile does not work here ({reason})") from None
        print(f"note: not compiled, as torch.compile does not work here ({reason})")
        return False
    return True


def checkpoint_gradients(
    options: argparse.Namespace, model: ModelConfig, reader: WeightReader, cqil: CqilConfig
) -> bool:
    """Whether to keep fewer activations: as requested, or if they would leave no room on the GPU for logits."""
    import torch

    if options.gradient_checkpointing != "auto" or not torch.cuda.is_available():
        return options.gradient_checkpointing == "on"
    weights = sum(2 * torch.Size(shape).numel() for shape in reader.shapes().values())
    # A layer with a dropped join computes for every rank.
    layers = model.num_layers + sum(cqil.sharing(layer) - 1 for layer in cqil.drop_attention_join)
    needed = ACTIVATION_BYTES * options.batch_size * options.sequence_length * model.hidden_size * layers
    return needed > 0.5 * (torch.cuda.mem_get_info()[0] - weights)


def sampling_batch(model: ModelConfig, length: int, network: Any) -> int:
    """The number of texts whose keys and values fit in memory."""
    import torch

    room = torch.cuda.mem_get_info()[0] // 3 if torch.cuda.is_available() else 1 << 30
    kept = 2 * model.num_layers * model.num_kv_heads * model.head_dim * network.dtype.itemsize * length
    return max(1, min(1024, room // kept))


def sampled_texts(options: argparse.Namespace, tokenizer: Any) -> list[tuple[str, int, np.ndarray]]:
    """The texts to sample: the file each one is stored in, its number of tokens, and its blocks' beginnings [N, K]."""
    found = []
    if options.self_generated:
        found.append((SAMPLED, options.self_generated, np.array(tokenizer.plain_tokens())[:, None]))
    if options.self_generated_chat:
        found.append((CONVERSATIONS, options.self_generated_chat, np.array([tokenizer.chat_beginning()])))
        if found[-1][2].shape[1] >= options.sequence_length:
            raise UserError(f"--sequence-length {options.sequence_length}: the chat template begins with more tokens")
    return found


def generated(
    options: argparse.Namespace, model: ModelConfig, network: Any, path: Path, tokens: int, beginnings: np.ndarray
) -> np.ndarray:
    """Blocks sampled from the model, int32; stored at `path`, for a resumed run and for `--text`."""
    from cqil_trt.quality.distillation import self_generated

    if not path.exists():
        length, progress = options.sequence_length, sys.stderr.isatty()
        count, batch = -(-tokens // length), options.sampling_batch
        batch = batch or sampling_batch(model, length, network)
        blocks = self_generated(network, count, length, beginnings, batch, options.seed, options.top_p, progress)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, blocks.astype(np.min_scalar_type(model.vocab_size - 1)))
        partial.rename(path)
    return np.load(path).astype(np.int32)


def reporter(tokens_per_step: int) -> Any:
    """Trainer's progress bar, with loss and speed; without a terminal, lines instead."""
    from transformers.trainer_callback import ProgressCallback, TrainerCallback

    class Reporter(ProgressCallback if sys.stderr.isatty() else TrainerCallback):
        _last: tuple[int, float] | None = None

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step >= state.max_steps:
                control.should_log = True
                # `save` follows; from a checkpoint of the last step, Trainer would resume with one step more.
                control.should_save = False

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and not math.isfinite(logs.get("loss", 0)):
                raise diverged(state.global_step, args.learning_rate)
            if not state.is_world_process_zero or not logs or "loss" not in logs:
                return
            now, speed = time.perf_counter(), ""
            if self._last is not None and state.global_step > self._last[0]:
                step, then = self._last
                speed = f", {(state.global_step - step) * tokens_per_step / (now - then):.0f} tokens/s"
            self._last = state.global_step, now
            text = f"step {state.global_step}/{state.max_steps}: KL {logs['loss']:.4f}{speed}"
            if args.disable_tqdm:
                print(text, flush=True)
            else:
                self.training_bar.set_description(text)

    return Reporter()


def save(student: Any, output: Path, dtype: Any) -> None:
    """Saves the adapter. Files appear complete, and last the configuration that makes them an adapter."""
    new = output / CHECKPOINTS / "adapter"
    student.save(new, dtype)
    names = [path.name for path in new.iterdir() if path.suffix in (".json", ".safetensors")]
    for name in sorted(names, key=lambda name: (name == "adapter_config.json", name != ADAPTER_FILE)):
        (new / name).replace(output / name)


def evaluate(student: Any, blocks: np.ndarray) -> dict[str, Any]:
    """Perplexity on held-out text: the unchanged model, CQIL without and with the adapter."""
    from cqil_trt.quality.perplexity import CELLS, WON_BACK, score_reference, won_back

    network = student.model.get_base_model().eval()
    progress = "scoring" if sys.stderr.isatty() else None
    with student.teaching():
        base = score_reference(network, blocks, progress)
    with student.model.disable_adapter():
        without = score_reference(network, blocks, progress)
    trained = score_reference(network, blocks, progress)
    columns = {"unchanged": base, "CQIL": without, "CQIL + adapter": trained}
    share = won_back(base, without, trained)
    print(f"\nheld-out text, {blocks.size} tokens")
    print(table(("model", *CELLS), [(name, *scores.cells(base)) for name, scores in columns.items()]))
    print(WON_BACK.format(share))
    models = {name: scores.to_dict(base) for name, scores in columns.items()}
    return {"tokens": blocks.size, "models": models, "won_back": share}


def plot(losses: list[tuple[int, float]], path: Path, title: str) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4))
    axes.plot(*zip(*losses))
    axes.set(xlabel="step", ylabel="KL per token, nats", title=title, ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
