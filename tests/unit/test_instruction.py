"""Instruction tuning: rows as people have them, losses of the answers alone, answers that are the model's own."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hpsearch
from hpsearch.data.prepare import measure, notes, prepare, too_long
from hpsearch.data.pretrained import load_tokenizer
from hpsearch.data.shards import load_parts, load_texts, read_card
from hpsearch.errors import DataError, SpecError, UsageError
from hpsearch.models.architecture import build_model
from hpsearch.models.probe import how_it_generates
from hpsearch.spec.load import load_study
from hpsearch.spec.sections import DataSpec, FileSplits, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import study_class
from hpsearch.spec.task import UnusableRowError
from hpsearch.tasks.instruction.chat import ANSWER
from hpsearch.tasks.instruction.definition import InstructionDefinition, InstructionOptions
from hpsearch.tasks.instruction.forms import RowReader, conversation
from hpsearch.tasks.instruction.training import Instruction
from hpsearch.training.random_states import seed_everything
from hpsearch.training.trainer import PreemptedError, Trainer
from tests.chats import conversations, tokenizer_with, write_jsonl
from tests.runs import curve_of

MODEL = ModelSettings(architecture="llama", hidden_size=32, num_heads=2, num_layers=2, context_length=160, init_std=0.2)
RUN = RunSettings(learning_rate=1e-2, batch_size=8, num_epochs=2, evaluations_per_epoch=2, weight_average=0.1)
CPU = torch.device("cpu")


def make(folder: Path, rows: list[Any], *, name: str = "rows.jsonl", **more: Any) -> Path:
    file = write_jsonl(folder / name, rows)
    data = DataSpec(files=FileSplits(train=[str(file)]), **more.pop("data", {}))
    spec = study_class("instruction")(
        name="s", task="instruction", data=data, tokenizer=TokenizerSpec(vocab_size=500), folder=str(folder), **more
    )
    return Path(str(prepare(spec)[0]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"messages": messages} for messages in conversations(400)]
    return make(tmp_path_factory.mktemp("chats"), rows)


def task(data: Path, model: ModelSettings = MODEL, *, objective: str = "loss", **options: Any) -> Instruction:
    seed_everything(0)
    return Instruction(data, model, InstructionOptions.model_validate(options), objective=objective)


def trainer(own: Instruction, folder: Path, run: RunSettings = RUN, **more: Any) -> Trainer:
    return Trainer(own, run, seed=0, device=CPU, folder=folder, **more)


USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"messages": [USER, ASSISTANT]}, [("user", "Hi?"), ("assistant", "Yes.")], id="messages"),
        pytest.param({"messages": [{"role": "system", "content": "S"}, USER, ASSISTANT]}, [("system", "S"), ("user", "Hi?"), ("assistant", "Yes.")], id="system"),
        pytest.param({"messages": json.dumps([USER, ASSISTANT])}, [("user", "Hi?"), ("assistant", "Yes.")], id="messages as JSON text"),
        pytest.param({"messages": [USER, ASSISTANT, USER]}, [("user", "Hi?"), ("assistant", "Yes.")], id="a question that nobody answered"),
        pytest.param({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, ASSISTANT]}, [("user", "Hi?"), ("assistant", "Yes.")], id="parts"),
        pytest.param({"messages": [USER, {**ASSISTANT, "reasoning_content": "hm"}]}, [("user", "Hi?"), ("assistant", "<think>\nhm\n</think>\n\nYes.")], id="thoughts"),
        pytest.param({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}], "system": "S"}, [("system", "S"), ("user", "Hi?"), ("assistant", "Yes.")], id="ShareGPT"),
        pytest.param({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"}]}, [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")], id="tool"),
        pytest.param({"prompt": "Hi?", "completion": "Yes."}, [("user", "Hi?"), ("assistant", "Yes.")], id="prompt"),
        pytest.param({"prompt": [USER], "completion": [ASSISTANT]}, [("user", "Hi?"), ("assistant", "Yes.")], id="prompt of messages"),
        pytest.param({"instruction": "Sort", "input": "b a", "output": "a b"}, [("user", "Sort\n\nb a"), ("assistant", "a b")], id="alpaca"),
        pytest.param({"instruction": "Hi?", "input": "", "output": "Yes."}, [("user", "Hi?"), ("assistant", "Yes.")], id="alpaca without input"),
        pytest.param({"instruction": "Who?", "context": "C", "response": "Me"}, [("user", "Who?\n\nC"), ("assistant", "Me")], id="Dolly"),
        pytest.param({"question": "Hi?", "answer": 4}, [("user", "Hi?"), ("assistant", "4")], id="question"),
        pytest.param({"input": "Hi?", "output": " Yes.\n"}, [("user", "Hi?"), ("assistant", "Yes.")], id="input"),
    ],
)  # fmt: skip
def test_forms_of_rows(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = conversation(*RowReader(column=None, template=None, labels=[])(row))
    assert [(message["role"], message["content"]) for message in found] == expected


def test_columns_of_other_names() -> None:
    template = {"prompt": "Say {en.text} in {{French}}", "completion": "{fr}", "system": None}
    found = RowReader(column=None, template=template, labels=[])({"en": {"text": "yes"}, "fr": "oui"})
    assert conversation(*found) == [
        {"role": "user", "content": "Say yes in {French}"},
        {"role": "assistant", "content": "oui"},
    ]
    read = RowReader(column="dialog", template=None, labels=[])
    assert conversation(*read({"dialog": [USER, ASSISTANT], "prompt": "x", "completion": "y"})) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        pytest.param({"text": "x"}, "no form of prompt and answer has the columns text; expected messages", id="no form"),
        pytest.param({"messages": "hello"}, "expected a list of messages, got the text 'hello'", id="text"),
        pytest.param({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'; expected system, developer, user", id="unknown role"),
        pytest.param({"messages": ["x"]}, "expected a message with a role and its content", id="no message"),
        pytest.param({"messages": 3}, "expected a list of messages, got 3", id="number"),
        pytest.param({"prompt": {"a": 1}, "completion": "x"}, "column 'prompt' holds dict, not text", id="no text"),
    ],
)  # fmt: skip
def test_a_row_that_fits_no_form_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    rows = [{"messages": messages} for messages in conversations(3)] if "messages" in row else []
    with pytest.raises(DataError) as error:
        make(tmp_path, [*rows, row])
    assert f"rows.jsonl, line {len(rows) + 1}: {why}" in str(error.value)


def test_a_file_has_one_form(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(DataError, match="line 2: expected messages in 'messages', as in the rows before, got 'prompt'"):
        make(tmp_path, rows)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([ASSISTANT], "roles out of order (assistant first)"),
        ([USER, USER, ASSISTANT], "roles out of order (user after user)"),
        ([USER, {"role": "system", "content": "x"}, ASSISTANT], "roles out of order (system after user)"),
        ([USER], "no answer of an assistant"),
        ([USER, {"role": "assistant", "content": " "}], "an empty message (assistant)"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "calls of tools"),
        ([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT], "a message that is not all text"),
    ],
)
def test_rows_that_are_no_example_are_left_out(messages: list[Any], why: str) -> None:
    with pytest.raises(UnusableRowError) as error:
        RowReader(column=None, template=None, labels=[])({"messages": messages})
    assert str(error.value) == why


def test_what_is_left_out_is_counted_and_said(tmp_path: Path) -> None:
    rows = [{"messages": messages} for messages in conversations(60)]
    rows += [{"messages": [USER, USER, ASSISTANT]}, {"messages": [USER]}, {"messages": [USER]}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    spec = study_class("instruction")(
        name="s", task="instruction", data=DataSpec(files=FileSplits(train=[str(file)])), folder=str(tmp_path)
    )
    card, long = measure(spec)
    said = "\n".join(notes(spec, card))
    assert f"{file}: no answer of an assistant: 2 rows were left out" in said
    assert f"{file}: roles out of order (user after user): 1 rows were left out" in said
    assert sum(long.cut.values()) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instruction: {template: {prompt: a, completion: b}}", "s.yaml:4:25: instruction.template: expected names of columns in braces"),
        ("instruction: {chat_template: gone.jinja}", "s.yaml:4:30: instruction.chat_template: gone.jinja cannot be read: No such file"),
        ("instruction: {labels: [a, a]}", "instruction.labels: expected at least two labels, each once"),
        ("objective: f1", "objective: instruction studies like this have no validation f1; expected loss or rouge_l"),
        ("metric: accuracy", "metric: accuracy is no test metric of instruction studies like this; expected rouge_l or perplexity"),
        ("instruction: {generation: {stop: ['']}}", "instruction.generation.stop: expected text, got ''"),
    ],
)  # fmt: skip
def test_mistakes_in_a_study_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: a\ntask: instruction\ndata: {{corpus: python_functions}}\n{text}\n")
    with pytest.raises(SpecError) as error:
        load_study(tmp_path / "s.yaml")
    assert message in str(error.value)


def test_a_chat_template_may_be_a_file(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    base = "name: a\ntask: instruction\ndata: {corpus: python_functions}\n"
    (tmp_path / "s.yaml").write_text(f"{base}instruction: {{chat_template: chat.jinja}}\n")
    named = load_study(tmp_path / "s.yaml")
    assert named.options.chat_template == template
    (tmp_path / "s.yaml").write_text(f"{base}instruction: {{chat_template: {json.dumps(template)}}}\n")
    assert load_study(tmp_path / "s.yaml").fingerprint == named.fingerprint, "what counts is the text"


def test_only_answers_are_learnt(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    own = task(data, packing=False, loss_on="completion")
    index = np.array([3])
    labels = own.batch("train", index).tensors[-1][0]
    answers = load_parts(data, "train")
    assert (labels >= 0).sum() == own.predicted("train", index)
    said = tokenizer.decode(labels[labels >= 0])
    assert said.endswith("<|endoftext|>")
    learnt = {
        kind: sum(task(data, loss_on=kind).predicted("train", own) for own in task(data).epoch_batches(np.random.default_rng(0), 8))
        for kind in ("all", "assistant", "completion")
    }  # fmt: skip
    assert learnt["completion"] < learnt["assistant"] < learnt["all"]
    assert (answers == ANSWER).sum() > 0
    texts = load_texts(data, "validation", "answer")
    validation = task(data, packing=False, loss_on="completion")
    for position in range(20):
        labels = validation.batch("validation", np.array([position])).tensors[-1][0]
        expected = texts[validation._splits["validation"].kept[position]]
        assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) == expected.strip()


def test_packed_losses_and_gradients_are_those_of_conversations_by_themselves(data: Path) -> None:
    packed, alone = task(data), task(data, packing=False)
    assert packed.num_examples["train"] < 0.9 * alone.num_examples["train"]
    found = []
    for own in (packed, alone):
        own.model.eval()
        total, count = torch.zeros(()), 0
        for batch in own.evaluation_batches("train"):
            losses = own.losses(own.batch("train", batch))
            count += own.predicted("train", batch)
            losses.sum().backward()
            total = total + losses.detach().double().sum()
        gradients = torch.cat([value.grad.flatten() for value in own.model.parameters() if value.grad is not None])
        found.append((total.item() / count, count, gradients / count))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][2], found[1][2], atol=1e-5 * float(found[1][2].abs().max()))


def test_perplexity_is_that_of_a_loss_made_by_hand(data: Path, tmp_path: Path) -> None:
    own = task(data)
    scored = own.score(trainer(own, tmp_path).evaluator.evaluate)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    own.model.eval()
    nats, tokens, size = 0.0, 0, 0
    for number in own._splits["test"].kept:
        messages = conversation(*(load_texts(data, "test", name)[number] for name in ("prompt", "answer")))
        found = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, mask = (
            torch.as_tensor(found[name])[:, -MODEL.context_length - 1 :] for name in ("input_ids", "assistant_masks")
        )
        with torch.no_grad():
            logits = own.model(input_ids=ids[:, :-1]).logits
        losses = functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        nats += float(losses[mask[0, 1:] == 1].double().sum())
        tokens += int(mask[0, 1:].sum())
        size += len(tokenizer.decode(ids[0, 1:][mask[0, 1:] == 1], skip_special_tokens=True).encode())
    values = {score.metric: score.value for score in scored.scores}
    assert values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert {*values} == {"perplexity", "bits_per_byte", "rouge_l", "token_f1", "exact_match", "bleu", "chrf"}
    template = read_card(data).chat_template
    assert all(score.contract["chat_template"] == template for score in scored.scores)
    assert len(scored.details["outputs"]) == len(own._splits["test"].kept)
    assert all(0 <= score.low <= score.value <= score.high for score in scored.scores)


def one_by_one(own: Instruction, folder: Path, split: str) -> list[str]:
    own.evaluation_batches = lambda name: [np.array([index]) for index in range(len(own._splits[split].kept))]  # type: ignore[method-assign]
    return own._answers(trainer(own, folder).evaluator.evaluate, split)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_answers_in_batches_are_those_of_prompts_by_themselves(data: Path, tmp_path: Path, architecture: str) -> None:
    own = task(data, MODEL.model_copy(update={"architecture": architecture}), generation={"max_new_tokens": 12})
    evaluate = trainer(own, tmp_path / "one").evaluator.evaluate
    batches = own.evaluation_batches("test prompts")
    assert max(map(len, batches)) > 3
    assert sorted(np.concatenate(batches)) == list(range(len(own._splits["test"].kept)))
    together = own._answers(evaluate, "test")
    assert together == one_by_one(own, tmp_path / "two", "test")
    assert len({*together}) > 3


def test_an_answer_has_the_room_that_its_prompt_leaves(data: Path) -> None:
    own = task(data, MODEL.model_copy(update={"context_length": 48}))
    lengths = own._splits["test"].prompt_lengths
    for batch in own.evaluation_batches("test prompts"):
        room = own._writer._room(lengths[batch])
        assert len({*room}) == 1, "none is cut short for another"
        assert (lengths[batch] + room <= 49).all()


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(data: Path, tmp_path: Path) -> None:
    plain = task(data, generation={"max_new_tokens": 30})
    evaluate = trainer(plain, tmp_path / "one").evaluator.evaluate
    whole = plain._answers(evaluate, "test")
    stop = next(text[3:6] for text in whole if len(text) > 8 and text[3:6].strip() == text[3:6])
    own = task(data, generation={"max_new_tokens": 30, "stop": [stop, "never said"]})
    found = own._answers(trainer(own, tmp_path / "two").evaluator.evaluate, "test")
    assert not any(stop in text for text in found)
    for text, before in zip(found, whole, strict=True):
        assert text == before.partition(stop)[0].strip()
    assert own._writer.contract["stop"] == [stop, "never said"]


def test_sampled_answers_are_always_the_same(data: Path, tmp_path: Path) -> None:
    def answers(temperature: float, drawn: int) -> list[str]:
        own = task(data, generation={"temperature": temperature, "max_new_tokens": 6})
        torch.rand(drawn)  # what else is drawn changes nothing
        evaluate = trainer(own, tmp_path / f"{temperature}-{drawn}").evaluator.evaluate
        return own._answers(evaluate, "validation")

    assert answers(1.0, 1) == answers(1.0, 2)
    assert answers(1.0, 3) != answers(0.0, 1)


def test_what_does_not_fit_loses_its_beginning_or_is_left_out(data: Path) -> None:
    whole, small = task(data), task(data, MODEL.model_copy(update={"context_length": 40}))
    kept = small._splits["train"]
    assert len(kept.kept) < len(whole._splits["train"].kept)
    assert kept.cut > 0
    assert (kept.lengths <= 40).all()
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    answers = load_texts(data, "test", "answer")
    test = small._splits["test"]
    for index, number in enumerate(test.kept):
        said = tokenizer.decode(test.answer(index), skip_special_tokens=True)
        assert said == answers[number].strip(), "the whole answer is there"
    with pytest.raises(UsageError, match=r"model.context_length: 1 tokens hold no whole answer of the train split"):
        task(data, MODEL.model_copy(update={"context_length": 1}))
    spec = study_class("instruction")(
        name="s", task="instruction", data=DataSpec(corpus="python_functions"), model={"context_length": 40}
    )
    long = too_long(spec, data)
    for split, own in small._splits.items():
        assert (long.cut[split], long.left_out[split]) == (own.cut, own.left_out)
    assert f"left out: {long.left_out['train']:,} train" in str(long)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(data: Path, tmp_path: Path) -> None:
    whole = curve_of(task(data), RUN, tmp_path / "whole")
    assert whole[-1].valid_loss < whole[0].valid_loss
    with pytest.raises(PreemptedError):
        curve_of(task(data), RUN, tmp_path / "first", stop_at=40)
    assert curve_of(task(data), RUN, tmp_path / "second", earlier=(tmp_path / "first",)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["auto", False])
def test_what_it_learns_it_writes_wherever_it_is_loaded(tmp_path: Path, packing: Any) -> None:
    for split, kinds in {"train": (0, 1, 2), "validation": (3,), "test": (4,)}.items():
        rows = [
            {"prompt": f"{asker}. The capital of land {land}?", "completion": f"City {land * 7}"}
            for asker in range(10)
            for land in range(8)
            if (asker + land) % 5 in kinds
        ]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    files = FileSplits(**{split: [str(tmp_path / f"{split}.jsonl")] for split in ("train", "validation", "test")})
    spec = study_class("instruction")(
        name="s", task="instruction", data=DataSpec(files=files), tokenizer=TokenizerSpec(vocab_size=300), folder=str(tmp_path)
    )  # fmt: skip
    own = task(Path(str(prepare(spec)[0])), packing=packing, objective="exact_match")
    run = RUN.model_copy(update={"num_epochs": 40, "batch_size": 8, "evaluations_per_epoch": 1})
    trained = trainer(own, tmp_path / "run", run, objective="exact_match")
    points = list(trained.points())
    assert trained.best is not None
    assert trained.best.valid_score == max(point.valid_score for point in points) > 0.7
    scored = trained.score()
    right = [sample["output"] == sample["reference"] for sample in scored.details["samples"]]
    assert {score.metric: score.value for score in scored.scores}["exact_match"] > 0.7
    assert any(right)
    trained.export()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    for sample in scored.details["samples"]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample["source"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == sample["output"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that begins every text with a token and ends turns with a mark of its own, without weights worth it."""
    folder = tmp_path_factory.mktemp("chat-model")
    template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
        " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template, begin="<bos>", end="<eos>")
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, bos_token_id=7, eos_token_id=8)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.slow
def test_a_chat_model_is_tuned_by_its_own_template(pretrained: Path, tmp_path: Path) -> None:
    rows = [{"messages": messages} for messages in conversations(120)]
    data = make(tmp_path, rows, model=ModelSettings(pretrained=str(pretrained)))
    card, parts = read_card(data), load_parts(data, "train")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    begin, turn_end = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    own = task(data, ModelSettings(pretrained=str(pretrained), context_length=160), loss_on="completion")
    tokens = np.load(data / "train-text.npy")
    assert (tokens[1:] == begin).sum() == card.documents["train"], "each conversation begins once"
    assert (tokens[1:][parts > 0] == begin).sum() == 0
    assert turn_end in own._writer._stops
    assert {card.end_id, turn_end} == {*own._writer._stops}
    for index in (0, 1, 2):
        answer = tokenizer.decode(own._splits["train"].answer(index))
        assert answer.endswith("<|im_end|>\n")
    other = make(
        tmp_path, rows, model=ModelSettings(pretrained=str(pretrained)),
        instruction=InstructionOptions(chat_template="{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"),
    )  # fmt: skip
    assert read_card(other).chat_template != card.chat_template
    InstructionDefinition().check_model(
        ModelSettings(pretrained=str(pretrained), context_length=160), InstructionOptions(packing="true"), card
    )


