"""Commands that look after a store and its files: gc, retry, doctor; and the dashboard, the schema."""

from __future__ import annotations

import json
import os
import sys

import click

from hpsearch.cli.options import COUNT, TRIAL_NUMBER, json_option, store_option
from hpsearch.errors import (
    EXIT_FOUND,
    plain,
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--allow-name", "names", multiple=True, metavar="NAME", help="Another host name that browsers use for it."
)
@click.option("--write", "may_write", is_flag=True, help="Let people change and delete studies.")
@store_option
def dashboard(host: str, port: int, names: tuple[str, ...], may_write: bool, store: str | None) -> None:
    """Serve live pages of all studies, and the Optuna dashboard beside them, read-only, until stopped.

    The token that people have to give is read from HPSEARCH_DASHBOARD_TOKEN; an address that other machines reach needs
    one. A browser gives it once, as /?token=TOKEN.
    """
    from hpsearch.api import store_url
    from hpsearch.server.app import TOKEN_VARIABLE, open_dashboard

    token = os.environ.get(TOKEN_VARIABLE) or None
    url = store_url(store)
    with open_dashboard(url, host=host, port=port, token=token, may_write=may_write, names=names) as server:
        asks = "?token=..." if token else ""
        print(f"http://{host}:{server.server_port}/{asks} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        server.serve_forever()


@click.command()
def schema() -> None:
    """Print the JSON schema of study files, for editors."""
    from hpsearch import api

    print(json.dumps(api.schema(), indent=2))


@click.command()
@click.argument("study")
@click.option("--keep", type=COUNT, help="Ranked trials whose checkpoint stays [as the study says].")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@store_option
@json_option
def gc(study: str, keep: int | None, dry_run: bool, store: str | None, as_json: bool) -> None:
    """Remove the checkpoints of a study that are not among the best, and files that belong to no trial.

    A running study does this by itself. What an unfinished trial needs to resume is never removed.
    """
    from hpsearch import api
    from hpsearch.cli import output

    garbage = api.gc(study, keep=keep, dry_run=dry_run, store=store)
    if as_json:
        pieces = [{"folder": str(piece.folder), "why": piece.why, "bytes": piece.size} for piece in garbage]
        print(output.to_json({"schema_version": 1, "study": study, "dry_run": dry_run, "removed": pieces}))
        return
    for piece in garbage:
        print(f"{plain(piece.folder)}  {piece.size / 1e6:,.1f} MB  {piece.why}")
    verb = "would be removed" if dry_run else "removed"
    print(f"{len(garbage)} folders, {sum(piece.size for piece in garbage) / 1e6:,.1f} MB {verb}")


@click.command()
@click.argument("study")
@click.argument("trials", type=TRIAL_NUMBER, nargs=-1, metavar="[TRIAL]...")
@store_option
def retry(study: str, trials: tuple[int, ...], store: str | None) -> None:
    """Put failed trials, all by default, back into the queue: the next launch trains them again."""
    from hpsearch import api

    numbers = api.retry(study, *trials, store=store)
    put_back = (
        f"put back: {', '.join(map(str, numbers))}; launch the study to run them" if numbers else "none has failed"
    )
    print(put_back, file=sys.stderr)


@click.command()
@click.argument("study", required=False)
@click.option("--repair", is_flag=True, help="Repair what needs no guess.")
@store_option
@json_option
def doctor(study: str | None, repair: bool, store: str | None, as_json: bool) -> int:
    """Check that a store is whole: states, curves, ranking, files, leases, and what Optuna's tables say.

    Looks at every study, or at one. Ends in 0 when there is nothing to say or everything was repaired, else in 1.
    """
    from hpsearch import api
    from hpsearch.cli import output

    findings = api.doctor(study, repair=repair, store=store)
    if as_json:
        print(output.to_json({"schema_version": 1, "findings": [finding.__dict__ for finding in findings]}))
    else:
        for finding in findings:
            whose = finding.study + ("" if finding.trial is None else f", trial {finding.trial}")
            print(plain(f"{whose}: {finding.problem}"))
            print(plain(f"    {'repaired' if finding.repaired else 'remedy'}: {finding.remedy}"))
        repairable = sum(finding.can_repair and not finding.repaired for finding in findings)
        if not findings:
            print("nothing is wrong")
        elif repairable:
            print(f"{repairable} of {len(findings)} can be repaired with --repair")
    return 0 if all(finding.repaired for finding in findings) else EXIT_FOUND
