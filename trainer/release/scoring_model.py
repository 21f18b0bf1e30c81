"""A version as an MLflow model: the files that MLflow reads, and the scorer that ``mlflow.pyfunc.load_model`` returns.

The flavour ``python_function`` names this module as its loader. So a version holds no code and no pickle, and MLflow
loads it where the package is installed. The scorer replays the draft on rows of the table ``accepted``, as the trainer
does on the held-out set, with the settings of the registration. ``model_config`` replaces whole sections of them.

Nodes ignore these files.
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from schemas.build_info import package_version
from schemas.device import select_device
from schemas.settings import Settings
from schemas.speculator.checkpoint import (
    CARD,
    INPUT_EXAMPLE,
    MLMODEL,
    PYTHON_ENVIRONMENT,
    REQUIREMENTS,
    CheckpointError,
    Manifest,
    read_checkpoint,
    read_manifest,
    read_shape,
)
from schemas.speculator.day_0_draft import read_embeddings
from schemas.speculator.network import EagleDraft
from schemas.speculator.target_fingerprint import target_fingerprint
from trainer.data.samples import (
    Row,
    Sample,
    continues,
    join_samples,
    provides_features,
    read_sample,
    recompute_features,
    split_sample,
)
from trainer.data.target import FrozenTarget
from trainer.loop.learner import autocast, select_dtype
from trainer.objective.simulated_acceptance import SimulatedAcceptance, simulate_each, sum_acceptance, walk_requests

_EPOCH = datetime.fromtimestamp(0, UTC)
_BUILD_TOOLS = ("pip", "setuptools>=80")


def _column(name: str, kind: str, *, required: bool = True) -> dict[str, object]:
    return {"type": kind, "name": name, "required": required}


def _array(name: str, kind: str) -> dict[str, object]:
    return _column(name, "array") | {"items": {"type": kind}}


# A column with nulls has floating-point numbers in pandas, whatever its type in the table.
INPUTS = (
    _column("request", "string"),
    _column("target", "string"),
    _column("position", "long"),
    _array("tokens", "long"),
    _column("next_token", "double", required=False),
    _column("features", "binary"),
    _column("feature_width", "long"),
    _array("loss_mask", "boolean"),
    _column("top_k", "long"),
    _array("teacher_ids", "long"),
    _array("teacher_logprobs", "double"),
    _column("temperature", "double", required=False),
    _column("top_p", "double", required=False),
    _column("sampling_top_k", "double", required=False),
)
"""Columns of ``accepted`` that the scorer reads, as MLflow's column specifications; further ones are ignored."""
OUTPUTS = (
    _column("request", "string"),
    _column("accepted_tokens", "double"),
    _column("verify_steps", "double"),
    _column("acceptance_length", "double"),
)
"""One row for each request."""
_OUTPUT_SCHEMA = pa.schema(
    [(str(one["name"]), pa.string() if one["type"] == "string" else pa.float64()) for one in OUTPUTS]
)


def write_model_files(folder: Path, settings: Settings, manifest: Manifest, card: str, device: torch.device) -> None:
    """Write next to a version's files what makes the folder an MLflow model.

    Args:
        folder: With the version.
        settings: Of the process that registers it; rows are scored with them.
        manifest: Of the version.
        card: Description in Markdown.
        device: On which the process scores drafts.
    """
    requirements = [f"mlflow=={metadata.version('mlflow-skinny')}", f"aurora-stream[train]=={package_version()}"]
    model = {
        "flavors": {
            "python_function": {
                "loader_module": __name__,
                "python_version": platform.python_version(),
                "env": {"virtualenv": PYTHON_ENVIRONMENT},
                "config": _scoring_settings(settings, device),
            }
        },
        "metadata": {"line": manifest.line, "target": manifest.target},
        "mlflow_version": metadata.version("mlflow-skinny"),
        "signature": {"inputs": json.dumps(INPUTS), "outputs": json.dumps(OUTPUTS), "params": None},
        "saved_input_example_info": {"artifact_path": INPUT_EXAMPLE, "type": "dataframe", "pandas_orient": "split"},
        "utc_time_created": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}",
    }
    environment = {
        "python": platform.python_version(),
        "build_dependencies": list(_BUILD_TOOLS),
        "dependencies": [f"-r {REQUIREMENTS}"],
    }
    # MLflow reads these as YAML, of which JSON is a part.
    (folder / MLMODEL).write_text(json.dumps(model, indent=1) + "\n")
    (folder / PYTHON_ENVIRONMENT).write_text(json.dumps(environment, indent=1) + "\n")
    (folder / INPUT_EXAMPLE).write_text(json.dumps(_make_example(manifest.target, read_shape(folder).feature_width)))
    (folder / REQUIREMENTS).write_text("\n".join(requirements) + "\n")
    (folder / CARD).write_text(card)


def _scoring_settings(settings: Settings, device: torch.device) -> dict[str, dict[str, object]]:
    """Return the settings on which scores depend, by section, with absolute paths and the dtype of the device."""
    target, train = settings.target, settings.train
    dtype = str(select_dtype(train.dtype, device)).removeprefix("torch.")
    return {
        "target": {
            "path": str(Path(target.path).resolve()),
            "fingerprint_cache": str(Path(target.fingerprint_cache).resolve()) if target.fingerprint_cache else "",
        },
        "serve": {"num_speculative_tokens": settings.serve.num_speculative_tokens},
        "train": {
            "dtype": dtype,
            "max_sample_tokens": train.max_sample_tokens,
            "context_tokens": train.context_tokens,
        },
    }


