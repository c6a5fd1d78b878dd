"""One study, trial or check in words: what `status`, `show` and `check` print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from rich.console import Group
from rich.text import Text

from hpsearch.cli.output import new_table
from hpsearch.errors import plain
from hpsearch.records import UNFINISHED
from hpsearch.reports.text import (
    counts,
    curve_plot,
    score_text,
    short,
    trial_facts,
)
from hpsearch.results.status import StudyStatus
from hpsearch.spec.settings import FIXED_BY_PRETRAINED, FOR_PRETRAINED
from hpsearch.store.rows import WholeTrial


def log_line(line: dict[str, Any]) -> str:
    """One line of a trial's log for a person: time (UTC), attempt, what was said."""
    level = "" if line["level"] == "info" else f"{line['level']}: "
    said = f"{line['time'][:19].replace('T', ' ')}  {line['attempt']}  {level}{line['message']}"
    more = [f"    {text}" for text in line.get("traceback", "").splitlines()]
    return "\n".join(plain(text) for text in [said, *more])


def status_report(found: StudyStatus) -> str:
    """How far a study is, for a person."""
    best, left = found.best, found.seconds_left
    ended = sum(count for state, count in found.states.items() if state not in UNFINISHED)
    lines = [
        f"study   {found.study} in {found.store}",
        f"trials  {counts(found.states) or 'none yet'}; {ended} of {found.budget} have ended",
        f"best    {found.metric} {score_text(found.metric, best.score)} (trial {best.trial})"
        if best
        else "best    none can be ranked yet",
    ]
    if found.holder:
        lines.append(
            f"driver  {found.holder} since {found.since:%Y-%m-%d %H:%M:%S} UTC, "
            f"last sign of life {found.heartbeat_at:%H:%M:%S}"
        )
    else:
        lines.append("driver  none: " + ("it is finished" if found.is_finished else "launch it to resume"))
    if left is not None:
        lines.append(f"left    about {left / 60:.0f} minutes" if left >= 90 else f"left    about {left:.0f} seconds")
    return "\n".join(plain(line) for line in lines)


def check_report(found: dict[str, Any]) -> str:
    """What `check` found, for a person."""
    study, data = found["study"], found["data"]
    size = "infinite (a range is continuous)" if found["space_size"] is None else f"{found['space_size']:,.0f}"
    lines = [
        f"study        {study['name']} ({study['task']})",
        f"searches     {', '.join(found['dimensions']) or 'nothing: every setting is fixed'}",
        f"space        {size} settings; {study['budget']['trials']} trials by {study['sampler']['name']}",
        f"fixed        {_fixed(found['fixed'], {})}",
        f"pruning      overfit {'on' if study['prune']['overfit'] else 'off'}, "
        f"unpromising by {study['prune']['unpromising']['rule']}; "
        f"{found['evaluations_per_epoch']} evaluations per epoch",
    ]
    for index, params in enumerate(found["first_settings"]):
        label = "first tries" if index == 0 else ""
        lines.append(f"{label:<12} {', '.join(f'{name}={short(value)}' for name, value in params.items())}")
    if data:
        lines += [
            f"data         {data['documents']['train']:,} / {data['documents']['validation']:,} / "
            f"{data['documents']['test']:,} documents for training / validation / test, "
            f"{data['duplicates']:,} duplicates dropped"
            + (f" (fingerprint {data['fingerprint']})" if data["read"] == 1 else ""),
            f"tokens       {data['tokens']['train']:,} / {data['tokens']['validation']:,} / {data['tokens']['test']:,} "
            f"(vocabulary {data['vocab_size']:,})",
            f"leakage      {data['seen_ngrams']:.1%} of the validation split's word 5-grams stand in "
            + ("training" if data["ngrams_of"] == 1 else f"{data['ngrams_of']:.1%} of training")
            + (f", {data['seen_targets']:.1%} of the held-out targets" if data["seen_targets"] is not None else ""),
            f"too long     {found['too_long'] or 'nothing'}",
            f"to train     about {found['estimated_tokens']:,} tokens without pruning",
            *([f"classes      {_classes(data['label_counts'])}"] if data["labels"] else []),
            *(f"note         {text}" for text in found["notes"]),
        ]
    else:
        lines.append("data         from the hub, not fetched by check")
    resumed = found["resumes"]
    resumes = "nothing: a new study" if resumed is None else counts(resumed) or "a study without trials"
    store = "will be made" if found["store"] == "new" else "reachable"
    if found["store"] is None:
        store = resumes = "not contacted, since the study file alone names it: give it with --store or HPSEARCH_STORE"
    lines += [
        f"store        {store}",
        f"resumes      {resumes}",
        f"devices      {', '.join(found['devices'])}",
        f"computing    {_computing(found['computing'])}",
        *(f"warning      {warning}" for warning in found["computing"]["warnings"]),
    ]
    return "\n".join(plain(line) for line in lines)


