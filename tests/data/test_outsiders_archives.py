"""MIND, Amazon, MovieLens and Taobao as published: read with a warning that counts, or refused by name."""

import logging

import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers import detect_format
from llmrec_peft.data.readers.amazon_items import price_of, shown_text
from tests.support.log_files import MOMENT, files, records, refused, titles


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)


# Kind: MIND, sampled or joined.

NEWS = "".join(f"N{n}\tnews\tlocal\tTitle {n}\tAbstract\thttp://x\t[]\t[]\n" for n in (1, 2, 3))
SHOWN = "1\tU1\t11/11/2019 9:05:58 AM\tN1\tN2-1 N3-0\n"


def test_mind_with_gaps_and_repeats(tmp_path, caplog):
    """Unknown articles of a history, articles twice, blank titles; an article with two texts is refused by its id."""
    log = BehaviorLog.read(files(tmp_path, behaviors__tsv=SHOWN.replace("\tN1\t", "\tN9 N1\t"), news__tsv=NEWS))
    assert titles(log) == {"N1": "Title 1", "N2": "Title 2", "N3": "Title 3", "N9": "N9"}
    assert "1 of 2 items have no metadata (those of histories are counted)" in caplog.text
    caplog.clear()
    log = BehaviorLog.read(files(tmp_path, behaviors__tsv=SHOWN, news__tsv=NEWS + NEWS[:-1]))
    assert len(titles(log)) == 3 and "3 exact repeats of articles dropped" in caplog.text
    caplog.clear()
    log = BehaviorLog.read(files(tmp_path, behaviors__tsv=SHOWN, news__tsv=NEWS.replace("Title 1", " ")))
    assert titles(log)["N1"] == "N1" and "1 items have no title" in caplog.text
    files(tmp_path, news__tsv=NEWS + NEWS.replace("Title 2", "Other"))
    assert "news.tsv has 1 articles with rows that differ (first: N2)" in refused(tmp_path)
    log = BehaviorLog.read(
        files(tmp_path, behaviors__tsv="\ufeff" + SHOWN.replace("\n", "\r\n"), news__tsv="\ufeff" + NEWS)
    )
    assert log.column("item_id").to_pylist() == ["N1", "N2", "N3"]


# Kind: Amazon of every year.


@pytest.mark.parametrize(
    ("price", "number"),
    [
        ("12,99 €", 12.99),
        ("$1,299.00 - $1,499.00", 1299.0),
        ("1.299,00 €", 1299.0),
        ("1 299,50 kr", 1299.5),
        ("1\u202f299,5", 1299.5),
        ("CHF 1'299.50", 1299.5),
        ("$1,299", 1299.0),
        ("1,234,567", 1234567.0),
        ("from 9.5", 9.5),
        ("0,999", 0.999),
        ("£5", 5.0),
        ("$.99", 0.99),
        ("€ ,99", 0.99),
        ("Rs.1,29,999.00", 129999.0),
        ("1.234.567", 1234567.0),
        ("US$12.50 - US$13", 12.5),
        ("—", None),
        ("١٢٫٩٩", None),
        ("2 for $5.00", None),
        ("Was $20.00 Now $10.00", None),
        ("1.299 €", None),
        ("1.299.00", None),
        ("1,299,00", None),
        ("1,299.00,5", None),
        ("-5.00", None),
        (10**400, None),
        (".a-section{margin:6px} .a-spacing-mini{margin:12px}", None),
        (float("nan"), None),
        (True, None),
        (["3"], None),
    ],
)
def test_prices_with_either_decimal_sign(price, number):
    """Commas, points, spaces and apostrophes, as decimal signs or between thousands; null where either may be meant.

    The same way fail: digits of other scripts, several numbers, groups that are not of three digits.
    """
    assert price_of(price) == number


def test_prices_that_are_left_empty_are_counted(tmp_path, caplog):
    """Texts with digits that are not one price; a dash and a missing price need no word."""
    prices = ("1.299 €", "2 for $5.00", "١٢", "—", None, "$5")
    meta = records(*({"parent_asin": f"B{n}", "title": "T", "price": price} for n, price in enumerate(prices)))
    log = BehaviorLog.read(files(tmp_path, All__jsonl=records(REVIEW_2023), meta_All__jsonl=meta))
    assert log.items["price"].to_pylist() == [None] * 5 + [5.0]
    assert "meta_All.jsonl: 3 prices are not one number" in caplog.text and "(first: '1.299 €')" in caplog.text