def test_labels_are_scored_as_classes(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(200)]
    options = {"labels": ["yes", "no"], "generation": {"max_new_tokens": 3}}
    own = task(make(tmp_path, rows, instruction=options), objective="f1", **options)
    truth = own._texts("test", "answer")
    names = ("f1", "f1_macro", "accuracy")
    said = ["yes", "maybe", *truth[2:]]  # of the first two, one at least is wrong
    found, contracts = own._judged(said, truth, names)
    for name, average in (("f1", "macro"), ("f1_macro", "macro")):
        theirs = f1_score(truth, said, labels=["yes", "no"], average=average, zero_division=0)
        assert own._scored(name, found, contracts[name]).value == pytest.approx(theirs, abs=1e-12)
    theirs = accuracy_score(truth, said)
    assert own._scored("accuracy", found, contracts["accuracy"]).value == pytest.approx(theirs, abs=1e-12)
    scored = own.score(trainer(own, tmp_path / "run").evaluator.evaluate)
    assert {"f1", "f1_macro", "f1_micro", "f1_weighted", "accuracy"} <= {score.metric for score in scored.scores}
    assert 0 <= own.validation_score(trainer(own, tmp_path / "two").evaluator.evaluate) <= 1
    with pytest.raises(DataError, match=r"line 201: the answer 'maybe' is none of instruction.labels: yes, no"):
        make(tmp_path, [*rows, {"prompt": "x", "completion": "maybe"}], instruction=options)


PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' + HEAD + m['content'] + FOOT }}"
    "{% else %}{{ '<|user|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("head", "foot", "answer"),
    [
        pytest.param("''", "''", "1", id="nothing ends it"),
        pytest.param("''", "'\\n### End\\n'", "yes", id="words end it"),
        pytest.param("'<|channel|>final<|message|>'", "'<|return|>'", "0", id="words begin it"),
        pytest.param("''", "'<|end|>'", "yes. sure", id="a stop text inside"),
        pytest.param("''", "'<|end|>'", "<think>\nhm\n</think>\n\nyes", id="thoughts"),
    ],
)
def test_a_model_that_says_what_it_should_is_right(tmp_path: Path, head: str, foot: str, answer: str) -> None:
    template = PLAIN.replace("HEAD", head).replace("FOOT", foot)
    tokenizer = tokenizer_with(template, end="<|return|>" if "return" in foot else "<eos>")
    tokenizer.save_pretrained(tmp_path / "model")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "model")
    model = ModelSettings(pretrained=str(tmp_path / "model"), context_length=64)
    rows = [{"prompt": f"Question {number}?", "completion": answer} for number in range(60)]
    stop = ["."] if "." in answer else []
    own = task(make(tmp_path, rows, model=model), model, generation={"stop": stop})
    test = own._splits["test"]
    said = [own._writer.texts(torch.from_numpy(test.answer(index))[None])[0] for index in range(len(test.kept))]
    wanted = answer.rpartition("</think>")[2].strip()
    assert own._texts("test", "answer") == [wanted] * len(said)
    assert said == [wanted.partition(".")[0]] * len(said)
    last = {tokenizer.decode([test.answer(index)[-1]]) for index in range(len(test.kept))}
    assert last <= {*map(tokenizer.decode, ([stop] for stop in own._writer._stops))}, "it learns to end"
    assert "<|message|>" not in map(tokenizer.decode, ([stop] for stop in own._writer._stops))


