"""What requests have to show: their text as it grows, outputs of a prompt's samples, and whose tokens wait for others."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxinfer.request import CompletionOutput, Request, RequestMetrics, RequestOutput, RequestOutputKind, SamplingParams
from jaxinfer.structured_outputs import Grammar
from jaxinfer.tokenizer import Detokenizer

# A step is late where the device is done with it before the host comes to read it, the next one being dispatched by then: so
# the device has waited, or nearly. With hundreds of streams, making and sending outputs is most of what the host does. So
# where many requests get tokens of a step that only decodes, each LATE_STEPS late ones make every stream's tokens wait for one
# more, up to so many at a time, in turns, and ON_TIME_STEPS that are not late undo a late one. A hiccup holds nobody's tokens.
MANY_OUTPUTS = 32
MOST_HELD_TOKENS = 4
LATE_STEPS = 5
ON_TIME_STEPS = 8


@dataclass(eq=False)
class Text:
    """A request's text as it grows. `text` is all of it; what a stop string could still cut off is not yet shown.

    shown_text, shown_tokens: how much of it earlier outputs gave (DELTA). cumulative_logprob: of the first `summed` tokens.
    """

    detokenizer: Detokenizer | None
    stop: list[str]
    include_stop: bool
    text: str = ""
    shown_text: int = 0
    shown_tokens: int = 0
    cumulative_logprob: float = 0.0
    summed: int = 0

    def add(self, tokens: list[int], last: bool, check_stop: bool) -> str | None:
        """Append tokens; returns the stop string that ended the text, if one did."""
        if self.detokenizer is None:
            return None
        new = self.detokenizer.add(tokens) + (self.detokenizer.flush() if last else "")
        before = len(self.text)
        self.text += new
        if not self.stop or not check_stop or not new:
            return None
        searched_from = max(0, before - max(map(len, self.stop)) + 1)
        found = [(at, s) for s in self.stop if (at := self.text.find(s, searched_from)) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda pair: pair[0])
        self.text = self.text[: at + len(stop) if self.include_stop else at]
        return stop

    def shown(self, finished: bool) -> str:
        if finished or not self.stop:
            return self.text
        return self.text[: max(0, len(self.text) - max(len(s) - 1 for s in self.stop))]


@dataclass(eq=False)
class Group:
    """A submitted prompt and its n samples."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    requests: list[Request]
    texts: list[Text] = field(default_factory=list)
    grammar: Grammar | None = None
    error: str | None = None
    shown: bool = False  # there was an output
    streams: bool = field(init=False)

    def __post_init__(self) -> None:
        self.streams = self.params.output_kind is not RequestOutputKind.FINAL_ONLY

    @property
    def can_wait(self) -> bool:
        """Whether its next output may wait for one more token, where the next step decodes: that step gives it one, it is not
        the first, and few are held already."""
        for request, text in zip(self.requests, self.texts, strict=True):
            gets_none = request.slot < 0 and request.finish_reason is None
            if gets_none or len(request.output_token_ids) - text.shown_tokens >= MOST_HELD_TOKENS:
                return False
        return self.shown

    @property
    def num_held(self) -> int:
        """Tokens that no output has shown, of the request that has most."""
        return max(len(r.output_token_ids) - text.shown_tokens for r, text in zip(self.requests, self.texts, strict=True))

    def output(self, finished: bool) -> RequestOutput:
        """What there is to show: everything, or with DELTA what is new."""
        first, params = self.requests[0], self.params
        prompt_logprobs = None
        if params.prompt_logprobs is not None and not (params.output_kind is RequestOutputKind.DELTA and self.shown):
            prompt_logprobs = [None, *first.prompt_logprobs]
        self.shown = True
        delta = params.output_kind is RequestOutputKind.DELTA
        outputs = []
        for index, (request, text) in enumerate(zip(self.requests, self.texts, strict=True)):
            shown = text.shown(request.finished)
            tokens_from, text_from = (text.shown_tokens, text.shown_text) if delta else (0, 0)
            logprobs = request.logprobs[tokens_from:] if params.logprobs is not None else None
            cumulative = None
            if logprobs is not None:
                for i in range(text.summed, len(request.logprobs)):
                    text.cumulative_logprob += request.logprobs[i][request.output_token_ids[i]].logprob
                text.summed, cumulative = len(request.logprobs), text.cumulative_logprob
            outputs.append(
                CompletionOutput(
                    index=index,
                    text=shown[text_from:],
                    token_ids=request.output_token_ids[tokens_from:],
                    cumulative_logprob=cumulative,
                    logprobs=logprobs,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                )
            )
            text.shown_tokens, text.shown_text = len(request.output_token_ids), len(shown)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=outputs,
            finished=finished,
            metrics=RequestMetrics(
                arrival_time=first.arrival_time,
                first_scheduled_time=first.scheduled_time,
                first_token_time=first.first_token_time,
                finished_time=max(r.finished_time or 0.0 for r in self.requests) if finished else None,
            ),
            num_cached_tokens=first.num_cached_tokens,
            error=self.error,
            output_kind=params.output_kind,
        )


class Turns:
    """How many tokens streams get at a time, and whose turn it is: one, but more where the host is late (see LATE_STEPS)."""

    def __init__(self) -> None:
        self.late_steps = 0.0  # less what the others undo
        self._turn = 0

    def tokens_at_a_time(self, streams: int, late: bool) -> int:
        """A step was read that gave so many streams tokens, late or not."""
        if streams <= MANY_OUTPUTS:
            return 1
        most = MOST_HELD_TOKENS * LATE_STEPS
        self.late_steps = min(self.late_steps + 1, most) if late else max(self.late_steps - 1 / ON_TIME_STEPS, 0)
        self._turn += 1
        return min(1 + int(self.late_steps / LATE_STEPS), MOST_HELD_TOKENS)

    def waits(self, group: Group, at_a_time: int) -> bool:
        """Whether a group that got tokens in this step shows them with later ones."""
        return at_a_time > 1 and (group.requests[0].slot + self._turn) % at_a_time > 0 and group.can_wait