def test_texts_as_the_shop_shows_them():
    """Entities with their semicolon only, decimal, hexadecimal and by name."""
    assert shown_text("Black &amp; Decker 12&quot; &#39;Pro&#39; &#x2122;") == ("Black & Decker 12\" 'Pro' ™", 0)
    assert shown_text("AT&T Black&copper &unknown;") == ("AT&T Black&copper &unknown;", 0)
    for text in ("&notit;", "&copyright; 2020", "&amper;", "&ampamp;"):  # a known name and more letters
        assert shown_text(text) == (text, 0)
    assert shown_text(["a &lt; b", 5, "c"]) == ("a < b; c", 0)
    assert shown_text("cut \ud83d here, \ud83d\ude00 whole") == ("cut \ufffd here, 😀 whole", 1)


REVIEW_2023 = {
    "rating": 5.0,
    "title": "t",
    "asin": "B1",
    "parent_asin": "B1",
    "user_id": "AE",
    "timestamp": 1588687728923,
    "verified_purchase": True,
}
REVIEW_2018 = {
    "overall": 5.0,
    "reviewerID": "A1",
    "asin": "B1",
    "reviewText": "cut \ud83d",
    "unixReviewTime": 1514764800,
}


def test_amazon_2023(tmp_path, caplog):
    """The 5-core csv, also a part of it with histories; half an emoji in titles and in reviews."""
    meta = records({"parent_asin": "B1", "title": "cut \ud83d &amp; more", "store": "J&amp;J", "price": "12,99 €"})
    head = "user_id,parent_asin,rating,timestamp"
    forms = {
        "All__csv": f"{head}\nAE,B1,5.0,1588687728923\n",
        "All__train__csv": f"{head},history\nAE,B1,5.0,1588687728923,B7 B8\n",
        "All__jsonl": records(REVIEW_2023 | {"title": "\ud83d"}),
    }
    for number, (name, content) in enumerate(forms.items()):
        place = files(tmp_path / str(number), **{name: content, "meta_All__jsonl": meta})
        assert detect_format(place) == "amazon_reviews_2023"
        log = BehaviorLog.read(place)
        assert log.timestamps.tolist() == [1588687728.923] and log.column("rating").to_pylist() == [5.0]
        assert (
            log.items.to_pylist()[0] | {"title": "cut \ufffd & more", "store": "J&J", "price": 12.99}
            == log.items.to_pylist()[0]
        )
    assert "1 halves of surrogate pairs" in caplog.text


@pytest.mark.parametrize(
    ("time", "named", "advice"),
    [
        (1588687728, "looks like seconds (row 1: 1588687728)", "multiply by 1000"),
        (1588687728923000, "looks like microseconds (row 1: 1588687728923000)", "write milliseconds"),
        (0, "looks like numbers below 100,000,000 (row 1: 0)", "write milliseconds"),
        (1588687728923000000, "looks like nanoseconds (row 1: 1588687728923000000)", "write milliseconds"),
    ],
)
def test_amazon_2023_in_another_unit(tmp_path, time, named, advice):
    """Seconds divided by 1000 would be an undated log; the message names the numbers as they stand in the file."""
    rows = [REVIEW_2023 | {"timestamp": None}, REVIEW_2023 | {"timestamp": time}]
    jsonl = files(tmp_path / "jsonl", All__jsonl=records(*rows))
    head = "user_id,parent_asin,rating,timestamp\n"
    csv = files(tmp_path / "csv", All__csv=f"{head}AE,B1,5.0,1588687728923\nAE,B1,5.0,{time}\n")
    for place in (jsonl, csv):
        message = refused(place, null_times="drop")
        assert named in message and advice in message and "All." in message and "1 of 2 reviews" in message


def test_amazon_before_2023(tmp_path):
    """Reviews of 2018, and ratings without a header: the user first in 2014, the item first in 2018."""
    meta = records({"asin": "B1", "title": "T &amp; U", "price": "$1,299.00", "main_cat": "M", "category": ["a", "b"]})
    place = files(tmp_path / "a", All_5__json=records(REVIEW_2018), meta_All__json=meta)
    log = BehaviorLog.read(place)
    assert log.timestamps.tolist() == [1514764800] and log.user_ids.to_pylist() == ["A1"]
    item = log.items.to_pylist()[0]
    assert (item["title"], item["price"], item["categories"]) == ("T & U", 1299.0, "a; b")
    for name, row in {"2014": "A39HTATAQ9V7YF,0205616461,5.0", "2018": "0205616461,A39HTATAQ9V7YF,5.0"}.items():
        log = BehaviorLog.read(files(tmp_path / name, ratings_Beauty__csv=f"{row},1369699200\n"))
        assert titles(log) == {"0205616461": "0205616461"} and log.user_ids.to_pylist() == ["A39HTATAQ9V7YF"]
    files(place, meta_All__json="{'asin': 'B1', 'title': 'x'}\n")
    assert "Python literal: convert each line by json.dumps(ast.literal_eval(line))" in refused(place)


