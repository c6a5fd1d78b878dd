"""Commands for the jobs of a Ray cluster: submit, jobs, logs, stop."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import click

from hpsearch.cli.options import (
    COUNT,
    TRIAL_NUMBER,
    cluster_option,
    json_option,
    open_console,
    set_option,
    store_option,
    track_option,
)
from hpsearch.cli.process import shown


@click.command()
@cluster_option
@click.option("--job-id", help="Name of the job [study and time].")
@click.option("--detach", is_flag=True, help="Do not wait for the end.")
@click.option("--extend", is_flag=True, help="Accept a larger budget or a wider space than the study has.")
@track_option
@click.option("--folder", metavar="PATH", help="Folder (or s3://...) of checkpoints and data that all nodes reach.")
@partial(store_option, text="The study store, as the cluster reaches it.")
@click.option("--name", help="Another name for the study.")
@click.option("--trials", type=COUNT, help="Another number of trials.")
@set_option
@click.argument("study_file", metavar="STUDY")
def submit(study_file: str, address: str | None, detach: bool, **options: Any) -> int:
    """Launch a study on a Ray cluster, as a job; prints its log until it ends, and ends in its exit code.

    The study file and the local data that it names go with it. A token for the cluster is read from RAY_AUTH_TOKEN.
    """
    from hpsearch import api

    job_id = api.submit(study_file, address=address, **options)
    given = f" --address {address}" if address else ""
    print(f"job {job_id}: hpsearch logs {job_id} --follow{given}; hpsearch stop {job_id}{given}", file=sys.stderr)
    return 0 if detach else _follow(job_id, address)


def _follow(job_id: str, address: str | None) -> int:
    from hpsearch.backends.ray import jobs as ray_jobs

    cluster = ray_jobs.Cluster(address)
    for piece in cluster.follow(job_id):
        print(ray_jobs.plain_log(piece), end="", flush=True)
    job = cluster.wait(job_id)
    if job.status != "SUCCEEDED":
        print(f"job {job_id} is {job.status}: {shown(job.message.partition(',')[0])}", file=sys.stderr)
    return ray_jobs.exit_code(job)


@click.command()
@cluster_option
@json_option
def jobs(address: str | None, as_json: bool) -> None:
    """List the jobs of a Ray cluster."""
    from hpsearch import api
    from hpsearch.cli import output, tables

    found = api.jobs(address=address)
    if as_json:
        print(output.to_json({"schema_version": 1, "jobs": [job.__dict__ for job in found]}))
    else:
        open_console().print(tables.jobs_table(found) if found else "no jobs yet")


@click.command()
@click.argument("name", metavar="JOB|STUDY")
@click.argument("trial", required=False, type=TRIAL_NUMBER)
@cluster_option
@store_option
@click.option("--follow", "-f", is_flag=True, help="Continue until it ends; of a job, end in its exit code.")
@json_option
def logs(name: str, trial: int | None, address: str | None, store: str | None, follow: bool, as_json: bool) -> int:
    """Print the log of a job, or of one trial of a study."""
    if trial is not None:
        from hpsearch import api
        from hpsearch.cli import summaries

        for line in api.logs(name, trial, store=store, follow=follow):
            print(json.dumps(line) if as_json else summaries.log_line(line), flush=True)
        return 0
    from hpsearch.backends.ray import jobs as ray_jobs

    if as_json:
        raise click.UsageError("the log of a job is plain text; --json is for that of a trial")
    if follow:
        return _follow(name, address)
    print(ray_jobs.plain_log(ray_jobs.Cluster(address).log(name)), end="")
    return 0


@click.command()
@click.argument("job_id", metavar="JOB")
@cluster_option
def stop(job_id: str, address: str | None) -> None:
    """Stop a job. Its trials write a checkpoint first, and the next launch of the study resumes them."""
    from hpsearch import api

    job = api.stop(job_id, address=address)
    ended = job.status not in ("PENDING", "RUNNING")
    print(f"job {job_id} has ended already: {job.status}" if ended else f"job {job_id} was asked to stop")
