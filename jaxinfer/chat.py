"""Chat templates: a model's own jinja2 program, in a sandbox, with the environment Hugging Face's templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_GGUF_KEY = "tokenizer.chat_template"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own tojson escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """ValueError with the line of a syntax error."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error


@dataclass(frozen=True)
class ChatTemplates:
    """A model's templates by name; most have only "default", some another one for tools, "tool_use"."""

    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def default(self) -> str | None:
        return self.named.get("default")

    @staticmethod
    def from_directory(folder: Path, config: Mapping[str, Any], override: str | None) -> ChatTemplates:
        """chat_template.jinja and additional_chat_templates/, else chat_template.json, else tokenizer_config.json's."""
        if override is not None:
            return ChatTemplates({"default": _text_or_file(override)})
        named = _named(config.get("chat_template"), "tokenizer_config.json")
        if (legacy := folder / "chat_template.json").is_file():
            named |= _named(json.loads(legacy.read_text("utf-8")).get("chat_template"), "chat_template.json")
        if (own := folder / "chat_template.jinja").is_file():
            named["default"] = own.read_text("utf-8")
        for extra in sorted(folder.glob("additional_chat_templates/*.jinja")):
            named[extra.stem] = extra.read_text("utf-8")
        return ChatTemplates(named)

    @staticmethod
    def from_gguf(metadata: Mapping[str, Any], override: str | None) -> ChatTemplates:
        """tokenizer.chat_template, and tokenizer.chat_template.NAME for the others."""
        if override is not None:
            return ChatTemplates({"default": _text_or_file(override)})
        named = _named(metadata.get(_GGUF_KEY), _GGUF_KEY)
        for key, text in metadata.items():
            if key.startswith(_GGUF_KEY + "."):
                named[key.removeprefix(_GGUF_KEY + ".")] = text
        return ChatTemplates(named)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template: str | None,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text.

        messages: {"role": …, "content": text or a list of {"type": "text", "text": …}}, and all the template reads.
        chat_template: one of the model's templates by name, or a template's text, instead of the default.
        continue_final_message: the text ends in the last message's content, for the model to go on with.
        variables: further names the template may use (bos_token, enable_thinking, …).
        ValueError for what the template or this function refuses, saying why.
        """
        if not messages:
            raise ValueError("messages is empty; give at least one {'role': ..., 'content': ...}")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=False: only one can end the prompt")
        template = compile_template(self._choose(chat_template, bool(tools)))
        plain = [_plain_message(i, message) for i, message in enumerate(messages)]
        try:
            text = template.render(
                {
                    "documents": None,
                    **variables,
                    "messages": plain,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.UndefinedError as error:
            raise ValueError(f"the chat template uses something that is not there: {error}") from error
        except jinja2.TemplateError as error:  # raise_exception, and what the sandbox forbids
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program of the model's authors: anything can come out of it
            raise ValueError(f"the chat template failed with {type(error).__name__}: {error}") from error
        return _cut_after_last(text, plain[-1]) if continue_final_message else text

    def _choose(self, wanted: str | None, with_tools: bool) -> str:
        if wanted is not None:
            if wanted in self.named or _is_jinja(wanted):
                return self.named.get(wanted, wanted)
            # never a file's path: this one comes from a request
            known = ", ".join(sorted(self.named)) or "it has none"
            raise ValueError(f"chat_template is {wanted!r}; give one of the model's ({known}) or jinja2 text")
        if with_tools and "tool_use" in self.named:
            return self.named["tool_use"]
        if "default" in self.named:
            return self.named["default"]
        if self.named:
            raise ValueError(
                f"the model has no default chat template, only {', '.join(sorted(self.named))}; name one with chat_template="
            )
        raise ValueError(
            "the model has no chat template; pass one with chat_template= (jinja2 text, or the path of a file), "
            "or give a plain prompt instead of messages"
        )


def _named(value: Any, where: str) -> dict[str, str]:
    """A template's text, or a list of {"name", "template"}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in value):
        return {t["name"]: t["template"] for t in value}
    raise ValueError(f"chat_template in {where} must be text or a list of {{name, template}}, not {value!r:.80}")


def _is_jinja(value: str) -> bool:
    return "{{" in value or "{%" in value or "\n" in value


def _text_or_file(value: str) -> str:
    """The template itself, checked; a value without jinja2 marks is a file's path."""
    if not _is_jinja(value):
        if not Path(value).is_file():
            raise ValueError(f"chat_template is {value!r}; give an existing file or jinja2 text")
        value = Path(value).read_text("utf-8")
    compile_template(value)
    return value


def _plain_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is one string: text parts are joined by line ends, as vLLM does for such templates."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{index}] must be an object with a role, got {message!r:.80}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"messages[{index}] has no content")
    if isinstance(content, str) or content is None:
        return dict(message)
    if not isinstance(content, Sequence):
        raise ValueError(f"messages[{index}].content must be text or a list of text parts, got {content!r:.80}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"messages[{index}].content has a part of type {kind!r}; only 'text' parts are supported")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _cut_after_last(text: str, message: Mapping[str, Any]) -> str:
    content = (message.get("content") or "").strip()
    at = text.rfind(content)
    if not content or at < 0:
        raise ValueError("continue_final_message: the template does not show the last message's content as it is")
    return text[: at + len(content)]
