"""Variants of an experiment on a Ray cluster: a task for each.

A task is what a process of this machine would run, so everything it names has to be there for all of the cluster: this
package, the target's folder, the tables, and ``stack.data_dir`` on a disk that they share, where a task that lost its
machine goes on from its checkpoint on another.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from schemas.errors import UserError
from trainer.replay import experiment
from trainer.replay.experiment import VariantResult, VariantTask

_RETRIES = 3
"""Of a task whose machine is lost; one that raises is not tried again."""

_ASK_S = 5.0


def learn(tasks: Sequence[VariantTask], address: str) -> Iterator[VariantResult]:
    """The results as they come.

    Args:
        tasks: Variants that are not done.
        address: Of the cluster: ``auto``, ``HOST:6379`` or ``ray://HOST:10001``.

    Raises:
        UserError: Ray is not installed, there is no cluster, or as ``trainer.replay.experiment.run_variant``.
    """
    ray = _connected(address)
    try:
        # Results are in the folder too, so a task is done once whoever asks for it.
        run = ray.remote(max_retries=_RETRIES)(experiment.run_variant)
        left = [run.options(num_cpus=task.settings.train.num_threads).remote(task) for task in tasks]
        while left:
            (done,), left = ray.wait(left, num_returns=1)
            yield ray.get(done)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray: Ray is not installed here: pip install 'aurora-stream[ray]'") from error
    where = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if where.port is not None:
            # Ray itself waits without end for a cluster that is not there.
            socket.create_connection((where.hostname, where.port), _ASK_S).close()
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster there: {error}; `ray start --head` begins one") from error
    return ray
