"""Preparing a corpus, beside a plain `datasets` and `tokenizers` pipeline that does the same work.

    python benchmarks/data.py [--mb N ...]

Both read the same generated JSON lines, drop repeated texts, split them by a hash, train a byte-pair tokenizer of 8,000
entries on a sample of 100 MB, tokenize all of it and write 16-bit tokens. The plain one does so as the documentation of
`datasets` has it: `load_dataset`, `filter` and `map` in batches, with a process for each core, and the hashes of all
texts in a set. Ours also normalises white space before it compares, measures leakage, hashes what it made, and is
continued after a kill. Each run is a process of its own; peak memory is that of the process and its children together.

Then: what a second launch waits for its data, by the size of the corpus, and what a training process holds of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import record

CORES = len(os.sched_getaffinity(0))
VOCABULARY = 8_000
SAMPLE_BYTES = 100_000_000
STUDY = """
name: data
task: causal_lm
data: {{files: {file}}}
tokenizer: {{vocab_size: {vocabulary}}}
model: {{hidden_size: 32, num_layers: 1, num_heads: 2, context_length: 256}}
search: {{learning_rate: {{min: 1e-4, max: 1e-2, scale: log}}}}
"""


def generate(file: Path, megabytes: int) -> None:
    """Documents of words that are drawn as often as words of a language are; one in twenty stands there twice."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 10))) for _ in range(200_000)]
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    size = 0
    with file.open("w") as lines:
        while size < megabytes * 1_000_000:
            line = json.dumps({"text": " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(50, 700)))})
            for _ in range(1 + (draw.random() < 0.05)):
                lines.write(line + "\n")
                size += len(line) + 1


def ours(file: Path, folder: Path) -> dict[str, Any]:
    from hpsearch.data.prepare import prepare

    began = time.monotonic()
    card = prepare(study(file, folder))[1]
    return {"seconds": time.monotonic() - began, "tokens": sum(card.tokens.values())}


def study(file: Path, folder: Path) -> Any:
    from hpsearch.spec.load import load_study

    written = folder / "study.yaml"
    written.write_text(STUDY.format(file=file, vocabulary=VOCABULARY))
    return load_study(written, folder=str(folder / "runs"))


def plain(file: Path, folder: Path) -> dict[str, Any]:
    import hashlib

    import datasets
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel
    datasets.disable_progress_bars()
    began = time.monotonic()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))

    def digests(batch: dict[str, list[str]]) -> dict[str, list[bytes]]:
        return {"hash": [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in batch["text"]]}

    rows = rows.map(digests, batched=True, num_proc=CORES)
    seen: set[bytes] = set()

    def is_new(batch: dict[str, list[bytes]]) -> list[bool]:
        new = []
        for digest in batch["hash"]:
            new.append(digest not in seen)
            seen.add(digest)
        return new

    rows = rows.filter(is_new, batched=True, input_columns=None)
    share = min(1.0, SAMPLE_BYTES / file.stat().st_size)

    def texts() -> Any:
        for batch in rows.iter(1000):
            yield [t for t, h in zip(batch["text"], batch["hash"], strict=True) if h[1] < 256 * share and h[0] >= 52]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer.train_from_iterator(texts(), trainer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    saved = tokenizer.to_str()

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        own = loaded(saved)
        return {
            "ids": [[*encoding.ids, 0] for encoding in own.encode_batch_fast(batch["text"])],
            "split": [(digest[0] >= 26) + (digest[0] >= 52) for digest in batch["hash"]],
        }

    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16")), "split": datasets.Value("uint8")})
    rows = rows.map(encode, batched=True, num_proc=CORES, remove_columns=["text", "hash"], features=features)
    tokens = 0
    files = [(folder / f"{split}.bin").open("wb") for split in range(3)]
    for batch in rows.with_format("numpy").iter(1000):
        for split in range(3):
            own = [ids for ids, place in zip(batch["ids"], batch["split"], strict=True) if place == split]
            if own:
                joined = np.concatenate(own).astype(np.uint16)
                joined.tofile(files[split])
                tokens += len(joined)
    for written in files:
        written.close()
    return {"seconds": time.monotonic() - began, "tokens": tokens}


@cache
def loaded(saved: str) -> Any:
    """A tokenizer, once in each process."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(saved)


def again(file: Path, folder: Path) -> dict[str, Any]:
    """What a second launch waits for its data, all imports aside."""
    import hpsearch.data.prepare as preparing

    spec = study(file, folder)
    began = time.monotonic()
    preparing.prepare(spec)
    return {"seconds": time.monotonic() - began}


def trained(file: Path, folder: Path) -> dict[str, Any]:
    """What a process holds of the data when it has read batches from everywhere in it."""
    import numpy as np

    from hpsearch.data.prepare import prepare
    from hpsearch.spec.settings import ModelSettings
    from hpsearch.tasks.causal_lm.training import CausalLM

    data = prepare(study(file, folder))[0]
    process = psutil.Process()
    settings = ModelSettings(hidden_size=32, num_layers=1, num_heads=2, context_length=256, architecture="gpt2")
    before = process.memory_full_info().uss
    task = CausalLM(Path(str(data)), settings)
    batches = task.epoch_batches(np.random.default_rng(0), 64)
    for indices in batches[:: max(1, len(batches) // 500)]:
        task.batch("train", indices)
    return {"megabytes": (process.memory_full_info().uss - before) / 1e6, "batches": len(batches)}


STEPS = {"ours": ours, "plain": plain, "again": again, "trained": trained}


def measured(step: str, file: Path, folder: Path) -> dict[str, Any]:
    """Run a step in a process; its result, and the most memory that it and its children held at once."""
    command = [sys.executable, __file__, "--step", step, "--file", str(file), "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _held(process.pid))
            time.sleep(0.5)  # each look reads the maps of all processes, which takes some milliseconds of them

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{step} failed")
    return {**json.loads(output.splitlines()[-1]), "peak_mb": peak / 1e6}


def _held(pid: int) -> int:
    """Resident memory of a process and its children; what they share counts once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # it has just ended
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[10, 200, 2000], help="sizes of the corpora")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step](given.file, given.folder)))
        return
    results = []
    print("corpus MB  who     seconds  peak MB   million tokens", flush=True)
    for megabytes in given.mb:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "corpus.jsonl"
            generate(file, megabytes)
            found: dict[str, Any] = {"megabytes": megabytes}
            for who in ("plain", "ours"):
                folder = Path(scratch) / who
                folder.mkdir()
                found[who] = measured(who, file, folder)
                row = found[who]
                print(
                    f"{megabytes:9d}  {who:6s} {row['seconds']:8.1f} {row['peak_mb']:8.0f} {row['tokens'] / 1e6:10.1f}",
                    flush=True,
                )
            for step in ("again", "trained"):
                found[step] = measured(step, file, Path(scratch) / "ours")
            found["time_ratio"] = found["ours"]["seconds"] / found["plain"]["seconds"]
            print(
                f"           time ratio {found['time_ratio']:.2f}; a second launch has its data in "
                f"{found['again']['seconds'] * 1000:.0f} ms; a training process holds "
                f"{found['trained']['megabytes']:.0f} MB of it",
                flush=True,
            )
            results.append(found)
    record.keep("data", "datasets", "tokenizers", "pyarrow", cores=CORES, results=results)


if __name__ == "__main__":
    main()
