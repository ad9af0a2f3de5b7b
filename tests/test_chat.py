"""Chat templates against transformers' own rendering."""

import json

import pytest
from support.made_tokenizers import byte_level_json, save_json
from support.needs import need
from tokenizers import AddedToken
from transformers import AutoTokenizer

from cqil_trt import Conversation
from cqil_trt.errors import UserError
from cqil_trt.tokenizer import Tokenizer

TEMPLATES = {
    "generation blocks": "{% for m in messages %}<|{{m.role}}|>{% if m.role == 'assistant' %}{% generation %}"
    "{% set seen = 1 %}{{ m.content }}{% endgeneration %}{{ seen is defined }}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}",
    "tools": "{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
    "{{ messages }}",
    "documents": "{% if documents is none %}none{% else %}{{ documents[0].title }}{% endif %}",
    "tojson": "{{ messages[0] | tojson }}{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}"
    "{{ messages[0] | tojson(separators=(',', ':')) }}{{ messages[0] | tojson(indent=4) }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ unk_token }}|{{ image_token }}|"
    "{{ pad_token }}",
    "time": "{{ strftime_now('%Y-%m') }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% break %}{% endfor %}",
    "namespaces": "{% set ns = namespace(f=false) %}{% for m in messages[::-1] %}{% set ns.f = m.role %}{% endfor %}"
    "{{ ns.f }}",
    "generation prompt": "{{ messages[-1].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "undefined": "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}{{ nothing }}y",
    "tool calls": "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% endif %}{{ m.content is defined }}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "white space": "{% for m in messages %}\n    {%- if true %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
}
CONVERSATIONS = {
    "one message": Conversation(messages=[{"role": "user", "content": " héllo 安 <b> 'x'"}]),
    "whole": Conversation(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?", "name": None},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "ask the tool",
                "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
            },
            {"role": "tool", "content": "rain"},
        ],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
        documents=[{"title": "Almanac", "text": "It rains."}],
    ),
    "variables": Conversation(messages=[{"role": "user", "content": "a"}], variables={"enable_thinking": False}),
}
NAMES = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    "sep_token": "<|sep|>",
    "extra_special_tokens": {"image_token": "<|img|>"},
}


def save(directory, **config):
    backend = byte_level_json()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|sep|>", "<|img|>")])
    save_json(backend, directory, **NAMES, **config)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def expected(directory, conversation):
    return AutoTokenizer.from_pretrained(directory).apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        documents=conversation.documents,
        add_generation_prompt=True,
        return_dict=False,
        **conversation.variables,
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_templates_render_as_in_transformers(template, conversation, tmp_path):
    if conversation == "whole":
        need("transformers>=5.21")  # which leaves out fields that are null, and fills in other names for the reasoning
    save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[template])
    found = Tokenizer(tmp_path).chat(CONVERSATIONS[conversation])
    assert found == expected(tmp_path, CONVERSATIONS[conversation])


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("form", ["text", "list", "files", "file over text"])
def test_where_a_template_is(form, tools, tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    save(tmp_path, **({"chat_template": named if form == "list" else "text"} if form != "files" else {}))
    if "file" in form:
        (tmp_path / "chat_template.jinja").write_text("file")
    if form == "files":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    conversation = CONVERSATIONS["whole" if tools else "one message"]
    assert Tokenizer(tmp_path).chat(conversation) == expected(tmp_path, conversation)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system') }}", "the chat template says: no system"),
        ("{% if %}", "is malformed"),
        ("{% break %}", "is malformed"),
        ("{{ f(a=1, a=2) }}", "is malformed"),
        ("(" * 3000 + "{{" + "(" * 3000, "is malformed"),
        ("{{ messages[9].content }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "failed|malformed"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_fail_say_so(template, message, tmp_path):
    save(tmp_path)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        Tokenizer(tmp_path).chat("hello")


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "expected a list of messages"),
        ({"message": []}, "'message' is not one of"),
        (["hello"], "message 1 is not an object with a role"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2"),
        ({"messages": [{"role": "user"}], "tools": {}}, "tools must be a list"),
        ({"messages": [{"role": "user"}], "chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"messages": [{"role": "user"}], "chat_template_kwargs": {"continue_final_message": True}}, "is not taken"),
    ],
)
def test_files_of_messages_that_are_wrong(value, message):
    with pytest.raises(UserError, match=message):
        Conversation.of_json(value, "--messages x.json")
