"""Chat templates: the same text as transformers, the sandbox, and every way a template or a message can be wrong."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.chat import ChatTemplates
from jaxinfer.tokenizer import Tokenizer, load_tokenizer

USER = [{"role": "user", "content": "Hi <b>"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{% endfor %}"""


def render(template: str | None, messages=USER, *, named: dict | None = None, prompt=True, tools=None, **kw) -> str:
    templates = ChatTemplates(named if named is not None else {"default": template} if template is not None else {})
    return templates.render(
        messages,
        add_generation_prompt=prompt,
        tools=tools,
        chat_template=kw.pop("chat_template", None),
        continue_final_message=kw.pop("continue_final_message", False),
        variables={"bos_token": "<s>", "eos_token": "</s>", **kw},
    )


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n{{ m.content }}{% endfor %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% if tools is not none %}{{ tools | tojson(indent=2) }}{% else %}no tools{% endif %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ '<think>' if enable_thinking is defined and enable_thinking }}{{ bos_token }}{{ documents is none }}",
    "{% for m in messages if m.content is string %}{{ m.content.split('>')[-1].lstrip() }}{% break %}{% endfor %}",
    "{{ add_generation_prompt }}{{ missing }}{{ messages[0].nothing is defined }}",
    "{{ strftime_now('%Y') | length }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_same_text_as_transformers(template, tools):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for messages, more in ((USER, {}), (TALK, {"enable_thinking": True})):
        names = {"bos_token": "<s>", "eos_token": "</s>", **more}
        theirs, _ = utils.render_jinja_template(
            [messages], chat_template=template, tools=tools, add_generation_prompt=True, **names
        )
        assert render(template, messages, tools=tools, **more) == theirs[0]


def test_mistral_template_and_its_refusal():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    theirs, _ = utils.render_jinja_template([TALK[1:]], chat_template=MISTRAL, bos_token="<s>", eos_token="</s>")
    assert render(MISTRAL, TALK[1:]) == theirs[0]
    assert render(MISTRAL) == "<s>[INST] Hi <b> [/INST]"
    with pytest.raises(ValueError, match="refuses these messages: Conversation roles must alternate"):
        render(MISTRAL, [*USER, *USER])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_the_sandbox_holds(attack):
    messages = [dict(USER[0])]
    with pytest.raises(ValueError, match="chat template"):
        assert render(attack, messages) == ""  # not even as an empty text
    assert messages == USER


def test_template_errors_are_named():
    with pytest.raises(ValueError, match="syntax error in line 2"):
        render("{{ messages }}\n{% if %}")
    with pytest.raises(ValueError, match=r"not there.*'x' is undefined"):
        render("{{ x.y }}")
    with pytest.raises(ValueError, match="failed with TypeError"):
        render("{{ messages[0].content + 1 }}")


def test_no_template_says_so_and_what_to_do():
    with pytest.raises(ValueError, match="no chat template; pass one with chat_template="):
        render(None)
    with pytest.raises(ValueError, match="no default chat template, only rag, tool_use; name one"):
        render(None, named={"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"})


def test_named_templates():
    named = {"default": "d{{ 1 }}", "tool_use": "t{{ 1 }}", "rag": "r{{ 1 }}"}
    assert render(None, named=named) == "d1"
    assert render(None, named=named, tools=TOOLS) == "t1"
    assert render(None, named=named, tools=TOOLS, chat_template="rag") == "r1"
    assert render(None, named=named, chat_template="own {{ 2 }}") == "own 2"
    assert render(None, named={"default": "d{{ 1 }}"}, tools=TOOLS) == "d1"


def test_a_requests_template_never_reads_a_file(tmp_path):
    (tmp_path / "secret").write_text("secret")
    for named in ({}, {"default": "{{ 1 }}"}):
        with pytest.raises(ValueError, match="give one of the model's"):
            render(None, named=named, chat_template=str(tmp_path / "secret"))


def test_text_parts_become_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "one\ntwo"
    with pytest.raises(ValueError, match=r"messages\[1\]\.content has a part of type 'image_url'; only 'text'"):
        render("{{ 1 }}", [*USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be an object with a role, got 'hi'"),
        ([{"content": "hi"}], r"messages\[0\] must be an object with a role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be text or a list of text parts, got 3"),
        ([{"role": "user", "content": ["x"]}], "part of type 'str'"),
    ],
)
def test_bad_messages_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        render("{{ 1 }}", messages)


def test_a_message_of_tool_calls_needs_no_content():
    assert render("{{ messages[0].tool_calls[0].id }}", [{"role": "assistant", "tool_calls": [{"id": "c"}]}]) == "c"


def test_continue_final_message():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
    messages = [*USER, {"role": "assistant", "content": " Sure, Hi"}]
    assert (
        render(template, messages, prompt=False, continue_final_message=True) == "[user]Hi <b></s>[assistant]Sure, Hi"
    )
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        render(template, messages, continue_final_message=True)
    with pytest.raises(ValueError, match="does not show"):
        render("{{ 1 }}", messages, prompt=False, continue_final_message=True)


# ------------------------------------------------------------------------------------------------- where they come from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2, "</s>": 3}, merges=[]))
    hf.add_special_tokens(["<s>", "</s>"])
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(folder: Path, config: dict, **kw) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return load_tokenizer(folder, **kw)


def test_a_chat_prompt_never_gets_a_second_bos(folder):
    tokenizer = load(folder, {"add_bos_token": True, "chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    assert tokenizer.encode("ab") == [2, 0, 1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [2, 0, 1]


def test_sources_of_templates(folder):
    listed = [{"name": "default", "template": "list{{ 1 }}"}, {"name": "tool_use", "template": "tools{{ 1 }}"}]
    tokenizer = load(folder, {"chat_template": listed})
    assert tokenizer.chat_template == "list{{ 1 }}" and tokenizer.render_chat(USER, tools=TOOLS) == "tools1"
    (folder / "chat_template.json").write_text('{"chat_template": "json{{ 1 }}"}')
    assert load(folder, {"chat_template": listed}).render_chat(USER) == "json1"
    (folder / "chat_template.jinja").write_text("jinja{{ 1 }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("rag{{ 1 }}")
    tokenizer = load(folder, {"chat_template": listed})
    assert tokenizer.render_chat(USER) == "jinja1" and tokenizer.render_chat(USER, chat_template="rag") == "rag1"
    (folder / "mine.txt").write_text("mine{{ bos_token }}")
    assert load(folder, {}, chat_template=str(folder / "mine.txt")).render_chat(USER) == "mine<s>"
    assert load(folder, {}, chat_template="{{ eos_token }}").render_chat(USER) == "</s>"
    with pytest.raises(ValueError, match=r"chat_template is 'nowhere\.jinja'; give an existing file or jinja2 text"):
        load(folder, {}, chat_template="nowhere.jinja")
    with pytest.raises(ValueError, match="syntax error"):
        load(folder, {}, chat_template="{% if %}")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    with pytest.raises(ValueError, match=r"chat_template in tokenizer_config\.json must be text or a list"):
        load(folder, {"chat_template": 3})
