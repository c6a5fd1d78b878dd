"""Which tokens of a conversation are the assistant's: as TRL has them, and as written by hand where TRL fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers.normalizers import NFC
from transformers import LlamaConfig, LlamaForCausalLM

from hpsearch.errors import DataError
from hpsearch.tasks.instruction.chat import ANSWER, ASSISTANT, DEFAULT_TEMPLATE, ChatEncoder, default_template
from tests.chats import conversations, tokenizer_with

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
"""Those of real models, as they are published, and TRL's own with marks of what is generated."""
KINDS = {
    "llama3": {"begin": "<|begin_of_text|>", "end": "<|eot_id|>"},
    "gemma3": {"begin": "<bos>", "end": "<eos>"},
    "phi3": {"end": "<|endoftext|>"},
    "llama3_training": {"begin": "<|begin_of_text|>", "end": "<|eot_id|>"},
    "qwen3_training": {"end": "<|im_end|>"},
}
"""The first three mark nothing."""
_OTHERS = [name for name in KINDS if name not in ("phi3", "llama3_training")]


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def shown(encoder: ChatEncoder, messages: list[dict[str, str]]) -> str:
    """The conversation with what is the assistant's in brackets."""
    (found,) = encoder.encode([messages])
    text, before = "", 0
    for token, part in zip(found.ids, found.parts, strict=True):
        text += ("]" if before and part != before else "") + ("[" if part and part != before else "")
        text += encoder.tokenizer.decode([token])
        before = part
    return text + ("]" if before else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["phi3", "llama3_training", *(pytest.param(n, marks=pytest.mark.nightly) for n in _OTHERS)]
)
def test_tokens_and_masks_are_those_of_trl(name: str, tmp_path: Path) -> None:
    tokenizer: Any = tokenizer_with(template(name), **KINDS[name])
    chats = conversations(1000)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, use_cpu=True, report_to="none"
        ),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset
    ours = ChatEncoder(tokenizer_with(template(name), **KINDS[name])).encode(chats)
    for messages, one, ids, labels in zip(chats, ours, theirs["input_ids"], theirs["labels"], strict=True):
        assert one.ids == list(ids), messages
        assert [bool(part) for part in one.parts] == [label != -100 for label in labels], messages
        assert {*one.parts} <= {0, ASSISTANT, ANSWER}


TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "It is 2."},
]


@pytest.mark.parametrize(
    ("name", "marks", "expected"),
    [
        (
            "qwen3",  # it writes thoughts, none here, before the last answer alone
            {"end": "<|im_end|>"},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
            "[1<|im_end|>\n]<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
            "[<think>\n\n</think>\n\nIt is 2.<|im_end|>\n]",
        ),
        (
            "qwen2_5",
            {"end": "<|im_end|>"},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
            "[1<|im_end|>\n]<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n[It is 2.<|im_end|>\n]",
        ),
        (
            "llama3_1",
            {"begin": "<|begin_of_text|>", "end": "<|eot_id|>"},
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[1<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\n"
            "Two?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[It is 2.<|eot_id|>]",
        ),
    ],
)
def test_stock_templates_without_marks(name: str, marks: dict[str, str], expected: str) -> None:
    assert shown(ChatEncoder(tokenizer_with(template(name), **marks)), TWO_TURNS) == expected


def test_a_template_that_ends_turns_and_whole_conversations_otherwise() -> None:
    found = shown(ChatEncoder(tokenizer_with(template("gptoss"), end="<|return|>")), TWO_TURNS)
    assert found.endswith(
        "<|start|>user<|message|>One?<|end|><|start|>assistant[<|channel|>final<|message|>1<|end|>]"
        "<|start|>user<|message|>Two?<|end|><|start|>assistant[<|channel|>final<|message|>It is 2.<|return|>]"
    )


def test_the_template_of_tokenizers_that_have_none() -> None:
    expected = (
        "<|system|>\nBe brief.<eos><|user|>\nOne?<eos><|assistant|>\n[1<eos>]<|user|>\nTwo?<eos><|assistant|>\n"
        "[It is 2.<eos>]"
    )
    assert shown(ChatEncoder(tokenizer_with(DEFAULT_TEMPLATE, end="<eos>")), TWO_TURNS) == expected
    begun = tokenizer_with(default_template(begins=True), begin="<bos>", end="<eos>")
    assert shown(ChatEncoder(begun), TWO_TURNS) == f"<bos>{expected}", "one token begins it"


def test_the_last_answer_is_told_from_earlier_ones() -> None:
    (found,) = ChatEncoder(tokenizer_with(template("phi3"), end="<|endoftext|>")).encode([TWO_TURNS])
    kinds = [part for part, before in zip(found.parts, [0, *found.parts], strict=False) if part != before]
    assert kinds == [ASSISTANT, 0, ANSWER]


def test_an_answer_that_its_template_ends_with_words_gets_an_end() -> None:
    plain = (
        "{% for message in messages %}{{ message['role'] + MARK + message['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' + MARK }}{% endif %}"
    )
    found = shown(ChatEncoder(tokenizer_with(plain.replace("MARK", "':\\n'"), end="<eos>")), TWO_TURNS)
    assert found == "system:\nBe brief.\nuser:\nOne?\nassistant:\n[1\n]user:\nTwo?\nassistant:\n[It is 2.\n<eos>]"

    found = shown(ChatEncoder(tokenizer_with(plain.replace("MARK", "': '"), end="<eos>")), TWO_TURNS)
    assert found.endswith("Two?\nassistant:[ It is 2.\n<eos>]"), "a token that holds both is learnt with the answer"


def test_a_letter_may_be_written_otherwise_by_the_tokenizer() -> None:
    tokenizer = tokenizer_with(DEFAULT_TEMPLATE, end="<eos>")
    tokenizer.backend_tokenizer.normalizer = NFC()
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Cafe\u0301"}]
    assert shown(ChatEncoder(tokenizer), messages).endswith("<eos>]")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tokenizer_with(DEFAULT_TEMPLATE)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no end-of-sequence token"):
        ChatEncoder(tokenizer)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("{{ raise_exception('roles must alternate') }}", "the template raises roles must alternate", id="raises"),
        pytest.param("{% for message in messages %}{{ message['content'].upper() }}{% endfor %}", "the tokens of an answer hold", id="other words"),
        pytest.param("{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}", "renders what comes before an answer otherwise", id="no prefix"),
        pytest.param("{% for message in messages %}{% generation %}{% endgeneration %}{{ message['content'] }}{% endfor %}", "what it marks as generated cannot be read", id="empty marks"),
        pytest.param("{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}", "the tokens of an answer hold ''", id="without answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_to_be_right_is_refused(text: str, why: str) -> None:
    tokenizer = tokenizer_with(text)
    tokenizer.name_or_path = "models/some-chat"
    with pytest.raises(DataError) as error:
        ChatEncoder(tokenizer).encode([TWO_TURNS])
    assert why in str(error.value)
    assert "chat template of models/some-chat" in str(error.value)
    assert "begins with 'One?'" in str(error.value)
    assert "instruction.chat_template" in str(error.value)
