"""The OpenAI API's answers: bodies, and the events of a stream.

A stream's event is written by hand round the two or three values that vary: at thousands of tokens a second there is no
time for a model object each.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from pydantic import BaseModel

from jaxinfer.openai_api import ChatCompletionRequest, CompletionRequest
from jaxinfer.request import CompletionOutput, Logprob, RequestOutput
from jaxinfer.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no -inf; vLLM's stand-in


# What the answers look like, for /openapi.json; they are built as plain dicts.
class CompletionTokens(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None


class CompletionResponse(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionTokens


class ChatMessage(BaseModel):
    role: str
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletionResponse(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionTokens


class Answer:
    """Turns the outputs of one HTTP request (a prompt or several, n samples each) into its answer.

    Args:
        body: the request. model: the name to answer with. tokenizer: None where the model has none.
        n: samples a prompt; choice i is sample i % n of prompt i // n.
    """

    def __init__(self, body: CompletionRequest | ChatCompletionRequest, model: str, tokenizer: Tokenizer | None, n: int):
        self.chat = isinstance(body, ChatCompletionRequest)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.model, self.tokenizer, self.n = int(time.time()), model, tokenizer, n
        self.echo = isinstance(body, CompletionRequest) and bool(body.echo)
        self.only_prompt = body.max_tokens == 0
        self.skip_special_tokens = body.skip_special_tokens is not False
        self.top_logprobs = (body.top_logprobs or 0) if isinstance(body, ChatCompletionRequest) else 0
        self.logprobs = bool(body.logprobs) if self.chat else body.logprobs is not None
        self.prompt_logprobs = body.prompt_logprobs is not None
        self.return_token_ids = bool(body.return_token_ids)
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.prompt_tokens: dict[int, int] = {}  # of each prompt, by its number
        self.cached_tokens: dict[int, int] = {}
        self.completion_tokens = 0
        self._offsets: dict[int, int] = {}  # of a streamed choice's text so far; a choice that is not here has not begun
        self._finished: set[int] = set()
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        self._head = f'data: {{"id":"{self.id}","object":"{kind}","created":{self.created},"model":{quote(model)},"choices":['
        self._tail = '],"usage":null}\n\n' if self.include_usage else "]}\n\n"

    # ---- whole

    def body(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer to a request that does not stream, from the finished outputs of its prompts."""
        choices = []
        for number, output in enumerate(outputs):
            self._count(number, output)
            for completion in output.outputs:
                choices.append(self._choice(number, output, completion))
        body: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
        }
        if self.return_token_ids:
            for choice, output in zip(choices, [o for o in outputs for _ in o.outputs], strict=True):
                choice["prompt_token_ids"] = output.prompt_token_ids
        return body

    def _choice(self, number: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        text, ids, logprobs = completion.text, completion.token_ids, completion.logprobs
        if self.only_prompt:
            text, ids, logprobs = "", [], []
        index = number * self.n + completion.index
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = self._prompt_text(output) + text if self.echo else text
        choice["logprobs"] = self._logprobs(index, output, ids, logprobs, first=True)
        choice["finish_reason"] = "length" if self.only_prompt else completion.finish_reason
        choice["stop_reason"] = None if self.only_prompt else completion.stop_reason
        if self.return_token_ids:
            choice["token_ids"] = ids
        if self.prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_logprobs(output)
        return choice

    def usage(self) -> dict[str, Any]:
        prompt = sum(self.prompt_tokens.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }

    def _count(self, number: int, output: RequestOutput) -> None:
        self.prompt_tokens[number] = len(output.prompt_token_ids)
        self.cached_tokens[number] = output.num_cached_tokens
        if not self.only_prompt:
            for completion in output.outputs:
                self.completion_tokens += len(completion.token_ids)

    # ---- streamed

    def events(self, number: int, output: RequestOutput) -> bytes:
        """The events of a DELTA output of the number-th prompt; nothing where it adds nothing."""
        self._count(number, output)
        parts: list[str] = []
        for completion in output.outputs:
            index = number * self.n + completion.index
            finish = completion.finish_reason
            if index in self._finished or not (completion.token_ids or finish):
                continue
            first = index not in self._offsets
            if first:
                self._offsets[index] = 0
                if self.chat:
                    start = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
                    parts += (self._head, f'{{"index":{index},{start}', self._tail)
            text = completion.text
            if first and self.echo:
                text = self._prompt_text(output) + text
            if self.chat:
                shown = f'"delta":{{"content":{quote(text)}}}' if text or not finish else '"delta":{}'
            else:
                shown = f'"text":{quote(text)}'
            logprobs = "null"
            if self.logprobs:
                logprobs = json.dumps(self._logprobs(index, output, completion.token_ids, completion.logprobs, first))
            parts += (self._head, f'{{"index":{index},{shown},"logprobs":{logprobs}')
            if self.return_token_ids:
                parts.append(f',"token_ids":{json.dumps(completion.token_ids)}')
                if first:
                    parts.append(f',"prompt_token_ids":{json.dumps(output.prompt_token_ids)}')
            if finish is None:
                parts.append(',"finish_reason":null}')
            else:
                self._finished.add(index)
                parts.append(f',"finish_reason":"{finish}","stop_reason":{json.dumps(completion.stop_reason)}}}')
            parts.append(self._tail)
        return "".join(parts).encode()

    def last_events(self) -> bytes:
        """What ends a stream that went well."""
        if not self.include_usage:
            return DONE
        return f'{self._head}],"usage":{json.dumps(self.usage())}}}\n\n'.encode() + DONE

    # ---- logprobs

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None or self.tokenizer is None:
            return output.prompt or ""
        return self.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=self.skip_special_tokens)

    def _logprobs(
        self,
        index: int,
        output: RequestOutput,
        ids: Sequence[int],
        logprobs: Sequence[Mapping[int, Logprob]] | None,
        first: bool,
    ) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        positions: list[tuple[int, Mapping[int, Logprob] | None]] = list(zip(ids, logprobs or [], strict=True))
        if self.chat:
            return {"content": [self._chat_position(token, position or {}) for token, position in positions]}
        if first and self.echo:
            positions = [*zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=True), *positions]
        result: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        offset = self._offsets.get(index, 0)
        for token, position in positions:
            text = self._token_text(token)
            result["text_offset"].append(offset)
            result["tokens"].append(text)
            result["token_logprobs"].append(None if position is None else finite(position[token].logprob))
            tops = None if position is None else {self._token_text(i): finite(x.logprob) for i, x in position.items()}
            result["top_logprobs"].append(tops)
            offset += len(text)
        self._offsets[index] = offset
        return result

    def _chat_position(self, token: int, position: Mapping[int, Logprob]) -> dict[str, Any]:
        likeliest = sorted(position.items(), key=lambda item: item[1].rank or math.inf)[: self.top_logprobs]
        return self._chat_token(token, position[token]) | {"top_logprobs": [self._chat_token(*item) for item in likeliest]}

    def _chat_token(self, token: int, logprob: Logprob) -> dict[str, Any]:
        data = None if self.tokenizer is None else list(self.tokenizer.id_to_bytes(token))
        return {"token": self._token_text(token), "logprob": finite(logprob.logprob), "bytes": data}

    def _token_text(self, token: int) -> str:
        return f"token_id:{token}" if self.tokenizer is None else self.tokenizer.id_to_piece_text(token)

    def _prompt_logprobs(self, output: RequestOutput) -> list[dict[int, dict[str, Any]] | None]:
        return [
            None
            if position is None
            else {
                token: {"logprob": finite(x.logprob), "rank": x.rank, "decoded_token": x.decoded_token}
                for token, x in position.items()
            }
            for position in output.prompt_logprobs or []
        ]


def finite(logprob: float) -> float:
    """A log-probability as JSON can say it."""
    return max(logprob, _LEAST_LOGPROB) if logprob == logprob else _LEAST_LOGPROB
