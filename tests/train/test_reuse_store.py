"""What is kept is never trusted: other weights, changed rows, damaged files and a full disk are noticed and said."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_cases import GAPS, collate, computed, doubles, examples, reft, reuse, with_reuse

from conftest import tiny_llama
from families import tiny
from reftune.train.reuse import DeviceStore, DiskStore, MemoryStore, store, store_near
from reftune.train.reuse.fingerprint import fingerprint, weights_digest

pytestmark = GAPS
MARK = {"base weights": "a", "versions": "1"}
ENTRY = {"k1 v1": torch.arange(24.0).view(2, 3, 4), "state": torch.ones(2, 2, dtype=torch.bfloat16)}


def opened(directory: Path, budget: int = 10**9, mark: Any = None) -> tuple[DiskStore, list[str]]:
    said: list[str] = []
    kept = DiskStore(directory, budget)
    kept.say = said.append
    kept.open(mark or MARK)
    return kept, said


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.safetensors"))


def test_entries_survive_a_restart_mapped_into_memory(tmp_path: Path) -> None:
    first, _ = opened(tmp_path)
    assert first.get("aa11") is None
    assert first.put("aa11", ENTRY)
    again, said = opened(tmp_path)
    found = again.get("aa11")
    assert found is not None
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in ENTRY.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in ENTRY.items())
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert files(tmp_path)[0].name in maps.read_text()
    assert again.used > store.size_of(ENTRY)
    assert not said


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-10])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    else:  # another entry's file under this name
        path.write_bytes(next(p for p in files(path.parents[1]) if p != path).read_bytes())


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "another"])
def test_a_damaged_file_is_said_and_computed_anew(tmp_path: Path, how: str) -> None:
    model = reft(tiny("llama"), "l2")
    batch = collate(examples())
    kept = DiskStore(tmp_path, 10**9)
    with_reuse(reuse(model, store=kept)[0], batch, True)
    count = len(files(tmp_path))
    damage(files(tmp_path)[1], how)
    kept = DiskStore(tmp_path, 10**9)
    engine, said = reuse(model, store=kept)
    with doubles():
        plain = computed(model, dict(batch))
        found = with_reuse(engine, batch, True)
    assert abs(found[0] - plain[0]) < 1e-6
    assert (found[1] - plain[1]).norm() < 1e-6 * plain[1].norm()
    assert len(said) == 1
    assert "cannot be used" in said[0]
    assert (kept.found, kept.computed) == (3, 1)
    assert len(files(tmp_path)) == count  # it is there again, and good
    again, said = reuse(model, store=DiskStore(tmp_path, 10**9))
    with_reuse(again, batch, True)
    assert again.store.found == 4
    assert not said


def test_a_changed_row_is_computed_anew(tmp_path: Path) -> None:
    model = reft(tiny("llama"), "l2")
    rows = examples()
    with_reuse(reuse(model, store=DiskStore(tmp_path, 10**9))[0], collate(rows), True)
    rows[2]["input_ids"][0] += 1
    engine, _ = reuse(model, store=DiskStore(tmp_path, 10**9))
    with doubles():
        plain = computed(model, dict(collate(rows)))
        found = with_reuse(engine, collate(rows), True)
    assert (found[1] - plain[1]).norm() < 1e-6 * plain[1].norm()
    assert (engine.store.found, engine.store.computed) == (3, 1)


def test_another_base_is_said_and_not_used(tmp_path: Path) -> None:
    opened(tmp_path)[0].put("aa11", ENTRY)
    other, said = opened(tmp_path, mark={**MARK, "base weights": "b"})
    assert other.get("aa11") is None
    assert len(said) == 1
    assert "is for other base weights, and is not used" in said[0]
    back, said = opened(tmp_path)
    assert back.get("aa11") is not None
    assert not said
    files(tmp_path)[0].rename(other.folder / "aa11.safetensors")
    (other.folder / "aa").mkdir()
    (other.folder / "aa11.safetensors").rename(other._path("aa11"))
    assert other.get("aa11") is None  # moved by hand: the file itself says whose it is


def test_a_full_disk_is_said_once_and_the_result_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reft(tiny("llama"), "l2")
    batch = collate(examples())
    engine, said = reuse(model, store=DiskStore(tmp_path, 10**9))
    with_reuse(engine, collate(examples(1, seed=5)), True)
    before = files(tmp_path)
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        write(self, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with doubles():
        plain = computed(model, dict(batch))
        for _ in range(2):
            found = with_reuse(engine, batch, True)
            assert (found[1] - plain[1]).norm() < 1e-6 * plain[1].norm()
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert files(tmp_path) == before
    assert not list(tmp_path.rglob(".*.safetensors*"))  # nothing half-written


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = reft(tiny_llama(), "l2")
    engine, said = reuse(model, store=DiskStore(tmp_path / "file" / "reuse", 10**9))
    with_reuse(engine, collate(examples()), True)
    assert "nothing more can be written" in said[0]


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_the_budget_is_kept(tmp_path: Path, kind: str) -> None:
    model = reft(tiny("llama"), "l2")
    budget = 15_000
    kept = MemoryStore(budget) if kind == "memory" else DiskStore(tmp_path, budget)
    engine, said = reuse(model, store=kept)
    batch = collate(examples(6))
    with doubles():
        plain = computed(model, dict(batch))
        for _ in range(2):
            found = with_reuse(engine, batch, True)
            assert (found[1] - plain[1]).norm() < 1e-6 * plain[1].norm()
    assert 0 < kept.used <= budget
    assert kept.full
    assert 0 < kept.found < 6
    assert len(said) == 1
    assert "budget of 15.0 kB" in said[0]
    with pytest.raises(ValueError, match="number of bytes"):
        MemoryStore(-1)
    assert MemoryStore().budget > 10**6
    assert DiskStore(tmp_path / "new" / "er").budget > 0


def test_the_digest_sees_every_change() -> None:
    base = tiny_llama()
    seen = {weights_digest(base)}
    for parameter in base.parameters():
        flat = parameter.data.view(-1)
        for place in (0, len(flat) // 2, len(flat) - 1):
            flat[place] += 1e-3
            seen.add(weights_digest(base))
        flat[:2] = flat[:2].flip(0)
        seen.add(weights_digest(base))
    assert len(seen) == 1 + 4 * len(list(base.parameters()))
    half = tiny_llama(dtype=torch.bfloat16)
    mark = fingerprint(half, None)
    half.model.norm.weight.data[7] += 1
    assert store.differences(fingerprint(half, None), mark) == "base weights"
    half.model.norm.weight.data[7] -= 1
    assert fingerprint(half, None) == mark
    assert store.differences(fingerprint(half, torch.float16), mark) == "precision"


# -- on an accelerator ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What torch would say of a GPU's memory, in bytes."""
    says = {"free": 1000, "total": 1000, "memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (says["free"], says["total"]))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: says[name])
    return says


def head(count: int) -> dict[str, torch.Tensor]:
    return {"k0 v0": torch.zeros(count // 4)}


def test_near_an_accelerator_a_quarter_of_what_is_free_is_used(gpu: dict[str, int]) -> None:
    kept = store_near(torch.device("cuda"))
    said: list[str] = []
    kept.say = said.append
    assert kept.budget == 250
    assert kept.put("a", head(200))
    assert kept.put("s", {"state": torch.zeros(5)})
    assert not said
    assert not kept.put("b", head(200))  # computed each time
    assert kept.get("b") is None
    assert kept.put("t", {"state": torch.ones(5)})  # worth fetching from main memory
    assert torch.equal(kept.get("t")["state"], torch.ones(5))
    assert kept.used == 220
    assert len(said) == 1
    assert "no more room in the memory of cuda (220 B are kept)" in said[0]
    kept.clear()
    assert kept.get("t") is None
    assert kept.get("a") is None
    assert kept.put("b", head(200))


def test_what_a_step_has_needed_stays_free(gpu: dict[str, int]) -> None:
    gpu |= {"free": 100, "memory_allocated": 300, "memory_reserved": 500, "max_memory_allocated": 400}
    kept = store_near(torch.device("cuda"), 10**9)
    # 100 free and 200 idle, of which a step takes 100 again and 100 are spared: 100 are left
    assert kept.put("a", head(96))
    assert not kept.put("b", head(104))


def test_a_budget_bounds_both_memories(gpu: dict[str, int]) -> None:
    said: list[str] = []
    for budget, free in ((0, 1000), (30, 50), (30, 1000)):  # of the last two the first has no room on the device
        gpu["free"] = free
        kept = store_near(torch.device("cuda"), budget)
        kept.say = said.append
        assert kept.put("s", {"state": torch.zeros(5)}) == (budget == 30)
        assert not kept.put("t", {"state": torch.zeros(5)})
        assert not kept.put("u", {"state": torch.zeros(5)})
    assert len(said) == 3  # once each


def test_tensors_stay_where_they_were_made(gpu: dict[str, int]) -> None:
    assert type(store_near(torch.device("cpu"), 10**6)) is MemoryStore
    kept = store_near(torch.device("cuda"))
    assert type(kept) is DeviceStore
    assert kept.put("a", {"state": torch.ones(2, device="meta")})
    assert kept.get("a")["state"].device.type == "meta"
