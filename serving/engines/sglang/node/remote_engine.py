"""SGLang's own server as ``serving.engines.base.HotSwapEngine``: the puller's versions go into it over HTTP.

An update is: pause in place, begin, update, end, compare sums, continue. Requests stand still meanwhile and lose
nothing. What the server says it holds afterwards is compared with what was sent, tensor by tensor. Where anything goes
wrong, what served before is put back, and the error says so.

Whoever dies in the middle leaves a server that stands still, with an update open: ``repair`` closes it and lets the
requests go on, and comes first whenever a node begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import structlog
import torch
from torch import Tensor

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engines.base import EngineHealth, SpeculationFixedError, SwapResult
from serving.engines.sglang.node.checksums import WAYS, Expected, Way, compare
from serving.engines.sglang.node.client import SglangError, SglangServer
from serving.engines.sglang.node.monitor import Published, Watch
from serving.engines.sglang.node.weights import packed, sent, shared

log = structlog.get_logger()

_RESUME_TRIES = 3
_BETWEEN_TRIES_S = 1.0


class Known:
    """A draft by its version.

    Args:
        version: Its name.
        tensors: From ``weights.sent``.
    """

    def __init__(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        self.version, self.tensors = version, tensors
        self.expected = Expected(tensors)


class RemoteEngine:
    """Implements ``serving.engines.base.HotSwapEngine``.

    Args:
        server: Need not run yet.
        target: Fingerprint of the target.
        line: Of the drafts.
        known: The draft that the server starts with; None where that is not known.
        shares: Whether all its processes are on this machine, and can take weights from its shared memory.
    """

    def __init__(
        self, server: SglangServer, target: str, line: str, known: Known | None, *, shares: bool = False
    ) -> None:
        self.target, self.line = target, line
        self._server, self._known, self._shares = server, known, shares
        self._watch = Watch(server)
        self.published = Published(self._watch)
        """The traces of the plugin in it."""
        self._version = known.version if known else ""
        self._ranks, self._depth = 1, 0
        self._ways: tuple[Way, ...] = WAYS
        """How the server may form its sums; one, once that is known."""
        self._updating = threading.Lock()
        self._unclear = True
        """Requests may stand still, or an update may be open."""
        self._error: str | None = None

    def start(self) -> None:
        """Begin with a server that answers.

        Raises:
            SglangError: it does not, or cannot be looked after.
        """
        about = self._server.about()
        if about.replicas > 1:
            raise SglangError("a server with data parallelism is not known: start one for each replica (--dp-size 1)")
        self._ranks, self._depth, self._version = about.ranks, about.depth, about.weight_version
        with self._updating:
            self._repair()
            if self._known:
                self._other_than(self._known)  # tells how it forms its sums, and at leisure
        self._watch.look()
        self._watch.start()

    def stop(self) -> None:
        """End the looks at the server, which itself goes on."""
        self._watch.stop()

    def check(self, draft: EagleDraft) -> None:
        """Draft once with the given weights, here.

        Raises:
            CheckpointError: the draft gives values that are not finite.
        """
        shape = draft.shape
        with torch.inference_mode():
            hidden = draft.fuse(torch.ones(1, 1, shape.feature_width))
            row = torch.ones(1, 1, shape.hidden_size)
            value_BMTE = draft.project(row, hidden, torch.zeros(1, 1, dtype=torch.long)).v_BMTE
            # With nothing but itself to attend to, a token's attention is its own value.
            attended = value_BMTE.repeat_interleave(shape.num_attention_heads // shape.num_key_value_heads, dim=1)
            scores = draft.logits(draft.finish(hidden, attended))
        if not torch.isfinite(scores).all():
            raise CheckpointError("the draft gives values that are not finite")

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        """Put weights in place while requests stand still; nothing is paused where they are in place already.

        Raises:
            SglangError: it did not work; what served before goes on, or the error says that it does not.
        """
        tensors = sent(draft)
        with self._updating:
            try:
                swapped = self._swapped(Known(version, tensors))
            except SglangError as error:
                self._error = str(error)
                raise
            self._error = None
            return swapped

    def speculate(self, *, on: bool) -> None:
        """Change nothing: SGLang drafts from its start on, or never.

        Raises:
            SpeculationFixedError: drafting is to stop.
        """
        if not on:
            raise SpeculationFixedError(
                "SGLang cannot stop drafting while it runs: start the node with serve.speculate=false"
            )

    def health(self) -> EngineHealth:
        """What was seen last; requests count when they have ended."""
        seen = self._watch.seen
        counted = seen.counted
        return EngineHealth(
            alive=seen.answers,
            speculator=self._version,
            speculating=True,
            draft_depth=self._depth,
            expected_tokens_per_second=(),
            requests_running=seen.load.running,
            requests_waiting=seen.load.waiting,
            verify_steps=counted.verify_steps,
            draft_tokens=counted.verify_steps * self._depth,
            # Of a request's tokens the first comes from its prompt, and each verify step gives one that was not
            # drafted.
            accepted_tokens=max(0, counted.tokens - counted.requests - counted.verify_steps),
            output_tokens=counted.tokens,
            error=self._error or seen.error,
        )

    @property
    def finished(self) -> int:
        """Requests that have ended."""
        return self._watch.seen.counted.requests

    @property
    def failed(self) -> int:
        """SGLang counts no requests that ended by a fault of its own."""
        return 0

    def _swapped(self, wanted: Known) -> SwapResult:
        if self._unclear:
            self._repair()
        if not self._other_than(wanted):
            self._server.rename(wanted.version)
            self._settle(wanted)
            return SwapResult(wanted.version, 0, 0.0)
        contents, in_flight = self._contents(wanted), self._server.load().running
        began = time.perf_counter()
        self._unclear = True
        try:
            self._stand_still(wanted)
            self._put_or_go_back(wanted, contents)
        finally:
            self._resume()
        self._settle(wanted)
        return SwapResult(wanted.version, in_flight, (time.perf_counter() - began) * 1e3)

    def _contents(self, known: Known) -> list[str]:
        """A draft for each rank."""
        if self._shares:
            try:
                return [shared(known.tensors) for _ in range(self._ranks)]
            except RuntimeError as error:
                log.warning("sglang_shares_no_memory", why=str(error))
                self._shares = False
        return [packed(known.tensors)] * self._ranks

    def _stand_still(self, wanted: Known) -> None:
        try:
            self._server.pause()
        except SglangError as error:
            # Nothing was changed, and to ask about an update now would wait for every request that runs.
            raise SglangError(f"{_not_served(wanted, error)}; version {self._version} goes on") from error

    def _put_or_go_back(self, wanted: Known, contents: Sequence[str]) -> None:
        try:
            self._put(wanted, contents)
        except SglangError as error:
            raise self._gone_back(wanted, error) from error

    def _put(self, wanted: Known, contents: Sequence[str]) -> None:
        """Update the draft of a server that stands still, and see that it is there."""
        self._server.begin()
        self._server.update(contents, wanted.version)
        if not self._server.end():
            raise SglangError("the update was closed by somebody else")
        if wrong := self._other_than(wanted):
            raise SglangError(f"the server holds other weights than it was sent: {', '.join(wrong)}")

    def _gone_back(self, wanted: Known, error: SglangError) -> SglangError:
        """Put back what served before; the error that says how that went."""
        known, failed = self._known, _not_served(wanted, error)
        log.warning("sglang_update_failed", version=wanted.version, why=str(error))
        self._shares = False  # what was not taken from shared memory stays there: not once for every try
        try:
            self._server.end()
            if known is None:
                return SglangError(f"{failed}; with what the server drafts now is not known")
            if self._other_than(known):
                self._put(known, self._contents(known))
            self._server.rename(known.version)
        except SglangError as second:
            return SglangError(f"{failed}; what served before could not be put back: {second}")
        return SglangError(f"{failed}; version {known.version} goes on")

    def _resume(self) -> None:
        """Let requests go on; tried again, for as long as it fails they stand still."""
        for left in reversed(range(_RESUME_TRIES)):
            try:
                self._server.resume()
            except SglangError as error:
                log.warning("sglang_stands_still", why=str(error))
                if not left:
                    raise
                time.sleep(_BETWEEN_TRIES_S)
            else:
                self._unclear = False
                return

    def _repair(self) -> None:
        """Close what a node that died has left open. Paused first: else the end of an update waits for all requests."""
        self._server.pause()
        try:
            if self._server.end():
                log.warning("sglang_repaired", why="an update was open: whoever had begun it has died")
        finally:
            self._resume()

    def _other_than(self, known: Known) -> tuple[str, ...]:
        """Tensors that the server holds otherwise than the draft has them."""
        difference = compare(self._server.sums(), known.expected, self._ways)
        if difference.way:
            self._ways = (difference.way,)
        return difference.names

    def _settle(self, known: Known) -> None:
        self._known, self._version = known, known.version


def _not_served(wanted: Known, error: SglangError) -> str:
    return f"version {wanted.version} is not served: {error}"
