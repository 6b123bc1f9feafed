"""RecBole's own atomic files and those of others."""

import logging

import pytest

from llmrec_peft.data.log import BehaviorLog
from tests.support.log_files import MOMENT, NOW, inter, refused, titles


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)


# Kind: RecBole's own and others' atomic files.


@pytest.mark.parametrize(
    ("header", "row", "title"),
    [
        ("item_id:token\tcategory_name:token\tproduct_name:token", "1\tShoes\tRed runner", "Red runner"),
        ("item_id:token\tname:token_seq\tstore_name:token", "1\tRed runner\tAcme", "Red runner"),
        ("item_id:token\tuser_name:token\tmovie_title:token_seq", "1\tJo\tRed runner", "Red runner"),
        ("app_name:token\tdeveloper:token\tid:token", "Red runner\tAcme\t1", "Red runner"),
        ("item_id:token\tbrand_name:token", "1\tAcme", "1"),
        ("item_id:token\tcategories:token_seq\tprice:float", "1\tA B\t5", "1"),
        ("item_id:token\tbrand:token\ttitle_length:float", "1\tG\t5", "1"),
        ("item_id:token\tbrand:token\tmean_title:float", "1\tG\t5", "1"),
        ("item_id:token\thostname:token", "1\twww", "1"),
        ("item_id:token\tsubtitle:token", "1\tS", "1"),
        ("item_id:token\tusername:token\timage_filename:token", "1\tBob\tb.jpg", "1"),
        ("item_id:token\ttitle_language:token\tnamed_by:token", "1\ten\tBob", "1"),
    ],
)  # fmt: skip
def test_the_title_in_recbole_items(tmp_path, caplog, header, row, title):
    """Names of a category, brand or shop are no titles, nor are numbers and parts of words; without any, ids are."""
    log = BehaviorLog.read(inter(tmp_path, x__item=f"{header}\n{row}\n"))
    assert titles(log) == {"1": title}
    assert ("no column holds titles" in caplog.text) == (title == "1")


def test_titles_in_recbole_interactions_and_titles_that_compete(tmp_path):
    """A title in .inter is used, with or without .item; two columns that may both be it are named."""
    header, row = "user_id:token\titem_id:token\ttitle:token_seq\ttimestamp:float", f"u\t1\tA thing\t{NOW}"
    assert titles(BehaviorLog.read(inter(tmp_path, header, row))) == {"1": "A thing"}
    assert titles(BehaviorLog.read(inter(tmp_path, header, row, x__item="item_id:token\tbrand:token\n1\tB\n"))) == {
        "1": "A thing"
    }
    message = refused(inter(tmp_path, x__item="item_id:token\tlong_name:token\tshort_name:token\n1\ta\tb\n"))
    assert "x.item has no title but long_name, short_name; rename the one that is the item's to title" in message


def test_a_guessed_title_is_reported(tmp_path, caplog):
    """A name that does not say whose title it is; productName is product_name; a title that is a number is refused."""
    for name, guessed in (("display_name", True), ("original_title", True), ("productName", True), ("name", False)):
        caplog.clear()
        assert titles(BehaviorLog.read(inter(tmp_path, x__item=f"item_id:token\t{name}:token\n1\tA\n"))) == {"1": "A"}
        assert (f"no column is called title; {name} is taken for it" in caplog.text) == guessed
    message = refused(inter(tmp_path, x__item="item_id:token\ttitle:float\n1\t300\n"))
    assert "x.item has title:float" in message and "write title:token" in message


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_recbole_with_other_separators(tmp_path, caplog, separator):
    """Commas, semicolons and bars are read; spaces are refused by the header."""
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float".replace("\t", separator)
    log = BehaviorLog.read(inter(tmp_path, header, f"u\t1\t5.0\t{NOW}".replace("\t", separator)))
    assert log.column("rating").to_pylist() == [5.0] and f"separated by {separator!r}" in caplog.text
    assert "separated by tabs" in refused(inter(tmp_path, "user_id:token item_id:token timestamp:float", f"u 1 {NOW}"))


@pytest.mark.parametrize("name", ["venue_id", "artist_id", "business_id", "product_id", "movie_id"])
def test_recbole_items_under_other_names(tmp_path, caplog, name):
    """foursquare, lastfm, yelp, steam and others; .item has the same name, or id."""
    header = f"user_id:token\t{name}:token\ttimestamp:float"
    for key in (name, "id", "item_id"):
        log = BehaviorLog.read(inter(tmp_path, header, x__item=f"{key}:token\tname:token\n1\tA\n"))
        assert titles(log) == {"1": "A"} and f"the column {name} is read as item_id" in caplog.text
    both = inter(tmp_path, f"user_id:token\t{name}:token\tvideo_id:token\ttimestamp:float", f"u\t1\t2\t{NOW}")
    assert f"lacks item_id and has {name}, video_id" in refused(both) or f"has video_id, {name}" in refused(both)


def test_recbole_floats_that_are_none(tmp_path, caplog):
    """yelp's `yelping_since:float` and `date:float` hold dates: read as text, and as times."""
    header = "user_id:token\tbusiness_id:token\tstars:float\tdate:float"
    log = BehaviorLog.read(
        inter(
            tmp_path,
            header,
            "u\tb\t4.0\t2020-01-02 03:04:05",
            x__user="user_id:token\tyelping_since:float\tfans:float\nu\t2011-04-02 10:11:12\t3\n",
            x__item="business_id:token\titem_name:token_seq\tstate:token\nb\tThe Bar\tIT\n",
        )
    )
    assert log.timestamps.tolist() == [MOMENT] and log.column("rating").to_pylist() == [4.0]
    assert log.column("yelping_since").to_pylist() == ["2011-04-02 10:11:12"] and log.column("fans").to_pylist() == [
        3.0
    ]
    assert titles(log) == {"b": "The Bar"} and "column yelping_since does not hold double alone" in caplog.text
    caplog.clear()
    rows = "\n".join(f"u\tb\t{value}\t{NOW}" for value in ("4e0", "NA", "good", "bad"))
    log = BehaviorLog.read(
        inter(tmp_path / "rating", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows)
    )
    assert log.column("rating").to_pylist() == ["4e0", "NA", "good", "bad"]
    assert "2 of its 4 values do not fit, the first in row 2 ('good'); read as text" in caplog.text
    message = refused(inter(tmp_path / "lastfm", "user_id:token\tartist_id:token\tweight:float", "2\t51\t13883"))
    assert "x.inter has no timestamp:float" in message and "needs an order" in message