def test_how_a_pretrained_model_usually_generates_decides_nothing(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None, end="<eos>")
    tokenizer.save_pretrained(tmp_path / "model")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    given = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 3, "top_p": 0.5, "do_sample": True}
    model.generation_config.update(**given)
    model.save_pretrained(tmp_path / "model")
    settings = ModelSettings(pretrained=str(tmp_path / "model"), context_length=160)
    rows = [{"messages": messages} for messages in conversations(60)]
    own = task(make(tmp_path, rows, model=settings), settings)
    config = own.model.generation_config
    assert (config.do_sample, config.repetition_penalty, config.no_repeat_ngram_size, config.top_k) == (
        False,
        None,
        None,
        None,
    )
    assert own.model.get_input_embeddings().padding_idx is None, "every token is learnt"
    # Another token that ends texts is another text, though vocabulary and template are the same.
    other = tokenizer_with(None, end="<|im_end|>")
    other.save_pretrained(tmp_path / "model")
    load_tokenizer.cache_clear()
    assert own._card.fingerprint != read_card(make(tmp_path, rows, model=settings)).fingerprint
    for several in ({"tool_use": "x"}, {"default": "{{ messages }}"}):
        template = InstructionDefinition().chat_template
        if "default" in several:
            assert template(InstructionOptions(), several, begins=False) == "{{ messages }}"
        else:
            with pytest.raises(DataError, match="chat templates called tool_use and none called default"):
                template(InstructionOptions(), several, begins=False)


