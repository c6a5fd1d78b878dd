"""Conversations as tokens, and which of these are the assistant's, by a tokenizer's own chat template.

Where a template marks what is generated (`{% generation %}`), transformers says which tokens that are. Few do; of the
others, a turn begins where the template's prompt for it ends, and ends where the conversation up to it, rendered by
itself, does. Whatever is found must hold the answer's text: what cannot be shown to be right is refused.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpsearch.data.pretrained import special_ids
from hpsearch.errors import DataError
from hpsearch.spec.task import TokenSequence
from hpsearch.tasks.instruction.forms import Message, spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT, ANSWER = 1, 2
"""Parts of a conversation: what the assistant said earlier, and its last answer. All else is 0."""

DEFAULT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + eos_token }}"
    "{% endgeneration %}{%- else %}{{ message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}"
)
"""Of a tokenizer that has none: each message behind its role, with end-of-text behind it."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BEGIN = "{{- bos_token }}"


def default_template(*, begins: bool) -> str:
    """`begins`: whether the tokenizer puts a token before every text."""
    return (_BEGIN if begins else "") + DEFAULT_TEMPLATE


@dataclass
class ChatEncoder:
    """Renders and tokenizes conversations with the chat template of a tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self._marks_generation = _GENERATION.search(self.tokenizer.get_chat_template()) is not None
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "instruction: the tokenizer has no end-of-sequence token (eos_token), so that no answer ends"
            )
        if not self.tokenizer.is_fast:
            raise DataError(
                "instruction: the tokenizer cannot tell which text a token stands for, so that nothing shows which are "
                "the assistant's; expected one with a tokenizer.json"
            )
        self._special = special_ids(self.tokenizer)

    def encode(self, conversations: list[list[Message]]) -> list[TokenSequence]:
        """Tokens of each conversation as the template renders it, and the part of each token. Raises DataError."""
        if self._marks_generation:
            found = self._by_marks(conversations)
        else:
            texts = [self._rendered(messages) for messages in conversations]
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            found = [
                self._by_prefixes(messages, text, ids, offsets)
                for messages, text, ids, offsets in zip(
                    conversations, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
                )
            ]
        return [self._ended(sequence) for sequence in found]

    def _by_marks(self, conversations: list[list[Message]]) -> list[TokenSequence]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                conversations, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
        except Exception as error:
            for messages in conversations:
                self._rendered(messages)  # says which one it is
            raise self._refused(
                conversations[0], f"what it marks as generated cannot be read ({_said(error)})"
            ) from error
        return [
            self._parted(messages, ids, _runs(mask))
            for messages, ids, mask in zip(conversations, encoded["input_ids"], encoded["assistant_masks"], strict=True)
        ]

    def _by_prefixes(
        self, messages: list[Message], text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> TokenSequence:
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._prompt(messages, number, text)
            begin = next((place for place, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
            turns.append((begin, self._end_of(messages, number, text, ids, offsets)))
        return self._parted(messages, ids, turns)

    def _prompt(self, messages: list[Message], number: int, text: str) -> str:
        """What stands before the words of an answer."""
        prompt = self._rendered(messages[:number], is_prompt=True)
        if text.startswith(prompt):
            return prompt
        # Some put the answer's header behind every question, and another one into the prompt.
        before = self._rendered(messages[:number])
        answer = spoken(messages[number]["content"])
        if before and text.startswith(before) and text[len(before) :].lstrip().startswith(answer):
            return before
        raise self._refused(
            messages, "the template renders what comes before an answer otherwise when the answer is there"
        )

    def _end_of(
        self, messages: list[Message], number: int, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> int:
        """The token behind a turn."""
        if number == len(messages) - 1:
            return len(ids)
        upto = self._rendered(messages[: number + 1])
        if text.startswith(upto):
            return next((place for place, (begin, _) in enumerate(offsets) if begin >= len(upto)), len(ids))
        own, after = self._ids(upto), self._ids(self._rendered(messages[: number + 2]))
        same = _common(own, ids)
        if all(token in self._special for token in own[same:]):
            # Only what ends a whole conversation is another, such as <|return|> in place of <|end|>.
            is_replaced = bool(own[same:]) and same < len(ids) and ids[same] == after[-1] and ids[same] in self._special
            return same + is_replaced
        # The turn itself is rendered otherwise when others follow (without its thoughts, say). What stands behind its
        # words is what does not change with them: of the turn alone, and of the turn with the message that follows.
        other = [*messages[:number], {"role": "assistant", "content": _other(messages[number]["content"])}]
        behind = _common(own[::-1], self._ids(self._rendered(other))[::-1])
        changed = self._ids(self._rendered([*other, messages[number + 1]]))
        both = _common(after[::-1], changed[::-1])
        if after != ids[: len(after)] or both <= behind:
            raise self._refused(messages, "the template renders a turn otherwise when others follow")
        return len(after) - both + behind

    def _parted(self, messages: list[Message], ids: list[int], turns: list[tuple[int, int]]) -> TokenSequence:
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(turns) != len(answers):
            marked = "no token" if not turns else f"{len(turns)} turns"
            raise self._refused(messages, f"{marked} of {len(answers)} answers marked by the template")
        parts = [0] * len(ids)
        for number, ((begin, end), answer) in enumerate(zip(turns, answers, strict=True), start=1):
            said, wanted = self._decoded(ids[begin:end]), spoken(answer)
            # Of letters that the tokenizer does not know there is what it makes of them.
            kept = self._decoded(self._ids(wanted))
            if begin >= end or not any(_letters(text) in _letters(said) for text in (wanted, kept)):
                raise self._refused(messages, f"the tokens of an answer hold {said[:60]!r} and not {wanted[:60]!r}")
            parts[begin:end] = [ANSWER if number == len(answers) else ASSISTANT] * (end - begin)
        return TokenSequence(ids=ids, parts=parts)

    def _ended(self, sequence: TokenSequence) -> TokenSequence:
        """The sequence with end-of-text behind an answer that the template ends with words."""
        places = [place for place, part in enumerate(sequence.parts) if part == ANSWER]
        last = places[-1]
        if any(sequence.ids[place] in self._special for place in places[-2:]):
            return sequence
        end = self.tokenizer.eos_token_id
        ids = [*sequence.ids[: last + 1], end]
        return TokenSequence(ids=ids, parts=[*sequence.parts[: last + 1], ANSWER])

    def _rendered(self, messages: list[Message], *, is_prompt: bool = False) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt)
        except Exception as error:  # a template may raise anything
            raise self._refused(messages, f"the template raises {_said(error)}") from error
        return str(text)

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _refused(self, messages: list[Message], why: str) -> DataError:
        name = self.tokenizer.name_or_path or "the tokenizer"
        first = next((message["content"] for message in messages if message["role"] == "user"), "")
        return DataError(
            f"instruction: the chat template of {name} does not show which tokens of a conversation are the "
            f"assistant's: {why}. The conversation begins with {first[:80]!r}. Another template can be named under "
            "instruction.chat_template"
        )


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """Where the runs of ones begin and end."""
    edges = [place for place in range(1, len(mask)) if mask[place] != mask[place - 1]]
    bounds = ([0] if mask and mask[0] else []) + edges + ([len(mask)] if mask and mask[-1] else [])
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens the two begin with alike."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _other(content: str) -> str:
    """Words that begin and end otherwise."""
    return "X1" if content.strip()[-1:] != "1" else "Y2"


def _letters(text: str) -> str:
    """What tokenizers may not change: they may change white space, and how a letter is written."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
