"""Rows as people have them, read as conversations: chat messages, ShareGPT, alpaca, prompts and completions, templates.

A conversation is a list of messages, `{"role": ..., "content": ...}`: a system message or none, then those of the user
(or of a tool) and of the assistant by turns. What is held of it is two texts: the messages before the last answer as
JSON, and the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from hpsearch.data.files import value_in
from hpsearch.errors import DataError
from hpsearch.spec.task import Row, UnusableRowError

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What speakers are called, and the role that chat templates know them by."""
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of a list of messages."""
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
"""Columns of a prompt and of the answer to it, the first that a row has."""
_CONTEXTS = ("input", "context")
"""Columns that stand below the prompt, where there is something in them."""
_CALLERS, _CALLS = ("function_call", "tool_call"), ("tool_calls", "function_call")
"""Roles, and keys of messages, of calls that a chat template renders by other means than text."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = "</think>"
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class RowReader:
    """Reads the rows of one file. All have the form of the first."""

    def __init__(self, *, column: str | None, template: dict[str, str | None] | None, labels: list[str]) -> None:
        """`column` holds the messages, if it is called otherwise than usual; `template` makes the messages of a row's
        columns; with `labels`, each answer is one of them."""
        self._column, self._template, self._labels = column, template, labels
        self._form: str | None = None

    def __call__(self, row: Row) -> tuple[str, str]:
        """The messages before the last answer as JSON, and the answer. Raises DataError, UnusableRowError."""
        form, read = self._recognised(row)
        if self._form is None:
            self._form = form
        elif form != self._form:
            raise DataError(f"expected {self._form}, as in the rows before, got {form}")
        return self._checked(read(row))

    def _recognised(self, row: Row) -> tuple[str, Callable[[Row], list[Message]]]:
        if self._template is not None:
            return "the columns of instruction.template", self._from_template
        if self._column is not None:
            return f"messages in '{self._column}'", partial(_messages, self._column)
        for column in MESSAGE_COLUMNS:
            if column in row:
                return f"messages in '{column}'", partial(_messages, column)
        for prompt, answer in PAIRS:
            if prompt in row and answer in row:
                return f"'{prompt}' and '{answer}'", partial(_pair, prompt, answer)
        known = "; ".join((*MESSAGE_COLUMNS, *(" and ".join(pair) for pair in PAIRS)))
        raise DataError(
            f"no form of prompt and answer has the columns {_names(row)}; expected {known}; or name the columns: "
            "instruction.template: {prompt: '{COLUMN}', completion: '{COLUMN}'}"
        )

    def _from_template(self, row: Row) -> list[Message]:
        assert self._template is not None
        roles = {"system": "system", "prompt": "user", "completion": "assistant"}
        return [
            {"role": role, "content": _filled(text, row)}
            for name, role in roles.items()
            if (text := self._template.get(name)) is not None
        ]

    def _checked(self, messages: list[Message]) -> tuple[str, str]:
        while messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]  # nothing answers it
        if not messages:
            raise UnusableRowError("no answer of an assistant")
        before = None
        for number, message in enumerate(messages):
            role = message["role"]
            fits = {
                "system": number == 0,
                "user": before in (None, "system", "assistant"),
                "tool": before in ("assistant", "tool"),
                "assistant": before in ("user", "tool"),
            }
            if not fits[role]:
                what = f"{role} after {before}" if before else f"{role} first"
                raise UnusableRowError(f"roles out of order ({what})")
            before = role
        for message in messages:
            if not message["content"].strip() and message["role"] != "system":
                raise UnusableRowError(f"an empty message ({message['role']})")
        answer = messages[-1]["content"].strip()
        if self._labels and spoken(answer) not in self._labels:
            expected = ", ".join(self._labels[:10])
            raise DataError(f"the answer {answer[:60]!r} is none of instruction.labels: {expected}")
        return json.dumps(messages[:-1], ensure_ascii=False), answer


def spoken(text: str) -> str:
    """An answer without the thoughts before it."""
    return text.rpartition(_THOUGHT)[2].strip()


def conversation(prompt: str, answer: str) -> list[Message]:
    """The messages of which `RowReader` made two texts."""
    return [*json.loads(prompt), {"role": "assistant", "content": answer}]


def _messages(column: str, row: Row) -> list[Message]:
    value = value_in(row, column)
    if not value:
        raise UnusableRowError("no messages")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"expected a list of messages, got the text {value[:60]!r}") from None
    if not isinstance(value, list):
        raise DataError(f"expected a list of messages, got {json.dumps(value, default=str)[:60]}")
    return _instructed([_message(entry) for entry in value], row)


def _instructed(messages: list[Message], row: Row) -> list[Message]:
    """The messages behind that of the system, if a column beside them has one."""
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system.strip() and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise DataError(f"expected a message with a role and its content, got {json.dumps(entry, default=str)[:60]}")
    role = entry.get("role", entry.get("from"))
    if role in _CALLERS:
        raise UnusableRowError("calls of tools")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise DataError(f"unknown role {role!r}; expected {', '.join(ROLES)}")
    if any(entry.get(name) for name in _CALLS):
        raise UnusableRowError("calls of tools")
    content = entry.get("content", entry.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise UnusableRowError("a message that is not all text")
    reasoning = next((entry[name] for name in _REASONING if isinstance(entry.get(name), str) and entry[name]), None)
    if reasoning is not None and ROLES[role.lower()] == "assistant":
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content.strip()}"
    return {"role": ROLES[role.lower()], "content": content}


def _pair(prompt: str, answer: str, row: Row) -> list[Message]:
    """A prompt and its answer, each a text or a list of messages (as TRL has them)."""
    if isinstance(row[prompt], list):
        messages = [_message(entry) for entry in row[prompt]]
    else:
        text = _text(row[prompt], prompt)
        contexts = (row.get(name) for name in _CONTEXTS if name != prompt)
        context = next((one for one in contexts if isinstance(one, str) and one.strip()), "")
        messages = [{"role": "user", "content": f"{text}\n\n{context}" if context else text}]
    messages = _instructed(messages, row)
    if isinstance(row[answer], list):
        return [*messages, *map(_message, row[answer])]
    return [*messages, {"role": "assistant", "content": _text(row[answer], answer)}]


def _filled(template: str, row: Row) -> str:
    """A template with the columns of a row in place of their names; `{{` and `}}` are braces."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        return _text(value_in(row, match[1]), match[1])

    return _FIELD.sub(value, template)


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {type(value).__name__}, not text")
    return value


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"