def test_nulls_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"Question {number}?", "completion": "yes"} for number in range(60)]
    rows[7]["completion"] = None
    rows[9]["prompt"] = []
    rows[11]["prompt"] = ""
    card = read_card(make(tmp_path, rows))
    assert {reason.partition(": ")[2]: count for reason, count in card.unusable.items()} == {
        "an empty message (assistant)": 1,
        "roles out of order (assistant first)": 1,
        "an empty message (user)": 1,
    }
    chats: list[Any] = [{"meta": {"chat": messages}} for messages in conversations(60)]
    chats[3]["meta"]["chat"] = None
    card = read_card(make(tmp_path, chats, data={"column": "meta.chat"}, name="chats.jsonl"))
    assert [*card.unusable.values()] == [1]
    assert "no messages" in next(iter(card.unusable))


def test_what_is_scored_of_a_cut_conversation_is_what_is_left_of_it(data: Path, tmp_path: Path) -> None:
    ratios = []
    for length in (600, 60):
        own = task(data, MODEL.model_copy(update={"context_length": length, "init_std": 0.02}))
        examples = own._nats(trainer(own, tmp_path / str(length)).evaluator.evaluate)
        ratios.append(examples["tokens"].sum() / examples["bytes"].sum())
    assert ratios[0] == pytest.approx(ratios[1], rel=0.15), "as many bytes to a token"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("llama", (True, True)), ("gpt2", (True, True)), ("bart", (True, False)), ("jamba", (False, None))],
)
def test_what_an_architecture_can_do_is_tried(architecture: str, expected: tuple[bool, bool | None]) -> None:
    settings = MODEL.model_copy(update={"architecture": architecture, "init_std": None, "context_length": 64})
    seed_everything(0)
    model = build_model(AutoModelForCausalLM, settings, vocab_size=300)
    found = how_it_generates(model)
    assert found.use_cache is expected[0]
    assert expected[1] is None or found.pads is expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bart", "jamba"])
