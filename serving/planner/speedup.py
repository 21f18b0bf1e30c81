"""How many times as fast as without drafts a node decodes, from its verify steps and its latency model.

A verify step without drafts gives every decoding sequence one token and verifies one row for each. What it would have
taken is estimated from the forward that ran: its duration, times the latency model's ratio of a forward without draft
rows to one with them. So the pace of the machine cancels, and a step that drafted nothing counts as it was measured.
Verify steps that read prompts are left out. No I/O and no torch.
"""

from __future__ import annotations

from serving.planner.latency_model import ForwardTiming, LatencyModel

_RATE = 0.01
"""Weight of the newest verify step in ``Speedup.ratio``."""


class Speedup:
    """Sums the time of verify steps, and the time that their output would have taken without drafts.

    Args:
        latency: Latency model of this machine.
    """

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency
        self.decoding_s = 0.0
        """Seconds of the verify steps, drafting included."""
        self.undrafted_s = 0.0
        """Seconds that the same output would have taken without drafts."""
        self._recent_decoding_s = self._recent_undrafted_s = 0.0

    @property
    def ratio(self) -> float | None:
        """Output rate over the rate without drafts, in recent verify steps; None before the first."""
        return self._recent_undrafted_s / self._recent_decoding_s if self._recent_decoding_s else None

    def add(self, tokens: int, verify: ForwardTiming, draft_seconds: float) -> None:
        """Count a verify step.

        Args:
            tokens: Its output tokens, over all decoding sequences.
            verify: The target's forward over them.
            draft_seconds: Time for which the step drafted before the forward.
        """
        sequences = verify.sequences
        plain = self._latency.predict_verify(sequences, sequences)
        forward_s = verify.seconds * plain / self._latency.predict_verify(sequences, verify.rows)
        decoding_s, undrafted_s = verify.seconds + draft_seconds, tokens / sequences * forward_s
        self.decoding_s += decoding_s
        self.undrafted_s += undrafted_s
        # Both sums start at zero, so their ratio needs no correction for the start.
        self._recent_decoding_s += _RATE * (decoding_s - self._recent_decoding_s)
        self._recent_undrafted_s += _RATE * (undrafted_s - self._recent_undrafted_s)
