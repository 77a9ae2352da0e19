"""What is checked before an agent starts: room, rights, and that no access can fault later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relevo.core.errors import StartupError
from services.kvtransfer import arena
from services.kvtransfer.arena import Arena, container_memory_left

MIB = 1 << 20


@pytest.fixture
def small_shm(tmp_path: Path) -> Iterator[Path]:
    """As Docker makes /dev/shm: a tmpfs of 64 MiB."""
    place = tmp_path / "shm"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "shm", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here: needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_dockers_default_shm_is_refused_with_the_fix(small_shm: Path) -> None:
    with pytest.raises(StartupError) as caught:
        Arena(small_shm, 256 * MIB)
    assert "--kv-arena 256MiB does not fit" in caught.value.message
    assert "64MiB free" in caught.value.message
    assert "--shm-size 288m" in caught.value.message
    assert not list(small_shm.iterdir())


def test_all_of_it_is_there_from_the_start(small_shm: Path) -> None:
    """A file with holes would be a bus error when somebody else has filled the tmpfs."""
    made = Arena(small_shm, 48 * MIB)
    assert made.path.stat().st_blocks * 512 >= 48 * MIB
    (small_shm / "filler").write_bytes(bytes(os.statvfs(small_shm).f_bavail * os.statvfs(small_shm).f_frsize))
    made.cut(MIB)
    for slot in range(made.num_slots):
        made.slot(slot)[:] = bytes([slot]) * MIB
    assert made.slot(47)[MIB - 1] == 47
    made.close()
    assert [path.name for path in small_shm.iterdir()] == ["filler"]


def test_room_that_went_meanwhile_is_refused(small_shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_check_space", lambda directory, num_bytes: None)
    with pytest.raises(StartupError, match="does not fit into"):
        Arena(small_shm, 65 * MIB)
    assert not list(small_shm.iterdir())


def test_containers_memory_limit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would end the agent, without a word, while it allocates."""
    assert container_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_memory_left(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{100 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{60 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {20 * MIB}\nactive_file {MIB}\n")
    assert container_memory_left(tmp_path) == 61 * MIB
    monkeypatch.setattr(arena, "_CGROUP", tmp_path)
    with pytest.raises(StartupError, match=r"container's memory, of which 61MiB are left.*--memory"):
        Arena(tmp_path, 62 * MIB)
    assert not list(tmp_path.glob("relevo-*"))


def test_folder_that_others_can_look_into_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / f"relevo-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(StartupError, match="mode 0700"):
        Arena(tmp_path, MIB)
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(StartupError, match="must be a directory of user"):
        Arena(tmp_path, MIB)
    assert not list(elsewhere.iterdir())