def _computing(computing: dict[str, Any]) -> str:
    where = "GPU" if computing["device"] == "cuda" else "CPU"
    flags = ", ".join(computing["instructions"]) or "no vector instructions that are known"
    return (
        f"on the {where}, the model in {computing['model']}, Muon in {computing['muon']} ({computing['cpu']}: {flags})"
    )


def _classes(counts: dict[str, dict[str, int]], width: int = 100) -> str:
    """How many there are, and as many as fit on a line with the examples that have them, most frequent first."""
    total: Counter[str] = sum((Counter(split) for split in counts.values()), Counter())
    shown = [f"{label} {count:,}" for label, count in total.most_common()]
    fitting = max(1, sum(length <= width for length in accumulate(len(text) + 2 for text in shown)))
    return f"{len(shown)}: {', '.join(shown[:fitting])}{', ...' if fitting < len(shown) else ''}"


def trial_report(trial: WholeTrial, width: int) -> Group:
    """Settings, curve, verdict with its evidence, and test score of one trial."""
    facts = new_table("", "", header=False)
    settings = {**trial.settings["model"], **trial.settings["training"]}
    rows: list[tuple[str, Any]] = [
        *trial_facts(trial),
        ("sampled", ", ".join(f"{name}={short(value)}" for name, value in trial.params.items()) or "nothing"),
        ("fixed", _fixed(settings, trial.params)),
    ]
    if trial.checkpoint:
        rows.append(("checkpoint", trial.checkpoint))
    for name, value in rows:
        facts.add_row(Text(name, style="dim"), plain(value))
    parts: list[Any] = [facts]
    points = trial.points
    if points:
        parts += [Text(), Text(curve_plot(points, width=min(width, 100), best=trial.best_evaluation))]
    parts += _details(trial.details)
    if generation := trial.details.get("generation"):
        parts += [Text(), Text(_generated(generation, trial.device_seconds), style="dim")]
    for decision in trial.decisions:
        evidence = ", ".join(f"{key}={short(value)}" for key, value in decision.evidence.items() if value is not None)
        line = f"evaluation {decision.evaluation:>3}: {decision.verdict} -> {decision.action} ({evidence})"
        parts.append(Text(plain(line)))
    if trial.error:
        parts += [Text(), Text("\n".join(plain(line) for line in trial.error.splitlines()), style="red")]
    return Group(*parts)


def _details(details: dict[str, Any]) -> Iterator[Any]:
    """Decoded samples beside their references, and the confusion matrix, of the tasks that have them."""
    for sample in details.get("samples", ()):
        yield Text()
        for name in ("source", "reference", "output"):
            yield Text(f"{name:<10} {plain(sample[name])}")
    if confusion := details.get("confusion"):
        yield Text()
        yield _confusion(confusion["labels"], confusion["counts"])


def _generated(generation: dict[str, Any], seconds: float | None) -> str:
    """How many answers were generated to be scored, and which part of the run that took."""
    share = f", {generation['seconds'] / seconds:.0%} of the run" if seconds else ""
    said = f"{generation['answers']:,} answers generated in {generation['seconds']:.1f} s{share}"
    kinds = {"cut": "lost their beginning", "left_out": "do not fit into the context and are left out"}
    return "; ".join([said, *(f"{generation[kind]:,} {what}" for kind, what in kinds.items() if generation[kind])])


_MOST_CLASSES = 12
"""Of a matrix that a terminal shows; of more, it lists the worst confusions."""
_MOST_CONFUSIONS = 15


def _confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Any:
    names = [plain(label) for label in labels]
    if len(names) <= _MOST_CLASSES:
        table = new_table("true, predicted as", *(name[:6] for name in names))
        for name, row in zip(names, counts, strict=True):
            table.add_row(name, *(str(count) if count else "." for count in row))
        return table
    wrong = [
        (count, sum(row), name, names[column])
        for index, (name, row) in enumerate(zip(names, counts, strict=True))
        for column, count in enumerate(row)
        if count and column != index
    ]
    table = new_table("most confused", "predicted as", "times", "of")
    for count, total, name, other in sorted(wrong, key=lambda one: -one[0])[:_MOST_CONFUSIONS]:
        table.add_row(name, other, str(count), str(total))
    more = len(wrong) - _MOST_CONFUSIONS
    note = f"{more} more pairs of {len(names)} classes: see the report" if more > 0 else f"of {len(names)} classes"
    return Group(table, Text(note if wrong else f"none of {len(names)} classes was taken for another", style="dim"))


def _fixed(settings: dict[str, Any], params: dict[str, Any]) -> str:
    meaningless = FIXED_BY_PRETRAINED if settings.get("pretrained") else FOR_PRETRAINED
    return ", ".join(
        f"{name}={short(value)}"
        for name, value in settings.items()
        if name not in params and name not in meaningless and value is not None and value != {}
    )
