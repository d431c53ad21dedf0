"""`relseek batches`: what a study's language judges have in flight, what it has cost and will cost.

Here belong arguments and printing; what they print is found out in `in_flight.py`.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from relseek_assets.commands import explained
from relseek_assets.judging import in_flight
from relseek_assets.study import Study, load_study

HEAD = f"{'group':36} {'state':12} {'since':>16} {'answered':>14} {'paid':>9} {'to come':>9}  batches"


@click.command()
@click.argument("study")
@click.option("--json", "as_json", is_flag=True, help="Print an array of objects, one a group.")
@click.option("--cancel", "group", metavar="GROUP", help="Cancel what is in flight for this group; what is finished is kept and charged.")
@click.option("--yes", is_flag=True, help="Cancel without asking.")
@explained
def batches(study: str, as_json: bool, group: str | None, yes: bool) -> None:
    """Say what STUDY's language judges have been asked by Batch: what is in flight, how far, since when, and what it costs.

    Looks at the provider once. A group is one judge's requests of one site and epoch, JUDGE/SITE/EPOCH.
    """
    from relseek_assets.stage import Store

    found = load_study(study)
    folder = Store().folder(found.name)
    for line in in_flight.look(found, folder):
        click.echo(line, err=True)
    if group is not None:
        _cancel(found, folder, group, yes)
    rows = rows_of(found, folder)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        click.echo(f"{found.name}: no {'batch has been sent' if in_flight.judges_of(found, in_flight.BATCH) else 'judge is asked by Batch'}")
        return
    click.echo(HEAD)
    for row in rows:
        done = f"{row['answered']} of {row['requests']}"
        since = in_flight.duration(row["seconds"])
        paid, to_come = in_flight.dollars(row["paid_usd"]), in_flight.dollars(row["to_come_usd"])
        click.echo(f"{row['group']:36} {row['state']:12} {since:>16} {done:>14} {paid:>9} {to_come:>9}  {', '.join(row['batches'])}")
        for error in row["errors"]:
            click.echo(f"    {error}")
    paid, to_come = (in_flight.dollars(sum(row[name] for row in rows)) for name in ("paid_usd", "to_come_usd"))
    waiting = sum(row["state"] == "in flight" for row in rows)
    click.echo(f"{waiting} of {len(rows)} groups in flight, {paid} paid, at most {to_come} to come")


def rows_of(study: Study, folder: Path) -> list[dict[str, Any]]:
    """One row a group, those in flight first: counts and dollars of all its batches, and what providers said that is no good news."""
    paid = in_flight.spent(study, folder)
    rows = []
    for group in in_flight.asked(study, folder):
        shown = group.open or group.batches
        rows.append(
            {
                "group": group.group,
                "judge": group.judge,
                "partition": group.partition,
                "state": _state(group),
                "sent": datetime.fromtimestamp(group.since, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - group.since, 1),
                "answered": sum(batch.completed + batch.failed for batch in shown),
                "requests": sum(batch.requests for batch in shown),
                "attempt": max(batch.attempt for batch in shown),
                "paid_usd": paid.get(group.group, 0.0),
                "to_come_usd": group.to_come_usd,
                "batches": [f"{batch.batch_id or 'not created'} {batch.status}" for batch in shown],
                "errors": [text for batch in group.batches for text in (batch.errors_text, *batch.warnings) if text],
            }
        )
    return sorted(rows, key=lambda row: (row["state"] != "in flight", row["group"]))


def _state(group: in_flight.Asked) -> str:
    return "in flight" if group.awaited else "to send" if group.open else "to collect" if group.uncollected else "collected"


def _cancel(study: Study, folder: Path, group: str, yes: bool) -> None:
    known = {found.group: found for found in in_flight.asked(study, folder)}
    if group not in known:
        raise click.UsageError(f"no group {group!r}; there is {', '.join(known) or 'none'}")
    if not known[group].open:
        click.echo(f"{group}: nothing of it is in flight")
        return
    click.echo(known[group].text())
    if not yes:
        click.confirm("Cancel it? What is finished is kept and charged, the rest is not asked again by itself.", abort=True)
    for batch in in_flight.cancel_group(study, folder, group):
        click.echo(f"{batch.batch_id or batch.number}: {batch.status}")
