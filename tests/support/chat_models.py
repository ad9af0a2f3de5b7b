"""A small random model to talk to: a byte-level tokenizer, ChatML, and tool calls as Hermes and Qwen write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from support.checkpoints import make_model
from support.made_tokenizers import CORPUS, save_json

# The parts of Qwen2.5's template that show what a server makes of messages and tools.
TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\nAnswer within <tool_call></tool_call>: {\\"name\\": <name>, \\"arguments\\": <arguments>}<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.tool_calls %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{%- if shout %}{{- 'LOUD ' }}{%- endif %}
"""
# A template without tools.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def chat_tokenizer(special_calls: bool = False) -> Tokenizer:
    """As Qwen ships it: <tool_call> is a token of its own but, unless `special_calls`, no control token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    backend.add_tokens([AddedToken(text, special=special_calls) for text in ("<tool_call>", "</tool_call>")])
    return backend


def make_chat_model(
    directory: Path, template: str | None = TEMPLATE, end: str | None = "<|im_end|>", **changes: Any
) -> Path:
    """A random checkpoint with this tokenizer. Without a template it cannot chat; without an end it never stops."""
    backend = chat_tokenizer()
    values = {"vocab_size": backend.get_vocab_size(), "max_position_embeddings": 1024, **changes}
    make_model(directory, eos_token_id=None if end is None else backend.token_to_id(end), **values)
    config = {"chat_template": template, "eos_token": end}
    return save_json(backend, directory, **{name: value for name, value in config.items() if value is not None})
