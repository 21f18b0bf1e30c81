"""A target's fingerprint follows its bytes, and an unchanged file is read once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from schemas.speculator import target_fingerprint as module
from schemas.speculator.checkpoint import CheckpointError, hash_file
from schemas.speculator.target_fingerprint import target_fingerprint

NAMES = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"the bytes of {name}")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache" / "fingerprints.json")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files count as unchanged at once."""
    monkeypatch.setattr(module, "SETTLED_S", -60.0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    names: list[str] = []

    def recording(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(module, "hash_file", recording)
    return names


def change(path: Path) -> None:
    """Change a byte in place; size, inode and time of modification stay."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_text(path.read_text().swapcase())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_text(path.read_text().swapcase())
    other.replace(path)


def extend(path: Path) -> None:
    path.write_text(path.read_text() + "more")


def test_it_depends_on_configuration_and_weights_only(target: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"target\.path"):
        target_fingerprint(tmp_path)
    before = target_fingerprint(target)
    assert before == target_fingerprint(target)
    (target / "tokenizer.json").write_text("{}")
    assert target_fingerprint(target) == before
    for name in NAMES:
        extend(target / name)
        assert target_fingerprint(target) != before
        before = target_fingerprint(target)


@pytest.mark.usefixtures("settled")
def test_a_second_start_reads_no_file(target: Path, cache: str, read: list[str]) -> None:
    assert target_fingerprint(target, cache) == target_fingerprint(target)
    read.clear()
    assert target_fingerprint(target, cache) == target_fingerprint(target)
    assert read == list(NAMES), "only those of the call without a cache"


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("how", [change, replace, extend])
@pytest.mark.parametrize("name", [NAMES[0], NAMES[2]])
def test_a_changed_file_is_read_again(
    target: Path, cache: str, read: list[str], name: str, how: Callable[[Path], None]
) -> None:
    before = target_fingerprint(target, cache)
    how(target / name)
    read.clear()
    after = target_fingerprint(target, cache)
    assert read == [name]
    assert before != after == target_fingerprint(target)


def test_the_hash_of_a_file_that_just_changed_is_not_kept(target: Path, cache: str, read: list[str]) -> None:
    for _ in range(2):
        target_fingerprint(target, cache)
    assert read == [*NAMES, *NAMES]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"/a": {"size": 1}}', b'{"/a": 3}'])
def test_a_corrupt_cache_is_ignored_and_replaced(target: Path, cache: str, read: list[str], content: bytes) -> None:
    Path(cache).parent.mkdir()
    Path(cache).write_bytes(content)
    assert target_fingerprint(target, cache) == target_fingerprint(target)
    read.clear()
    target_fingerprint(target, cache)
    assert not read


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_prevents_no_start(target: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert target_fingerprint(target, str(tmp_path / "file" / "cache.json")) == target_fingerprint(target)


@pytest.mark.usefixtures("settled")
def test_targets_share_a_cache_and_removed_ones_leave_it(target: Path, cache: str, read: list[str]) -> None:
    other = target.with_name("other")
    other.mkdir()
    for name in NAMES:
        (other / name).write_text(f"other bytes of {name}")
    for folder in (target, other):
        target_fingerprint(folder, cache)
    read.clear()
    target_fingerprint(target, cache)
    assert not read
    for name in NAMES:
        (other / name).unlink()
    extend(target / NAMES[0])
    target_fingerprint(target, cache)
    assert "other" not in Path(cache).read_text()


@pytest.mark.usefixtures("settled")
def test_processes_may_start_at_the_same_time(target: Path, cache: str, read: list[str]) -> None:
    expected = target_fingerprint(target)
    end = time.monotonic() + 0.3

    def start(_: int) -> set[str]:
        found = set()
        while time.monotonic() < end:
            found.add(target_fingerprint(target, cache))
        return found

    with ThreadPoolExecutor(8) as pool:
        assert set.union(*pool.map(start, range(8))) == {expected}
    read.clear()
    assert target_fingerprint(target, cache) == expected
    assert not read
