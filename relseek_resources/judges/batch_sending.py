"""Bringing written batches to the provider, once each, and writing down what it says of them.

Here belong uploads, creations and what is found again after a crash or a lost answer. Request files belong to `batch_plan.py`, looks at what is in
flight to `batches.py`, single calls to `provider.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from relseek_resources.judges import provider
from relseek_resources.judges.ledger import ENDED, UNSENT, Batch, Ledger
from relseek_resources.judges.provider import BatchError, Refused

NO_ROOM = (
    "token_limit_exceeded",
    "rate_limit_exceeded",
    "billing_hard_limit_reached",
    "insufficient_quota",
)  # the batch is sound, the account is full
FIRST_HOLD, LONGEST_HOLD = 60.0, 3600.0  # seconds
LONGEST_VALUE = 512  # characters of a metadata value
UPLOADS = 2  # of a file that the provider has forgotten, in one go


def speaker(ledger: Ledger, client: Any) -> Any:
    """The client, patient; only for the endpoint whose batches the ledger holds.

    Raises:
        BatchError: the ledger's batches were created elsewhere. Nothing of them can be seen from here.
    """
    here = provider.address(client)
    elsewhere = [address for address in ledger.addresses() if address != here]
    if elsewhere:
        raise BatchError(
            f"{ledger.path} holds batches of {', '.join(elsewhere)}, and the endpoint asked now is {here}. Set OPENAI_BASE_URL or base_url in "
            f"[[judges]] back; to ask everything anew at {here}, give the judge this base_url, which keeps a ledger of its own"
        )
    return provider.patient(client)


def send_all(ledger: Ledger, client: Any, group: str) -> list[Batch]:
    """Bring every batch of a group that the provider does not have yet to it, but for those that are held; the group's lock is held."""
    sent = []
    for batch in ledger.batches(group):
        if batch.status in UNSENT and not batch.held:
            current = ledger.group(group)
            if current is not None and current.stopped:
                raise BatchError(f"{group} was cancelled meanwhile; what was sent before is being cancelled")
            sent.append(send(ledger, client, batch))
    return sent


def send(ledger: Ledger, client: Any, batch: Batch) -> Batch:
    """Bring a written batch to the provider, from wherever an earlier try got to. A file that the provider has forgotten is uploaded again.

    Raises:
        Refused: the provider will not have the batch; it is `written` where its file is to blame, else `uploaded`.
    """
    for left in reversed(range(UPLOADS)):
        if batch.status in ("written", "uploading"):
            unsure = batch.status == "uploading"
            ledger.update_batch(batch.number, status="uploading")
            file_id = provider.upload(client, ledger.request_file(batch.number), _file_name(ledger, batch), unsure=unsure)
            batch = ledger.update_batch(batch.number, status="uploaded", input_file_id=file_id)
        try:
            return _create(ledger, client, batch)
        except Refused:
            batch = ledger.batch(batch.number)
            if batch.status != "written" or not left:
                raise
    raise AssertionError("unreachable")


def _file_name(ledger: Ledger, batch: Batch) -> str:
    return f"relseek-{ledger.id[:12]}-{batch.number:06d}-{(batch.fingerprint or '')[:16]}.jsonl"


def _create(ledger: Ledger, client: Any, batch: Batch) -> Batch:
    """Create the batch of an uploaded file, once: after a crash or a lost answer the provider's list is searched before anything is repeated."""
    what = f"creating batch {batch.number} of {batch.group}"
    found = None
    if batch.status == "creating":
        found = find_interrupted(ledger, client, batch)
        if found is None and batch.account != provider.account(client):
            raise BatchError(
                f"{what} was interrupted, and was tried with another key, which alone can tell whether it happened: set it again, or cancel the group"
            )
    else:
        where = {"base_url": provider.address(client), "account": provider.account(client)}
        batch = ledger.update_batch(batch.number, status="creating", intended=time.time(), **where)

    def make(once: Any) -> Any:
        return once.batches.create(
            input_file_id=batch.input_file_id, endpoint=batch.endpoint, completion_window=batch.window, metadata=_metadata(ledger, batch)
        )

    try:
        made = found or provider.find_or_make(client, what, lambda: _listed(ledger, client, batch), make)
    except Refused as error:
        of_file = error.code == 404 or error.param == "input_file_id" or str(batch.input_file_id) in str(error)
        back = {"status": "written", "input_file_id": None} if of_file else {"status": "uploaded"}
        ledger.update_batch(batch.number, base_url=None, account=None, errors=[{"message": str(error)}], **back)
        raise
    return record(ledger, batch, made)


