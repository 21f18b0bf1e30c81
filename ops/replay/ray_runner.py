"""Run the variants of an experiment on a Ray cluster, one task for each.

A task does the work of a local process, so every machine of the cluster needs its inputs: this package, the target
folder, the tables, and ``stack.data_dir`` on a shared disk. A task that loses its machine resumes on another one from
its checkpoint there.
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
"""Retries of a task whose machine is lost; a task that raises is not retried."""

_CONNECT_TIMEOUT_S = 5.0


def run_on_ray(tasks: Sequence[VariantTask], address: str) -> Iterator[VariantResult]:
    """Yield the results in order of completion.

    Args:
        tasks: Variants without a result.
        address: Address of the cluster: ``auto``, ``HOST:6379`` or ``ray://HOST:10001``.

    Raises:
        UserError: Ray is not installed, there is no cluster, or as ``trainer.replay.experiment.run_variant``.
    """
    ray = _connect(address)
    try:
        # A task also writes its result to the folder, so it runs once.
        run = ray.remote(max_retries=_RETRIES)(experiment.run_variant)
        left = [run.options(num_cpus=task.settings.train.num_threads).remote(task) for task in tasks]
        while left:
            (done,), left = ray.wait(left, num_returns=1)
            yield ray.get(done)
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray: Ray is not installed here: pip install 'aurora-stream[ray]'") from error
    where = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        if where.port is not None:
            # Ray itself waits forever for a missing cluster.
            socket.create_connection((where.hostname, where.port), _CONNECT_TIMEOUT_S).close()
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster there: {error}; `ray start --head` starts one") from error
    return ray
