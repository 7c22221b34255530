"""`/v1/responses`: OpenAI's Responses API, as far as it keeps nothing.

Shapes of answers and events are those of OpenAI's client (openai/types/responses).
"""

from __future__ import annotations

import json
import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import RootModel
from starlette.responses import Response

from common.serving.request import Generation, Output
from scripts.server.answers import request_number, respond, usage_of
from scripts.server.chat_turn import next_turn
from scripts.server.dependencies import ERRORS, STREAMED, Caller, SharedService
from scripts.server.reasoning import END
from scripts.server.responses_requests import ResponsesRequest
from scripts.server.running import Run
from scripts.server.service import Service
from scripts.server.tools.answer import ToolCall

router = APIRouter(prefix="/v1", responses=ERRORS)


class ResponseAnswer(RootModel[dict[str, Any]]):
    """OpenAI's `Response`."""


@router.post("/responses", response_model=ResponseAnswer, responses=STREAMED)
async def responses(
    body: ResponsesRequest, request: Request, service: SharedService, caller: Caller
) -> Response:
    """Answer a conversation, as `/v1/chat/completions` does, in items."""
    chat = body.chat()
    turn = await next_turn(chat, request, service, caller)
    number = request_number("resp", chat, request)
    answer = Answer(body, number, turn.tenant, chat.include_reasoning is not False)

    def whole(run: Run) -> ResponseAnswer:
        (generation,) = run.generations
        answer.push(*turn.split(0, generation.text or "", over=True))
        answer.end(generation, _thought(service, turn.tenant, generation, answer))
        return ResponseAnswer(answer.response())

    def chunk(index: int, output: Output, begins: bool) -> bytes:
        if begins:
            answer.begin()
        answer.push(*turn.split(0, output.text, output.generation is not None))
        if output.generation is not None:
            answer.end(output.generation, _thought(service, turn.tenant, output.generation, answer))
        return answer.take()

    return await respond(chat, request, service, turn.jobs, whole, chunk, lambda run: b"")


def _thought(service: Service, tenant: str, generation: Generation, answer: Answer) -> int:
    """Tokens of an answer's reasoning, its end mark included."""
    if not answer.thought:
        return 0
    engine = service.require().engine
    mark = engine.tokenize(tenant, END, add_special_tokens=False)
    if len(mark) == 1 and mark[0] in generation.token_ids:
        return generation.token_ids.index(mark[0]) + 1
    return min(len(generation.token_ids), len(engine.tokenize(tenant, answer.thought, False)))


class Answer:
    """A response whose items come one after another: reasoning, text, calls of functions.

    Each change makes events, which `take` gives as a stream has them.
    """

    def __init__(self, body: ResponsesRequest, number: str, model: str, tells: bool):
        """tells: whether reasoning is given."""
        self._body, self._number, self._model, self._tells = body, number, model, tells
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._state: dict[str, Any] = {"status": "in_progress", "usage": None}
        self._events: list[bytes] = []
        self._count = 0
        self.thought = ""

    def response(self) -> dict[str, Any]:
        """As it now is."""
        body = self._body.model_dump(exclude_unset=True, by_alias=True)
        return {
            "id": self._number,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "output": self._items,
            "error": None,
            "incomplete_details": None,
            "instructions": self._body.instructions,
            "max_output_tokens": self._body.max_output_tokens,
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": self._body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self._body.temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": self._body.top_p,
        } | self._state

    def begin(self) -> None:
        for kind in ("created", "in_progress"):
            self._say(f"response.{kind}", response=self.response())

    def push(self, reasoning: str, content: str, calls: list[ToolCall]) -> None:
        """What is new."""
        self.thought += reasoning
        if reasoning and self._tells:
            item = self._item("reasoning", summary=[], content=[])
            item["content"] = [{"type": "reasoning_text", "text": self._more(reasoning)}]
            self._say_of_item("reasoning_text.delta", content_index=0, delta=reasoning)
        if content:
            self._text(content)
        for call in calls:
            if call.id is not None:
                self._close()
                name, kind = call.function.name, "function_call"
                self._item(kind, call_id=call.id, name=name, arguments="")
            assert self._open is not None
            self._open["arguments"] += call.function.arguments
            self._say_of_item("function_call_arguments.delta", delta=call.function.arguments)

    def end(self, generation: Generation, thought: int) -> None:
        """thought: tokens of reasoning."""
        cut = generation.finish_reason != "stop"
        if not self._items:
            self._text("")
        self._close("incomplete" if cut else "completed")
        usage = usage_of([generation], 1)
        cached = usage.prompt_tokens_details.cached_tokens
        self._state = {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": thought},
                "total_tokens": usage.total_tokens,
            },
        }
        self._say(f"response.{self._state['status']}", response=self.response())

    def take(self) -> bytes:
        """The events since the last call."""
        found, self._events = b"".join(self._events), []
        return found

    def _text(self, content: str) -> None:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if self._open is None or self._open["type"] != "message":
            item = self._item("message", role="assistant", content=[])
            self._say_of_item("content_part.added", content_index=0, part=part)
            item["content"] = [part]
        assert self._open is not None
        self._open["content"] = [part | {"text": self._more(content)}]
        self._say_of_item("output_text.delta", content_index=0, delta=content, logprobs=[])

    def _more(self, text: str) -> str:
        """The open item's text with this behind it."""
        assert self._open is not None
        parts = self._open["content"]
        return (parts[0]["text"] if parts else "") + text

    def _item(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The open item if it is of this kind, else a new one."""
        if self._open is not None and self._open["type"] == kind:
            return self._open
        self._close()
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        number = f"{prefix}-{self._number.partition('-')[2]}-{len(self._items)}"
        self._open = {"id": number, "type": kind, "status": "in_progress", **fields}
        self._items.append(self._open)
        place = len(self._items) - 1
        self._say("response.output_item.added", output_index=place, item=self._open)
        return self._open

    def _close(self, status: str = "completed") -> None:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            self._say_of_item("function_call_arguments.done", **told)
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                self._say_of_item("reasoning_text.done", content_index=0, text=part["text"])
            else:
                text = {"text": part["text"], "logprobs": []}
                self._say_of_item("output_text.done", content_index=0, **text)
                self._say_of_item("content_part.done", content_index=0, part=part)
        self._say("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None

    def _say_of_item(self, kind: str, **fields: Any) -> None:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._items) - 1}
        self._say(f"response.{kind}", **place, **fields)

    def _say(self, kind: str, **fields: Any) -> None:
        told = json.dumps({"type": kind, "sequence_number": self._count} | fields)
        self._count += 1
        self._events.append(f"event: {kind}\ndata: {told}\n\n".encode())
