"""Every architecture that transformers registers for a task, through all that a trial does.

    python -m tests.integration.test_architectures OUT.jsonl [--task causal_lm] [--only roberta,bert] [--default-size]

Each runs in a child process with limits on time and memory. It is `refused` (by a message, before the trial) or `ok` (it
trains, is scored, exported and read again); or something is wrong: `error` (in a trial that `check` let through),
`non-causal`, `blind`, `different` (losses or weights are not what transformers computes). `too large` and `timeout` are
limits of the sweep. Writes what became of each as a line of JSON, and prints the lists of docs/architectures.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from hpsearch.data.prepare import prepare
from hpsearch.data.shards import read_card
from hpsearch.errors import UsageError
from hpsearch.models import architecture
from hpsearch.models.kernels import decode_greedily
from hpsearch.records import TrialConfig
from hpsearch.spec.sections import DataSpec, TokenizerSpec
from hpsearch.spec.settings import ModelSettings, RunSettings
from hpsearch.spec.study import StudySpec
from hpsearch.spec.task import task_named
from hpsearch.training.random_states import seed_everything
from hpsearch.training.trainer import Trainer

AUTO: dict[str, Any] = {
    "causal_lm": auto.AutoModelForCausalLM,
    "classification": auto.AutoModelForSequenceClassification,
    "translation": auto.AutoModelForSeq2SeqLM,
}
REGISTERED: dict[str, list[str]] = {
    "causal_lm": list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "classification": list(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "translation": list(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
LENGTH = 16
TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "context_length": LENGTH}
"""All else is as a study that names nothing but the architecture has it."""
DEFAULT = {"context_length": LENGTH}
RUN = RunSettings(batch_size=8, num_epochs=1, evaluations_per_epoch=1, optimizer="muon", weight_average=0.1)
MOST_PARAMETERS = 50_000_000
MOST_BYTES = 12 * 2**30
TIMEOUT_S = 30.0


@dataclass
class Outcome:
    task: str
    architecture: str
    status: str = "crash"
    stage: str = "start"
    message: str = ""
    where: str = ""
    """The innermost line of hpsearch or transformers that raised."""
    parameters: int = 0
    is_chunked: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class WrongError(Exception):
    """A trial runs, yet computes something else than it should."""


def make_data(task: str, folder: Path) -> Path:
    """Prepared data of a task: texts of 2 to 40 tokens, so that batches are padded, and full, and cut."""
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "all", "day", "long"]

    def text(number: int) -> str:
        return f"{number} " + " ".join(rng.choice(words, 1 + number % 12))

    rows: list[dict[str, Any]] = []
    for number in range(60):
        row = {
            "causal_lm": {"text": text(number)},
            "classification": {"text": text(number), "label": "abc"[number % 3]},
            "translation": {"source": text(number), "target": text(number).upper()},
        }
        rows.append(row[task])
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = StudySpec(
        name="sweep",
        task=task,
        data=DataSpec(files=str(file)),
        tokenizer=TokenizerSpec(vocab_size=300),
        folder=str(folder / "runs"),
    )
    return Path(str(prepare(spec)[0]))


def outcome(task: str, name: str, data: Path, folder: Path, shape: dict[str, int]) -> Outcome:
    """What becomes of a trial with this architecture."""
    found = Outcome(task, name)
    try:
        _go_through(found, data, folder, shape)
        found.status = "ok"
    except UsageError as error:
        found.status, found.message = "refused", _line(error)
    except WrongError as error:
        found.status, _, found.message = str(error).partition(": ")
    except Exception as error:
        found.status, found.message, found.where = "error", _line(error), _where(error)
    return found


def _go_through(found: Outcome, data: Path, folder: Path, shape: dict[str, int]) -> None:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        found.stage = name
        began = time.perf_counter()
        try:
            yield
        finally:
            found.seconds[name] = round(time.perf_counter() - began, 3)

    task, auto_class = found.task, AUTO[found.task]
    settings = ModelSettings(architecture=found.architecture, **shape)
    with stage("size"):
        found.parameters = _count(auto_class, settings, task, data)
        if found.parameters > MOST_PARAMETERS:
            raise WrongError(f"too large: {found.parameters / 1e6:.0f} million weights")
    with stage("check"):
        task_named(task).check_model(settings, read_card(data))
    with stage("check again"):
        task_named(task).check_model(settings, read_card(data))
    config = TrialConfig(
        study="sweep", number=0, task=task, seed=0, params={}, model=settings, training=RUN, rule=None,
        data=str(data), folder=str(folder),
        threads=1,
    )  # fmt: skip
    seed_everything(0)
    with stage("build"):
        trial = task_named(task).build(config)
        found.parameters = sum(parameter.numel() for parameter in trial.model.parameters())
    with stage("losses"):
        trial.model.train()
        indices = np.argsort(getattr(trial, "_lengths", lambda split: np.zeros(8))("train"), kind="stable")[[0, -1]]
        trial.losses(trial.batch("train", indices)).sum().backward()
        trial.model.zero_grad()
    with stage("train"):
        folder.mkdir(exist_ok=True)
        (folder / "pulse.json").touch()  # as a worker has it: `export` refuses a folder that was emptied
        trainer = Trainer(trial, RUN, seed=0, device=torch.device("cpu"), folder=folder)
        before = [parameter.detach().clone() for parameter in trial.model.parameters()]
        points = list(trainer.points())
        found.facts["valid_loss"] = round(points[-1].valid_loss, 3)
        still = sum(
            old.numel() for old, now in zip(before, trial.model.parameters(), strict=True) if torch.equal(old, now)
        )
        found.facts["untrained"] = round(still / found.parameters, 3)
        if trainer.best is None:
            raise WrongError("different: the validation loss is not finite")
    with stage("score"):
        trainer.score()
    trial.model.eval()
    loss = getattr(trial, "_loss", None)
    if loss is not None:
        found.is_chunked = loss.is_chunked
        with stage("kernels"):
            _compare_kernels(found, trial)
    if task == "causal_lm":
        with stage("causality"):
            _look_for_the_future(found, trial.model)
    else:
        with stage("padding"):
            _pad(found, trial, task)
    with stage("export"):
        trainer.export()
    with stage("reload"), torch.no_grad():
        again = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
        batch = trial.batch("test", np.arange(4))
        wanted, loss_model = trial.losses(batch), trial.model
        trial.model = again
        if loss is not None:
            trial._loss._model, head = again, trial._loss._head
            trial._loss._head = again.get_output_embeddings() if head is not None else None
        got = trial.losses(batch)
        trial.model = loss_model
        _same(found, "reload", got, wanted)


def _count(auto_class: Any, settings: ModelSettings, task: str, data: Path) -> int:
    """Weights of the model; none are allocated."""
    card = read_card(data)
    tokens: dict[str, Any] = {"vocab_size": card.vocab_size}
    if task == "classification":
        from hpsearch.tasks.classification.training import _tokens

        tokens = _tokens(card)
    elif task == "translation":
        from hpsearch.tasks.translation.training import _tokens as pair_tokens

        tokens = pair_tokens(settings, card)
    config = architecture.build_config(auto_class, settings, **tokens)
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except Exception:
        return 0  # check_model must say so
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _compare_kernels(found: Outcome, trial: Any) -> None:
    """Losses and decoded text must be what transformers computes the plain way."""
    batch = trial.batch("train", np.arange(8))
    losses = trial.losses(batch)
    head, trial._loss._head = trial._loss._head, None
    _same(found, "losses", losses, trial.losses(batch))
    trial._loss._head = head
    if found.task != "translation" or not trial._decodes_greedily:
        return
    source = batch.tensors[0]
    is_text = (source != trial._padding).long()
    ours = decode_greedily(trial.model, source, is_text, LENGTH)
    theirs = trial.model.generate(
        input_ids=source, attention_mask=is_text, num_beams=1, do_sample=False, max_length=LENGTH
    )
    found.facts["decodes"] = "greedily"
    width = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (functional.pad(ids, (0, width - ids.shape[1]), value=trial._padding) for ids in (ours, theirs))
    if not torch.equal(ours, theirs):
        raise WrongError(f"different: decode_greedily gives {ours[0].tolist()}, generate {theirs[0].tolist()}")


@torch.no_grad()
def _look_for_the_future(found: Outcome, model: Any) -> None:
    """Logits must not change with later tokens, and must change with their own."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, min(250, model.config.get_text_config().vocab_size), (1, LENGTH), generator=generator)
    plain = model(input_ids=ids, use_cache=False).logits.double()
    scale = plain.std().item() or 1.0
    seen, leaks = 0.0, 0.0
    for position in (0, LENGTH // 2, LENGTH - 2):
        other = ids.clone()
        other[:, position + 1 :] = torch.randint(2, 250, (1, LENGTH - position - 1), generator=generator)
        other[:, position + 1] = ids[:, position + 1] ^ 1
        change = (model(input_ids=other, use_cache=False).logits.double() - plain).abs() / scale
        leaks = max(leaks, change[:, : position + 1].max().item())
        seen = max(seen, change[:, position + 1 :].max().item())
    found.facts |= {"leak": leaks, "seen": seen}
    if leaks > 1e-4:
        raise WrongError(f"non-causal: logits change by {leaks:.2g} of their deviation with later tokens")
    if seen < 1e-4:
        raise WrongError("blind: logits do not change with the tokens before them")


@torch.no_grad()
def _pad(found: Outcome, trial: Any, task: str) -> None:
    """An example's loss must not depend on how far it is padded."""
    order = np.argsort(trial._lengths("train"), kind="stable")
    alone = trial.losses(trial.batch("train", order[:1]))
    beside = trial.losses(trial.batch("train", order[[0, -1]]))[:1]
    if task == "translation":
        beside = beside[:, : alone.shape[1]]
    change = (alone - beside).abs().max().item() / alone.abs().max().item()
    found.facts["padding"] = change


def _same(found: Outcome, what: str, got: Tensor, wanted: Tensor) -> None:
    change = (got - wanted).abs().max().item() / max(1e-6, wanted.abs().max().item())
    found.facts[what] = change
    if not change < 1e-3:
        raise WrongError(f"different: {what} differ by {change:.2g}")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    start = f"{type(error).__name__}: " if not isinstance(error, UsageError) else ""
    return start + (lines[0] if lines else "")[:300]


def _where(error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/transformers/" in frame.filename or "/hpsearch/" in frame.filename or "sweep" in frame.filename
    ]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in reversed(frames[-3:]))


