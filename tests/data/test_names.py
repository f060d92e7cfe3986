"""Names of labels and clients: one for each value, whatever wrote it; and ids that may stand in paths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.core import CLIENT_ID
from consilium.data.names import MISSING, alike, by_client, client_ids, name_of, without
from consilium.errors import DataError


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("ill ", "ill"), (" \u00a0ill\t\n", "ill"), ("\ufeffill\u200b", "ill"), ("Ko\u0308ln", "Köln"),
        ("a  b", "a  b"), ("none", "none"), ("0", "0"), ("", None), ("  ", None), (None, None),
        (" NA ", None), ("北京协和", "北京协和"),
        *((word, None) for word in sorted(MISSING)),
    ],
)  # fmt: skip
def test_a_name_is_the_characters_without_blanks(value, name):
    assert name_of(value) == name


def test_a_name_that_is_declared_is_no_missing_value():
    assert name_of("NA", ("NA", "EU")) == "NA"
    assert without(["NA", "", None, "x", " NA"], [0, 1, 2, 4]) == "NA 2, empty 2"


def test_names_that_differ_in_writing_alone_are_pointed_out():
    assert alike(["Cardiology", "cardiology", "Neuro"]) == [("Cardiology", "cardiology")]
    assert alike(["North-East", "north east", "Köln", "Koln"]) == [("Koln", "Köln"), ("North-East", "north east")]
    assert alike(["A", "\u0410"]) == [("A", "\u0410")]  # Cyrillic
    assert alike(["O10", "010", "Il", "11"]) == [("010", "O10"), ("11", "Il")]
    assert alike([chr(97 + i) for i in range(26)]) == [] == alike(map(str, range(200)))


def test_ids_can_be_read_where_a_name_can():
    ids = client_ids(["north", "St. Mary's", "Köln", "北京协和", "x" * 300, "0012", ".hidden", "Straße 5"])
    assert {name: ids[name] for name in ("north", "St. Mary's", "Köln", "0012", "Straße 5")} == {
        "north": "north", "St. Mary's": "St.-Mary-s", "Köln": "Koln", "0012": "0012", "Straße 5": "Strasse-5",
    }  # fmt: skip
    assert ids["北京协和"].startswith("client-") and ids["x" * 300].startswith("xxx") and ids[".hidden"] == "hidden"
    assert (
        client_ids(["a b", "a/b"]).keys() == {"a b", "a/b"} and len({*client_ids(["a b", "a/b", "A b"]).values()}) == 3
    )


@given(st.lists(st.text(min_size=1, max_size=80), max_size=12))
def test_every_name_has_an_id_of_its_own(names):
    ids = client_ids(names)
    assert ids.keys() == set(names) and len({id.lower() for id in ids.values()}) == len(ids)
    assert all(CLIENT_ID.fullmatch(id) for id in ids.values())
    held, told = by_client(names)
    assert {told.get(id, id): rows for id, rows in held.items()} == {
        name: [i for i, other in enumerate(names) if other == name] for name in names
    }


def test_a_name_like_the_id_of_another_is_refused():
    taken = client_ids(["北京"])["北京"]
    with pytest.raises(DataError, match="rename one of the two"):
        client_ids(["北京", taken])
