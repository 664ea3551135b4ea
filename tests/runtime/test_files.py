"""Errors while writing name their file, and leave what was there."""

import errno
import resource

import pytest

from runtime.files import naming, replace_text


def test_a_full_disk_is_told_with_its_path():
    full = pytest.raises(OSError, match="No space left on device: '/dev/full'")
    with full as told, naming("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    assert told.value.errno == errno.ENOSPC


def test_an_error_that_names_its_file_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "absent")), naming("another"):
        open(tmp_path / "absent")  # noqa: SIM115


def test_a_failed_replacement_leaves_what_was_there(tmp_path):
    path = tmp_path / "config.yaml"
    replace_text(path, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
    try:
        with pytest.raises(OSError, match=str(path)):
            replace_text(path, "x" * (1 << 12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
