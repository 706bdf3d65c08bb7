from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from aggregator.files import make_private_folder, write_atomic
from edge_runtime.folder_lock import FolderInUseError, FolderLock


def test_a_written_file_is_private_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    (tmp_path / "model.npz.tmp").write_bytes(b"left by a crash")
    (tmp_path / "model.npz.tmp").chmod(0o644)
    write_atomic(path, b"old")
    write_atomic(path, b"new ", b"content")
    assert path.read_bytes() == b"new content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, b"half", "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_new_folders_are_private_and_old_ones_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private_folder(tmp_path / "state" / "inbox")
    make_private_folder(tmp_path / "state" / "inbox")
    modes = [
        stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path, tmp_path / "state", tmp_path / "state" / "inbox")
    ]
    assert modes == [0o755, 0o700, 0o700]


def test_a_second_holder_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()}:"):
        FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from edge_runtime.folder_lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert (tmp_path / "lock").read_text().strip().isdigit()
    FolderLock(tmp_path).release()