def find_interrupted(ledger: Ledger, client: Any, batch: Batch) -> Any:
    """The provider's batch whose creation was never answered, after it has had the time to arrive; None where there is none."""
    provider.pause(max(0.0, (batch.intended or 0.0) + provider.SETTLING - time.time()))
    with provider.speaking(f"looking for {called(batch)}"):
        return _listed(ledger, client, batch)


def _listed(ledger: Ledger, client: Any, batch: Batch) -> Any:
    return next((item for item in provider.listed(client, earliest(batch)) if _is_ours(ledger, batch, item)), None)


def earliest(batch: Batch) -> float:
    """Before this, by the provider's clock, a batch cannot have been created."""
    return (batch.intended or 0.0) - provider.SKEW


def _metadata(ledger: Ledger, batch: Batch) -> dict[str, str]:
    """What the batch carries. Its number tells it from an earlier one with the same content, all of which is being asked again."""
    ours = {"relseek_ledger": ledger.id, "relseek_batch": str(batch.number), "relseek_fingerprint": batch.fingerprint or ""}
    described = {**batch.description, "group": batch.group, **ours}
    return {name[:64]: str(value)[:LONGEST_VALUE] for name, value in described.items()}


def _is_ours(ledger: Ledger, batch: Batch, item: Any) -> bool:
    """Whether a listed batch is this one: by its input file, which only this one has, or by its fingerprint where a file was uploaded twice."""
    if item.id in batch.former:
        return False
    metadata = getattr(item, "metadata", None) or {}
    ours = {"relseek_ledger": ledger.id, "relseek_batch": str(batch.number), "relseek_fingerprint": batch.fingerprint}
    return ours.items() <= metadata.items() or (batch.input_file_id is not None and getattr(item, "input_file_id", None) == batch.input_file_id)


def record(ledger: Ledger, batch: Batch, item: Any) -> Batch:
    """Write down what the provider says of a batch; returns it as it is then. One that the provider had no room for is held, to be created again."""
    counts = getattr(item, "request_counts", None)
    errors = list(_errors(item))
    if item.status == "failed" and errors and all(error["code"] in NO_ROOM for error in errors):
        until = time.time() + min(LONGEST_HOLD, FIRST_HOLD * 2 ** len(batch.former))
        return ledger.record_look(batch, status="held", batch_id=None, former=[*batch.former, item.id], errors=errors, held_until=until)
    return ledger.record_look(
        batch,
        status=item.status,
        batch_id=item.id,
        output_file_id=getattr(item, "output_file_id", None),
        error_file_id=getattr(item, "error_file_id", None),
        completed=getattr(counts, "completed", None) or 0,
        failed=getattr(counts, "failed", None) or 0,
        created=getattr(item, "created_at", None),
        ended=time.time() if item.status in ENDED else None,
        errors=errors,
        missed=0,
    )


def _errors(item: Any) -> Iterator[dict[str, Any]]:
    for error in getattr(getattr(item, "errors", None), "data", None) or []:
        yield {name: getattr(error, name, None) for name in ("code", "line", "message")}


def called(batch: Batch) -> str:
    """A batch in words."""
    return f"batch {batch.number} of {batch.group} ({batch.batch_id or 'not created'})"
