from pathlib import Path

import pytest

from lightning_iet.data.images import absent, damaged, one_line_download


def test_what_is_not_there_is_named_with_all_remedies():
    message = str(absent("Pictures", "pictures.bin", Path("here")))
    for part in ("Pictures (pictures.bin)", "'here'", "`download: true`", "`synthetic: true`"):
        assert part in message
    assert "'here'" in str(damaged("Pictures", Path("here")))


@pytest.mark.parametrize("error", [OSError("a\nb"), RuntimeError("a\nb")])
@pytest.mark.parametrize("place", [None, Path("here")])
def test_a_failed_download_is_one_line(error, place):
    failed = r"^Pictures could not be fetched \(a b\)\. Without a network"
    with pytest.raises(ConnectionError, match=failed) as caught, one_line_download("Pictures", place):
        raise error
    assert ("'here'" in str(caught.value)) == (place is not None)
    assert str(caught.value).endswith("as `root`.")
