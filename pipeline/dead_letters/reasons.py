"""Why a record could not be used: every code that a dead letter can carry, and what a person can do about it."""

from __future__ import annotations

from dataclasses import dataclass

DUPLICATE = "duplicate"
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Reason:
    """What a code says."""

    means: str
    do: str


_REPORT = "The node has a fault: report it with the dead letter. Nothing can be done about the record itself."
_UPGRADE = "Upgrade the stream worker, then replay the dead letters; or stop the foreign producer."

REASONS = {
    "empty": Reason(
        "A record without a value: no node sends one.",
        "Find who else writes to the topic; only nodes may.",
    ),
    "foreign_content": Reason(
        "The header content-type names something else than an Arrow stream.",
        "Find who else writes to the topic, or give the nodes a topic of their own (kafka.traces_topic).",
    ),
    "foreign_schema": Reason(
        "The header schema, or the columns in the record, are of a version that this worker does not read.",
        _UPGRADE,
    ),
    "foreign_format": Reason("The record says that it is of another format.", _UPGRADE),
    "truncated": Reason(
        "Fewer bytes than the smallest chunk has.",
        "Look for what cuts messages between node and worker; the rest of the record is gone.",
    ),
    "corrupt": Reason(
        "The checksum does not fit: the bytes were cut or altered after the node had made them.",
        "Check memory and disks of the brokers, and whatever copies the topic. Replaying gives the same result.",
    ),
    "not_arrow": Reason("The bytes are those that were sent, but no Arrow stream.", _REPORT),
    "bad_envelope": Reason("A field of the envelope is missing or of the wrong kind.", _REPORT),
    "bad_line": Reason(
        "The speculator line cannot be the name of a folder.",
        "Correct it in the engine that writes these traces: letters, digits, dot, dash and underscore, at most 128.",
    ),
    "header_mismatch": Reason(
        "A header says something else than the envelope beside it: what travels is not what was announced.",
        "Look for what rewrites headers or values between node and worker.",
    ),
    "wrong_count": Reason(
        "The header rows does not say how many verify steps the record holds.",
        "Look for what rewrites headers or values between node and worker.",
    ),
    "contradiction": Reason(
        "Lengths, links or positions in the record do not fit together; the detail says which.",
        _REPORT,
    ),
    "bad_token": Reason(
        "A token id below 0, or not in the vocabulary that the node has announced.",
        _REPORT,
    ),
    "bad_number": Reason(
        "A feature, log-probability or sampling setting is infinite or not a number, or a time is none.",
        "Look at the target on that node: its states overflow, or its weights are damaged. For a time: at its clock.",
    ),
    "too_large": Reason(
        "A number that does not fit into its column, or more features in one record than a row can hold.",
        _REPORT,
    ),
    "claim_foreign": Reason(
        "The record names a file outside the store that this worker reads.",
        "Set traces.claim_check_uri of nodes and workers to the same address, then replay the dead letters.",
    ),
    "claim_missing": Reason(
        "The file that holds the features is not there.",
        "Keep claim-check files longer than kafka.retention. If the file can be brought back, replay.",
    ),
    "claim_corrupt": Reason(
        "The file that holds the features is not the one that was written.",
        "Check what else writes to traces.claim_check_uri. If the file can be brought back, replay.",
    ),
    DUPLICATE: Reason(
        "The same chunk was taken already, at the offset in the detail.",
        "Nothing: the tables hold it once. If many come, look for what copies records into the topic.",
    ),
    "lost_to_retention": Reason(
        "The broker deleted records before a worker had read them; the detail says which.",
        "Raise kafka.retention above the longest outage of the workers. The records are gone.",
    ),
    UNREADABLE: Reason(
        "Reading the record failed in a way that nobody foresaw.",
        "Report it with the dead letter; replay it after a fix.",
    ),
}
"""By code."""
