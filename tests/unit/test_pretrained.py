"""What comes with a pretrained folder is looked at before any trial runs on it, and none of its code is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import hpsearch
from hpsearch.data import pretrained
from hpsearch.data.shards import load_split, read_card
from hpsearch.data.tokenizers import train_tokenizer
from hpsearch.errors import UsageError
from hpsearch.records import TrialConfig
from hpsearch.spec.load import load_study
from hpsearch.spec.task import task_named

LINES = [f"line {number} of text" for number in range(99)]
STUDY = (
    "name: s\ntask: causal_lm\ndata: {files: text.txt}\nmodel: {pretrained: model, context_length: 8}\n"
    "training: {num_epochs: 1, evaluations_per_epoch: 1}\nbudget: {trials: 1}\nbackend: inline\n"
)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a tiny GPT, saved in shards."""
    folder = tmp_path_factory.mktemp("gpt")
    (folder / "text.txt").write_text("\n\n".join(LINES))
    (folder / "study.yaml").write_text(STUDY + f"store: sqlite:///{folder}/store.db\nfolder: {folder}/runs\n")
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=300, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "model", max_shard_size="10KB")
    train_tokenizer(LINES, 300).save(str(folder / "model/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "model/tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def study(gpt: Path, tmp_path: Path) -> Path:
    shutil.copytree(gpt, tmp_path, dirs_exist_ok=True)
    return tmp_path / "study.yaml"


def refusals(study: Path) -> list[str]:
    """What `check` and a launch say."""
    found = []
    for call in (lambda: hpsearch.check(study), lambda: hpsearch.launch(study)):
        with pytest.raises(UsageError) as error:
            call()
        pretrained.locate.cache_clear()
        pretrained.load_tokenizer.cache_clear()
        found.append(str(error.value))
    assert not (study.parent / "store.db").exists(), "no trial was begun"
    return found


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def without_a_tensor(folder: Path) -> None:
    first, second = shards(folder)[:2]
    shutil.copy(first, second)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 440449768\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: shards(folder)[1].write_text(POINTER), "model-00002-of-00003.safetensors is a Git LFS pointer"),
        (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git LFS pointer"),
        (lambda folder: cut(shards(folder)[1], -100), "model-00002-of-00003.safetensors is no whole safetensors file"),
        (lambda folder: cut(shards(folder)[1], 30), "model-00002-of-00003.safetensors is no whole safetensors file (30 b"),
        (lambda folder: cut(shards(folder)[1], 0), "model-00002-of-00003.safetensors is no whole safetensors file (0 b"),
        (lambda folder: shards(folder)[1].unlink(), "model-00002-of-00003.safetensors is missing"),
        (without_a_tensor, "which model.safetensors.index.json says it has"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor model.s"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "names no weights (weight_map)"),
    ],
)  # fmt: skip
def test_weights_that_are_not_all_there_are_refused_before_any_trial(
    study: Path, make: Callable[[Path], object], message: str
) -> None:
    make(study.parent / "model")
    for refusal in refusals(study):
        assert message in refusal


def with_code(folder: Path, file: str, **settings: object) -> None:
    """Name code in a settings file; what is imported of it leaves a trace."""
    (folder / "custom.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {name: ["custom.Own", "custom.Own"] if name == "AutoTokenizer" else "custom.Own" for name in names}
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": auto_map, **settings}))


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked anything."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("config.json", {"model_type": "own"}, "transformers does not know ('own'): the auto_map of its config.json"),
        ("config.json", {"model_type": None}, "the auto_map of its config.json names code of its own"),
        ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer"}, "the auto_map of its tokenizer_config.json"),
    ],
)
def test_code_of_a_model_is_never_run(study: Path, file: str, settings: dict[str, object], message: str) -> None:
    folder = study.parent / "model"
    with_code(folder, file, **settings)
    if file == "tokenizer_config.json":
        (folder / "tokenizer.json").rename(folder / "vocab.own")
    for refusal in refusals(study):
        assert message in refusal
    assert not (folder / "ran").exists()


@pytest.mark.usefixtures("nobody")
def test_a_model_that_transformers_knows_is_used_without_the_code_beside_it(study: Path) -> None:
    folder = study.parent / "model"
    for file in ("config.json", "tokenizer_config.json"):
        with_code(folder, file)
    launched = hpsearch.launch(study)
    assert [trial.state for trial in launched.trials()] == ["completed"]
    assert not (folder / "ran").exists()
    assert launched.best is not None
    assert "auto_map" not in json.loads((Path(launched.best.checkpoint) / "config.json").read_text())


def with_begin(folder: Path) -> None:
    """Make the tokenizer one that puts a token of its own before every text, as Llama's do."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=320, n_positions=16, bos_token_id=begin)
    for file in folder.glob("model*"):
        file.unlink()
    GPT2LMHeadModel(config).save_pretrained(folder)


def test_texts_begin_as_the_model_was_trained_and_the_beginning_is_not_predicted(study: Path) -> None:
    with_begin(study.parent / "model")
    pretrained.load_tokenizer.cache_clear()
    place, store = study.parent / "begun", f"sqlite:///{study.parent}/begun.db"
    found = hpsearch.launch(study, store=store, folder=str(place), overrides=["model.context_length=16"])
    (trial,) = found.trials()
    assert trial.state == "completed"
    folder = next(entry for entry in (place / "data").iterdir() if entry.name != "sources")
    card, test = read_card(folder), load_split(folder, "test")
    assert card.begin_id is not None
    starts = [0, *test.document_ends[:-1].tolist()]
    assert [int(test.tokens[1 + start]) for start in starts] == [card.begin_id] * len(starts)
    assert card.tokens["test"] == len(test.tokens) - 1 - len(starts)
    whole = found.trial(trial.number)
    built = task_named("causal_lm").build(
        TrialConfig.model_construct(data=str(folder), model=load_study(study).settings_for({})[0])
    )
    predicted = sum(built.predicted("test", batch) for batch in built.evaluation_batches("test"))
    assert predicted == card.tokens["test"]
    (perplexity,) = [score for score in whole.scores if score.metric == "perplexity"]
    assert perplexity.n == len(starts)
