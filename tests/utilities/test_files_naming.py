from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.utilities.files import printable

NAMES = st.binary(min_size=1).map(lambda data: data.decode("utf-8", "surrogateescape"))


@given(NAMES)
def test_any_file_name_becomes_one_line_of_utf_8(name):
    shown = printable(name)
    assert shown.encode("utf-8")
    assert len(shown.splitlines()) == 1
    assert shown.isprintable()


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_readable_names_stay_as_they_are(name):
    assert printable(name) == name


def test_marks_that_turn_writing_around_are_shown():
    assert printable("a\u202egnp.exe") == "a\\u202egnp.exe"
