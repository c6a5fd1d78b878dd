"""Tables of our own: random settings of a study's space, trained to the end by our trainer, with nothing pruned.

    python benchmarks/live.py FOLDER [--runs N] [--only WORD ...]

For each of two example studies, with its number of epochs set (runs of one table must be comparable) and its learning
rates decaying by a cosine as they do by default, FOLDER gets a live_NAME.json.gz that `benchmarks/search.py` and
`benchmarks/verdict.py` read beside the published tables (`benchmarks/curves.py`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path

import hpsearch

STUDIES = Path(__file__).parent.parent / "studies"
EPOCHS = {"lm.yaml": 12, "classification.yaml": 6}


def train(file: str, runs: int, seed: int) -> list[dict[str, object]]:
    """Settings, training and validation losses of each run that ended."""
    with tempfile.TemporaryDirectory(prefix="hps-live-") as place:
        overrides = [
            f"seed={seed}",
            f"search.num_epochs={EPOCHS[file]}",
            "sampler=random",
            "prune={overfit: false, unpromising: none}",
            "limits.keep_checkpoints=1",
        ]
        study = hpsearch.launch(
            STUDIES / file,
            trials=runs,
            overrides=overrides,
            store=f"sqlite:///{place}/live.db",
            folder=f"{place}/runs",
        )
        curves = []
        for row in study.trials():
            points = study.trial(row.number).points
            if row.state == "completed":
                # Published tables have the untrained model first.
                curves.append(
                    {
                        "hp": row.params,
                        "cosine": True,
                        "train": {"loss": [None, *(point.train_loss for point in points)]},
                        "valid": {"loss": [None, *(point.valid_loss for point in points)]},
                    }
                )
        return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="studies whose files hold one of these")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for file in EPOCHS:
        if options.only and not any(word in file for word in options.only):
            continue
        curves = train(file, options.runs, options.seed)
        if not curves:
            continue
        target = options.folder / f"live_{Path(file).stem}.json.gz"
        with gzip.open(target, "wt") as stream:
            json.dump(curves, stream)
        print(f"{target}: {len(curves)} runs")


if __name__ == "__main__":
    main()