def _make_example(target: str, feature_width: int) -> dict[str, object]:
    """Return a row in pandas' orientation ``split``. It is made up: a row of the table would reveal traffic."""
    tokens = [0, 1, 2, 3]
    row = {
        "request": "example",
        "target": target,
        "position": 0,
        "tokens": tokens,
        "next_token": 4.0,
        "features": base64.b64encode(bytes(len(tokens) * feature_width * torch.bfloat16.itemsize)).decode(),
        "feature_width": feature_width,
        "loss_mask": [False, True, True, True],
        "top_k": 1,
        "teacher_ids": [2, 3, 4],
        "teacher_logprobs": [0.0, 0.0, 0.0],
        "temperature": 0.0,
        "top_p": 1.0,
        "sampling_top_k": 0.0,
    }
    return {"columns": list(row), "data": [list(row.values())]}


class DraftScorer:
    """Scores a version's draft on rows of the table ``accepted``."""

    def __init__(self, draft: EagleDraft, target: str, settings: Settings) -> None:
        """Read the embeddings of the target.

        Args:
            draft: The draft.
            target: Fingerprint of its target.
            settings: With the folder of the target.

        Raises:
            CheckpointError: the folder holds another target.
        """
        folder = Path(settings.target.path)
        found = target_fingerprint(folder, settings.target.fingerprint_cache)
        if found != target:
            raise CheckpointError(
                f"{folder}: target {found}, but the version is of target {target}; name its folder with "
                'model_config={"target": {"path": FOLDER}}'
            )
        self._device = select_device(settings.train.device, "train.device")
        self._draft, self._target, self._settings = draft, target, settings
        self._embeddings_VH = read_embeddings(folder).to(self._device)
        self._frozen = FrozenTarget(folder, draft.shape.capture_layers, self._device)

    def predict(self, model_input: Any) -> Any:
        """Return a data frame with ``OUTPUTS`` for each request, in the order of their first rows.

        Args:
            model_input: Data frame with the columns ``INPUTS``, rows in any order. Rows of a request that follow each
                other are joined, as by the trainer.

        Raises:
            ValueError: a row is of another target, or has neither features nor the start of its request.
        """
        rows = [self._check(_to_row(one)) for one in model_input.to_dict("records")]
        samples = [sample for request in join_rows(rows) for sample in self._cut(request)]
        settings, lookahead = self._settings, self._settings.serve.num_speculative_tokens
        with autocast(settings.train, self._device):
            chains = simulate_each(self._draft, self._embeddings_VH, samples, lookahead)
        walks: dict[str, list[SimulatedAcceptance]] = {row["request"]: [] for row in rows}
        for sample, walk in zip(samples, walk_requests(samples, chains), strict=True):
            walks[sample.request].append(walk)
        scores = [_describe(request, sum_acceptance(parts)) for request, parts in walks.items()]
        return pa.Table.from_pylist(scores, schema=_OUTPUT_SCHEMA).to_pandas()

    def _check(self, row: Row) -> Row:
        if row["target"] != self._target:
            raise ValueError(f"request {row['request']}: of target {row['target']}, the version is of {self._target}")
        if row["feature_width"] != self._draft.shape.feature_width:
            raise ValueError(
                f"request {row['request']}: feature_width {row['feature_width']}, the version reads "
                f"{self._draft.shape.feature_width} values; score rows of its own line"
            )
        if not provides_features(row):
            raise ValueError(
                f"request {row['request']}, position {row['position']}: no features, and they cannot be recomputed "
                "without the request's first tokens; leave the row out"
            )
        return row

    def _cut(self, request: Sample) -> list[Sample]:
        train = self._settings.train
        parts = split_sample(request, train.max_sample_tokens, train.context_tokens)
        states = self._frozen.compute_states
        return [part if part.has_features else recompute_features(part, states) for part in parts]


def join_rows(rows: Iterable[Row]) -> Iterator[Sample]:
    """Yield the joined chunks of each request; a missing chunk ends a sample, and the next one begins another."""
    by_request: dict[str, list[Sample]] = {}
    for row in rows:
        by_request.setdefault(row["request"], []).append(read_sample(row, ()))
    for chunks in by_request.values():
        run: list[Sample] = []
        for chunk in sorted(chunks, key=lambda one: (one.position, len(one))):
            if run and not continues(run, chunk):
                yield join_samples(run)
                run = []
            run.append(chunk)
        yield join_samples(run)


def _describe(request: str, accepted: SimulatedAcceptance) -> dict[str, object]:
    """Return a row with ``OUTPUTS``."""
    return {
        "request": request,
        "accepted_tokens": float(accepted.tokens),
        "verify_steps": float(accepted.verify_steps),
        "acceptance_length": 1 + accepted.accepted_per_step if accepted.verify_steps else None,
    }


def _to_row(record: Mapping[str, Any]) -> Row:
    """Return a row of the table from one of a data frame, where a null is NaN and missing columns are missing."""
    row: dict[str, Any] = {str(one["name"]): record.get(str(one["name"])) for one in INPUTS}
    for name in ("next_token", "temperature", "top_p", "sampling_top_k"):
        value = row[name]
        row[name] = None if value is None or value != value else value  # noqa: PLR0124 - NaN
    for name in ("next_token", "sampling_top_k"):
        row[name] = None if row[name] is None else int(row[name])
    return row | {"time": _EPOCH, "label": None, "prompt_key": None}


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> DraftScorer:
    """Return the scorer of a version; MLflow calls this.

    Args:
        path: Folder of the version.
        model_config: Settings, by section.

    Raises:
        CheckpointError: a file of the version is altered, or ``target.path`` holds another target.
    """
    manifest = read_manifest(Path(path))
    draft = read_checkpoint(Path(path), manifest.line)
    return DraftScorer(draft, manifest.target, Settings.model_validate(model_config or {}))
