"""The reasons of dead letters: every code, its meaning, and what an operator can do about it."""

from __future__ import annotations

from dataclasses import dataclass

DUPLICATE = "duplicate"
UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Reason:
    """Meaning of a code, and the action that it calls for."""

    meaning: str
    action: str


_REPORT = "Report a fault of the node, with the dead letter. The record itself cannot be repaired."
_UPGRADE = "Upgrade the stream worker, then replay the dead letters; or stop the foreign producer."
_REWRITTEN = "Find the process that rewrites headers or values between node and worker."

REASONS = {
    "empty": Reason(
        "The record has no value. Nodes never send such a record.",
        "Find the other producer of the topic. Only nodes may write to it.",
    ),
    "foreign_content": Reason(
        "The header content-type does not name an Arrow stream.",
        "Find the other producer of the topic, or give the nodes a topic of their own (kafka.traces_topic).",
    ),
    "foreign_schema": Reason(
        "A column of the record is missing or has another type, although it has this major version of the format.",
        _REPORT,
    ),
    "foreign_format": Reason("The record names another format.", _UPGRADE),
    "truncated": Reason(
        "The record has fewer bytes than the smallest chunk.",
        "Find the process that truncates messages between node and worker. The rest of the record is lost.",
    ),
    "corrupt": Reason(
        "The checksum does not match: the bytes were cut or altered after the node had sent them.",
        "Check memory and disks of the brokers, and any process that copies the topic. A replay has the same result.",
    ),
    "not_arrow": Reason("The bytes are those that the node sent, but they are not an Arrow stream.", _REPORT),
    "bad_envelope": Reason("A field of the envelope is missing or has the wrong type.", _REPORT),
    "bad_line": Reason(
        "The speculator line cannot be the name of a folder.",
        "Correct it in the engine that writes these traces: letters, digits, dot, dash and underscore, at most 128.",
    ),
    "bad_header": Reason(
        "The name of a header is not UTF-8. The dead letter has the name with escapes.",
        "Find the other producer of the topic, or the process that rewrites headers between node and worker.",
    ),
    "header_mismatch": Reason("A header contradicts the envelope of its record.", _REWRITTEN),
    "wrong_count": Reason("The header rows differs from the number of verify steps in the record.", _REWRITTEN),
    "contradiction": Reason(
        "Lengths, links or positions in the record contradict each other. The detail says which.",
        _REPORT,
    ),
    "bad_token": Reason("A token id is negative, or outside the vocabulary that the node announced.", _REPORT),
    "bad_number": Reason(
        "A feature, log-probability or sampling parameter is infinite or NaN, or a time is out of range.",
        "Check the target on that node: its states overflow, or its weights are damaged. For a time, check its clock.",
    ),
    "too_large": Reason(
        "A number does not fit into its column, the features exceed the size of a row, or the record becomes far "
        "larger when it is decompressed.",
        _REPORT,
    ),
    "claim_foreign": Reason(
        "The claim check names a file outside the claim store of this worker.",
        "Set traces.claim_check_uri of nodes and workers to the same address, then replay the dead letters.",
    ),
    "claim_missing": Reason(
        "The file of the claim check does not exist.",
        "Keep claim-check files longer than kafka.retention. If the file can be restored, replay the dead letters.",
    ),
    "claim_corrupt": Reason(
        "The file of the claim check differs from the file that the node wrote.",
        "Find the other writer to traces.claim_check_uri. If the file can be restored, replay the dead letters.",
    ),
    DUPLICATE: Reason(
        "The same chunk was written before, from the offset in the detail.",
        "Do nothing: the tables contain it once. If there are many, find the process that copies records to the topic.",
    ),
    "lost_to_retention": Reason(
        "The broker deleted records before a worker had read them. The detail says which.",
        "Raise kafka.retention above the longest outage of the workers. The records are lost.",
    ),
    "skipped": Reason(
        "A person moved the stream past the record with `aurora stream skip`. The detail says who and why.",
        "Read the record from the broker while it is kept there, if it is needed.",
    ),
    "hole": Reason(
        "No consumer receives a record at these offsets: a transaction ended there, or was aborted.",
        "Do nothing: no record is missing.",
    ),
    "topic_recreated": Reason(
        "The topic was deleted and created anew. From this offset on, the tables have its records under another name.",
        "Find who deleted the topic. Records of the old log that no worker had read are lost.",
    ),
    "crash": Reason(
        "Workers ended again and again while they handled this record, so it was not read.",
        "Look for the cause in the ends of their logs and in their memory limit. Replay it after a fix.",
    ),
    UNREADABLE: Reason(
        "Reading the record failed with an unexpected error.",
        "Report it with the dead letter. Replay it after a fix.",
    ),
}
"""Reasons by code."""
