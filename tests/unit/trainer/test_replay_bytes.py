"""The replay buffer stays within its bytes in memory and on disk, and loses no feature that it keeps."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data_loader_world import MemoryLog, World, as_json, drain, names, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor

from schemas.settings import Train
from trainer.data.feature_files import FeatureFiles, load_features
from trainer.data.replay_buffer import ReplayBuffer, ReplayEntry
from trainer.data.samples import Branch, Sample, StoredFeatures, Teacher, split_sample

WIDTH = 24


def teacher(rows: int, vocabulary: int = 20) -> Teacher:
    return Teacher(torch.randint(0, vocabulary, (rows, 8)), torch.randn(rows, 8))


def sample(tokens: int, width: int = WIDTH, vocabulary: int = 20) -> Sample:
    """Return a sample with random features and one rejected branch."""
    return Sample(
        request="r",
        tokens=torch.randint(0, vocabulary, (tokens,)),
        next_token=None,
        features=torch.randint(0, 1 << 15, (tokens, width), dtype=torch.int16).view(torch.bfloat16),
        known=torch.ones(tokens, dtype=torch.bool),
        teacher=teacher(tokens, vocabulary),
        branches=(Branch(1, (1, 2), 0, (-0.5, -0.5), teacher(2, vocabulary)),),
        suffix_predicted=torch.zeros(tokens, dtype=torch.bool),
    )


def buffer_of(folder: Path, *, total: int, memory: int, **more: object) -> ReplayBuffer[ReplayEntry]:
    train = Train.model_validate({"replay_buffer_bytes": total, "replay_memory_bytes": memory, **more})
    return ReplayBuffer(train, random.Random(0), FeatureFiles(folder))


def tensors(one: Sample) -> Iterator[Tensor]:
    yield from (one.tokens, one.known, one.features, one.preceding)
    if one.suffix_predicted is not None:
        yield one.suffix_predicted
    for distribution in (one.teacher, *(branch.teacher for branch in one.branches)):
        yield from (distribution.ids, distribution.logprobs)


def memory_of(entries: Iterator[ReplayEntry]) -> int:
    """Return the bytes of the memory behind all tensors, each piece of memory once."""
    storages = [one.untyped_storage() for entry in entries for one in tensors(entry.sample)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def bits(features: Tensor) -> Tensor:
    return features.contiguous().view(torch.int16)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), total=st.integers(2_000, 40_000), memory=st.integers(2_000, 40_000))
def test_bytes_in_memory_and_on_disk_are_exact_and_bounded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, total: int, memory: int
) -> None:
    folder = tmp_path_factory.mktemp("features")
    buffer = buffer_of(folder, total=total, memory=memory, max_epochs=3, replay_buffer_size=12)
    added: dict[int, tuple[ReplayEntry, Tensor]] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        # Parts of one request share its memory until the buffer takes them.
        parts = split_sample(sample(data.draw(st.integers(2, 60))), max_tokens=20, context_tokens=8)
        for entry in [ReplayEntry(sample=part) for part in parts]:
            added[id(entry)] = entry, bits(entry.sample.features).clone()
            buffer.add(entry)
        for entry in buffer.draw(data.draw(st.integers(0, 2))):
            assert torch.equal(bits(load_features(entry.sample).features), added[id(entry)][1])
        assert buffer.limit_bytes() == 0
        buffer._files.end_step()  # type: ignore[union-attr]
        assert memory_of(iter(buffer)) == buffer.memory_bytes <= memory
        assert sum(file.stat().st_size for file in folder.iterdir()) == buffer.file_bytes
        assert buffer.memory_bytes + buffer.file_bytes <= total
        kept = [id(entry) for entry in buffer]
        assert kept == list(added)[len(added) - len(kept) :], "the newest are kept"
        in_memory = [entry.sample.has_features for entry in buffer if entry.epochs < 3]
        assert in_memory == sorted(in_memory), "the newest are in memory"


def test_of_a_70b_target_the_process_grows_by_the_memory_bound_alone(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    memory, total, width, vocabulary = 96 << 20, 400 << 20, 3 * 8192, 128_256
    buffer = buffer_of(tmp_path, total=total, memory=memory)
    largest = sample(400, width, vocabulary).feature_bytes
    before, grown = resident_bytes(), 0
    for number in range(50):
        buffer.add(ReplayEntry(sample=sample(250 + 50 * (number % 4), width, vocabulary)))
        for entry in buffer.draw(3):
            assert load_features(entry.sample).has_features
        buffer.limit_bytes()
        buffer._files.end_step()  # type: ignore[union-attr]
        grown = max(grown, resident_bytes() - before)
    assert buffer.file_bytes > 2 * memory
    # 800 MB were added; a sample was loaded, another was new, and one more did not fit between others.
    assert grown <= memory + 3 * largest
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == buffer.file_bytes <= total


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_file_holds_the_bits_of_the_features_until_it_is_removed(tmp_path: Path) -> None:
    files, one = FeatureFiles(tmp_path, kept_steps=1), sample(7)
    stored = files.store(one)
    assert isinstance(stored.stored, StoredFeatures)
    assert (stored.stored.size, stored.features.shape) == (one.features.nbytes, (0, WIDTH))
    assert Path(stored.stored.path).stat().st_mode & 0o777 == 0o600
    assert torch.equal(bits(load_features(stored).features), bits(one.features))
    assert (files.store(stored), load_features(one)) == (stored, one)
    files.remove(stored.stored)
    files.end_step()
    assert load_features(stored).has_features, "it is kept for one more step"
    files.end_step()
    assert not list(tmp_path.iterdir())


def test_files_are_deleted_at_the_start_and_at_the_end_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "step-0000000001").mkdir()
    FeatureFiles(tmp_path).store(sample(3))
    files = FeatureFiles(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-0000000001"]
    files.store(sample(3))
    files.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["step-0000000001"]


def test_without_a_usable_disk_the_buffer_shrinks_to_its_memory_and_recovers(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    folder.write_text("a file, not a folder")
    samples = [sample(20, width=1024) for _ in range(8)]
    size = samples[0].feature_bytes + samples[0].other_bytes
    buffer = buffer_of(folder, total=100 * size, memory=3 * size)
    entries = [ReplayEntry(sample=one) for one in samples]
    with capture_logs() as logs:
        failed = []
        for entry in entries[:6]:
            buffer.add(entry)
            failed.append(buffer.limit_bytes())
    assert failed == [0, 0, 0, 1, 1, 1]
    assert list(buffer) == entries[3:6]
    assert [(one["event"], one["setting"]) for one in logs] == [("features_not_stored", "train.spill_dir")]
    folder.unlink()
    for entry in entries[6:]:
        buffer.add(entry)
        assert buffer.limit_bytes() == 0
    assert list(buffer) == entries[3:]
    assert sum(file.stat().st_size for file in folder.iterdir()) == buffer.file_bytes > 0


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fill_disk(path: Path, content: memoryview) -> int:
        write(path, bytes(content)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    one = sample(5)
    assert FeatureFiles(tmp_path).store(one) is one
    assert not list(tmp_path.iterdir())


def world_of(count: int) -> World:
    world = World(MemoryLog())
    world.commit_as(requests(count))
    return world


SMALL: dict[str, object] = {"replay_buffer_bytes": 36_000, "replay_memory_bytes": 22_000, "max_epochs": 4}
"""Of forty samples, all tensors but the features take 22,720 bytes, and the features 19,200."""


def test_the_steps_of_a_data_loader_do_not_depend_on_where_features_are(tmp_path: Path) -> None:
    world = world_of(40)
    in_memory = world.data_loader(max_epochs=4)
    spilling = world.data_loader(max_epochs=4, replay_memory_bytes=24_000, spill_dir=str(tmp_path))
    stored = 0
    while True:
        for loader in (in_memory, spilling):
            loader.poll()
        expected, found = in_memory.next_samples(), spilling.next_samples()
        assert names(found) == names(expected)
        if not found:
            break
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.features, other.features)
        stored = max(stored, spilling.replay_bytes["disk"])
    assert stored > 0


@pytest.mark.parametrize("steps", [3, 9, 15])
def test_a_restart_keeps_the_samples_that_the_bytes_allow(tmp_path: Path, steps: int) -> None:
    world = world_of(40)
    loader = world.data_loader(spill_dir=str(tmp_path / "one"), **SMALL)
    for _ in range(steps):
        loader.poll()
        loader.next_samples()
    restored = world.data_loader(spill_dir=str(tmp_path / "two"), **SMALL)
    restored.restore(as_json(loader))
    assert restored.replay_bytes["memory"] <= 22_000
    assert drain(restored) == drain(loader)


def test_recomputed_features_are_spilled_too(tmp_path: Path) -> None:
    world = World(MemoryLog())
    for request in requests(30):
        world.commit_bare(request, 0)
    loader = world.data_loader(spill_dir=str(tmp_path), **SMALL)
    drain(loader)
    assert loader.counts["samples_recomputed"] == 30, "once each"


def test_a_sample_whose_file_is_unreadable_is_left_out_and_counted(tmp_path: Path) -> None:
    world = world_of(40)
    loader = world.data_loader(spill_dir=str(tmp_path), **SMALL)
    assert loader.counts["samples_unreadable"] == 0
    while not loader.replay_bytes["disk"]:
        loader.poll()
        loader.next_samples()
    for file in tmp_path.rglob("*.features"):
        file.write_bytes(b"short")
    with capture_logs() as logs:
        drain(loader)
    unreadable = [one for one in logs if one["event"] == "features_unreadable"]
    assert len(unreadable) == loader.counts["samples_unreadable"] > 0
    assert all("train.spill_dir" in one["error"] for one in unreadable)


def test_a_closed_data_loader_leaves_no_file(tmp_path: Path) -> None:
    world = world_of(40)
    loader = world.data_loader(spill_dir=str(tmp_path), **SMALL)
    while not loader.replay_bytes["disk"]:
        loader.poll()
        loader.next_samples()
    assert list(tmp_path.rglob("*.features"))
    loader.close()
    assert not list(tmp_path.rglob("*.features"))