def test_answers_are_those_of_prompts_by_themselves_whatever_an_architecture_can_do(
    data: Path, tmp_path: Path, architecture: str
) -> None:
    model = MODEL.model_copy(update={"architecture": architecture, "init_std": None})
    own = task(data, model, generation={"max_new_tokens": 4})
    evaluate = trainer(own, tmp_path / "one").evaluator.evaluate
    assert own._answers(evaluate, "test") == one_by_one(own, tmp_path / "two", "test")


def test_architectures_that_cannot_keep_conversations_apart_are_padded(data: Path) -> None:
    bloom = MODEL.model_copy(update={"architecture": "bloom", "init_std": None})
    own = task(data, bloom)
    assert own.num_examples["train"] == len(own._splits["train"].kept)
    definition, card = InstructionDefinition(), read_card(data)
    definition.check_model(bloom, InstructionOptions(), card)
    with pytest.raises(UsageError, match=r"instruction.packing: models of type bloom .* packing: auto trains them"):
        definition.check_model(bloom, InstructionOptions(packing="true"), card)


OBJECTIVES = """
name: {objective}
task: instruction
data: {{files: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}}}
tokenizer: {{vocab_size: 300}}
model: {{architecture: llama, hidden_size: 32, num_heads: 2, num_layers: 2, context_length: 64, init_std: 0.2}}
training: {{learning_rate: 0.01, num_epochs: 1, evaluations_per_epoch: 1}}
instruction: {{packing: false, generation: {{max_new_tokens: 16}}}}
search: {{batch_size: [8, 64]}}
enqueue: [{{batch_size: 8}}, {{batch_size: 64}}]
objective: {objective}
metric: {metric}
budget: {{trials: 2}}
prune: {{overfit: false, unpromising: none}}
resources: {{gpus_per_trial: 0}}
backend: inline
"""


