"""The probe of the table store: a store that confirms several commits of one version is refused before any record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from overwriting_proxy import overwriting_proxy
from pyarrow.fs import FileSelector, FileType
from stream_worker import stream_settings, worker

from ops.bench.object_store import ObjectStore
from ops.observe.doctor.checks import CheckContext, Finding
from ops.observe.doctor.services import check_tables
from pipeline import topics
from pipeline.delta import DeltaLog
from pipeline.store_probe import UnsafeStoreError, check_store
from schemas.settings import Settings, Tables


def tables_at(store: ObjectStore, prefix: str, options: dict[str, str]) -> Tables:
    return Tables(uri=f"{store.bucket}/{prefix}", storage_options=options)


def files_of(settings: Tables) -> list[str]:
    """Return the files below the tables' address."""
    store = DeltaLog(settings).filesystem("")
    found = store.get_file_info(FileSelector("", recursive=True))
    return [one.path for one in found if one.type == FileType.File and one.size]


def findings(tables: Tables) -> list[Finding]:
    return list(check_tables(CheckContext(Settings(tables=tables))))


def test_stores_with_conditional_writes_pass_and_keep_nothing(object_store: ObjectStore, tmp_path: Path) -> None:
    for settings in (tables_at(object_store, "probed", object_store.options()), Tables(uri=str(tmp_path / "tables"))):
        for _ in range(3):
            check_store(settings)
        assert files_of(settings) == []


def test_store_that_replaces_commits_is_refused(
    object_store: ObjectStore, broker: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    with overwriting_proxy(object_store, port) as finish:
        unsafe = tables_at(object_store, "unsafe", object_store.options(port))
        for _ in range(3):
            with pytest.raises(UnsafeStoreError, match=r"tables\.uri.*If-None-Match"):
                check_store(unsafe)
        assert files_of(unsafe) == []
        settings = stream_settings(broker, tmp_path, free_port()).model_copy(update={"tables": unsafe})
        topics.create(settings.kafka)
        with worker(settings, tmp_path / "worker.log") as process:
            assert process.wait(60) == 1
        assert "If-None-Match" in (tmp_path / "worker.log").read_text()
        assert files_of(unsafe) == []
        confirmed = finish()
    assert confirmed
    assert all("_probe-" in path for path in confirmed)


def test_doctor_reports_a_store_that_replaces_commits(object_store: ObjectStore, free_port: Callable[[], int]) -> None:
    port = free_port()
    DeltaLog(tables_at(object_store, "diagnosed", object_store.options())).create()
    with overwriting_proxy(object_store, port):
        found = findings(tables_at(object_store, "diagnosed", object_store.options(port)))
    assert ["If-None-Match" in finding.found for finding in found if finding.level == "problem"] == [True]
    assert [finding.level for finding in findings(tables_at(object_store, "diagnosed", object_store.options()))] == [
        "ok"
    ]