# Kind: MovieLens as others hand it on.


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("1260759144.0", 1260759144),
        ("1260759144", 1260759144),
        ('"2020-01-02 03:04:05"', MOMENT),
        ("2020-01-02T03:04:05Z", MOMENT),
    ],
)
@pytest.mark.parametrize("names", [("ratings", "movies"), ("rating", "movie")])
def test_movielens_csv_of_kaggle(tmp_path, caplog, time, seconds, names):
    """rating.csv with movie.csv, ISO times, floats as times, byte-order marks, tags and links beside them."""
    mark = "\ufeff"
    contents = {
        f"{names[0]}__csv": f'{mark}"userId","movieId","rating","timestamp"\r\n1,31,3.5,{time}\r\n',
        f"{names[1]}__csv": f'{mark}movieId,title,genres\n1,A (1999),Drama\n31,"Beta, The (2000)",Crime|Drama\n',
    }
    log = BehaviorLog.read(files(tmp_path, **contents, tag__csv="userId,movieId,tag,timestamp\n"))
    assert log.timestamps.tolist() == [seconds] and titles(log)["31"] == "Beta, The (2000)"
    assert caplog.text == ""  # times as dates or floats lose nothing


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_movielens_dat_with_a_byte_order_mark(tmp_path, encoding):
    """In users.dat, movies.dat and ratings.dat, as editors leave it; CRLF too."""
    mark = b"\xef\xbb\xbf"
    files(
        tmp_path,
        ratings__dat=mark + b"1::1::5::978300760\r\n",
        movies__dat=mark + "1::Amélie (2001)::Drama\r\n".encode(encoding),
        users__dat=mark + b"1::F::25::10::00000\r\n",
    )
    log = BehaviorLog.read(tmp_path)
    assert titles(log) == {"1": "Amélie (2001)"} and log.user_ids.to_pylist() == ["1"]
    assert log.column("age").to_pylist() == ["25-34"]


# Kind: Taobao's UserBehavior.csv, which has no header, no titles, and times of other centuries.


def test_taobao(tmp_path, caplog):
    """A directory, the file itself, and another name: the first row tells."""
    rows = "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n2,2333346,2520771,pv,-2134949234\n"
    for name in ("UserBehavior__csv", "part__csv"):
        place = files(tmp_path / name, **{name: rows})
        for path in (place, place / name.replace("__", ".")):
            caplog.clear()
            log = BehaviorLog.read(path)
            assert detect_format(path) == "taobao" and log.timestamps.tolist() == [1511544070, 1511561733]
            assert log.column("behaviour").to_pylist() == ["pv", "buy"]
            assert log.items.to_pylist()[1] == {"item_id": "2333346", "title": "2333346", "category": "2520771"}
            assert "1 interactions with times outside 1990 to 2100 left out" in caplog.text
            assert "no titles are published; the ids of its 2 items are their titles" in caplog.text


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([1511544070, 1511561733000], "holds milliseconds (row 1: 1511561733000)"),
        ([1511544070000, 1511561733000], "holds milliseconds (rows 0, 1: 1511544070000, 1511561733000)"),
        ([1511544070, -5, 1511561733000000], "holds microseconds (row 2: 1511561733000000)"),
        ([1511544070, 20171125003000], "YYYYMMDDhhmmss (row 1: 20171125003000)"),
        ([-5], "outside 1990 to 2100 in 1 of 1 rows"),
        ([1511544070] * 900 + [44] * 100, "outside 1990 to 2100 in 100 of 1000 rows"),
    ],
)
def test_taobao_in_another_unit(tmp_path, rows, named):
    """Rows of another unit, and more rows than the few of other centuries, are not left out but named."""
    assert named in refused(files(tmp_path, UserBehavior__csv="".join(f"1,2,3,pv,{time}\n" for time in rows)))