@pytest.mark.slow
def test_another_objective_finds_another_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the answers follow from their prompts and half are drawn by lot, each of these learnt sixty times: the
    longer a model trains, the better it answers, and the surer it is of what nobody can know."""
    draw = random.Random(0)
    for split, kinds in {"train": (0, 1, 2), "validation": (3,), "test": (4,)}.items():
        rows = [
            {"prompt": f"{asker}. The capital of land {land}?", "completion": f"City {land * 7}"}
            for asker in range(100 if split == "train" else 20)
            for land in range(8)
            if (asker + land) % 5 in kinds
        ]
        for number in range(30):
            lot = " ".join(str(draw.randrange(10)) for _ in range(6))
            times = range(60 if split == "train" else 1)
            rows += [{"prompt": f"Draw {split[0]}{number} ({time})", "completion": lot} for time in times]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    winners = {}
    for objective, metric in (("loss", "perplexity"), ("rouge_l", "rouge_l")):
        file = tmp_path / f"{objective}.yaml"
        file.write_text(
            f"{OBJECTIVES.format(objective=objective, metric=metric)}store: sqlite:///s.db\nfolder: {tmp_path}/runs\n"
        )
        board = hpsearch.launch(file).board()
        assert board.metric == metric
        winners[objective] = board.rows[0].params["batch_size"]
        chosen = min(board.rows, key=lambda row: row.valid_loss if objective == "loss" else -row.valid_score)
        assert chosen.params["batch_size"] == winners[objective], "validation says so, too"
    assert winners == {"loss": 64, "rouge_l": 8}
    assert len(hpsearch.rank("loss", "rouge_l", store="sqlite:///s.db").rows) == 4
    with sqlite3.connect("s.db") as store:  # as studies without labels have none of labels
        of_loss = (
            "SELECT t.id FROM hpsearch_trials t JOIN hpsearch_studies s ON s.id = t.study_id WHERE s.name = 'loss'"
        )
        store.execute(f"DELETE FROM hpsearch_scores WHERE metric = 'rouge_l' AND trial_id IN ({of_loss})")
    with pytest.raises(
        UsageError, match="'rouge_l' is ranked by rouge_l, and 'loss', ranked by perplexity, has no such"
    ):
        hpsearch.rank("rouge_l", "loss", store="sqlite:///s.db")
    shown = hpsearch.show("rouge_l", 0, store="sqlite:///s.db").details
    assert {*shown["samples"][0]} == {"source", "reference", "output"}
    assert shown["generation"]["answers"] == len(shown["outputs"])
    page = hpsearch.report("rouge_l", store="sqlite:///s.db")
    for sample in shown["samples"]:
        assert sample["source"] in page
        assert sample["reference"] in page
