"""Tar archives for tests."""

import io
import tarfile


def write_tar(path, members, mode="w"):
    """Write bytes by name, or pairs of both, into an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