def _child(pipe: Any, task: str, name: str, data: Path, shape: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    warnings.simplefilter("ignore")
    logging.set_verbosity(50)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    began = time.perf_counter()
    try:
        found = outcome(task, name, data, folder, shape)
        found.seconds["total"] = round(time.perf_counter() - began, 2)
        pipe.send(asdict(found))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def guarded(task: str, name: str, data: Path, shape: dict[str, int] = TINY) -> dict[str, Any]:
    """`outcome` in a forked child, which may hang or be killed."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(there, task, name, data, shape))
    child.start()
    there.close()
    found = asdict(Outcome(task, name))
    try:
        if here.poll(TIMEOUT_S):
            found = here.recv()
        else:
            found["status"] = "timeout"
    except EOFError:
        found["message"] = "the process died"
    child.join(1.0)
    if child.is_alive():
        child.kill()
        child.join()
    return found


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {task: make_data(task, folder) for task in AUTO}


@pytest.mark.nightly
@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in REGISTERED.items() for name in names])
def test_what_check_model_lets_through_trains(task: str, name: str, prepared: dict[str, Path]) -> None:
    found = guarded(task, name, prepared[task])
    if found["status"] in ("too large", "timeout"):
        pytest.skip(f"{found['status']}: {found['message']}")
    assert found["status"] in ("ok", "refused"), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=list(AUTO), action="append")
    parser.add_argument("--only", default="")
    parser.add_argument("--default-size", action="store_true", help="the sizes of a study that says nothing of them")
    given = parser.parse_args()
    only = set(filter(None, given.only.split(",")))
    folder = Path(tempfile.mkdtemp(prefix="sweep-data-"))
    importlib.import_module("sklearn.metrics")  # once, before the forks
    names: dict[tuple[str, str], list[str]] = {}
    with given.out.open("w") as out:
        for task in given.task or AUTO:
            data = make_data(task, folder)
            for name in REGISTERED[task]:
                if only and name not in only:
                    continue
                found = guarded(task, name, data, DEFAULT if given.default_size else TINY)
                out.write(json.dumps(found) + "\n")
                out.flush()
                names.setdefault((task, found["status"]), []).append(name)
    for (task, status), listed in sorted(names.items()):
        print(f"\n## {task}: {status} ({len(listed)})\n\n{', '.join(listed)}")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
