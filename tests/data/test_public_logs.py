"""Readers of MovieLens, Amazon Reviews 2023, MIND and RecBole, on files written here in their layouts."""

import gzip
import json
import logging
import sys

import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.readers import detect_format
from llmrec_peft.data.readers import mind as mind_module
from llmrec_peft.errors import DataError


def lines(path, records, ending="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + ending for record in records), encoding="utf-8")
    return path


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        BehaviorLog.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_000
    return message


def test_movielens_csv(tmp_path):
    text(tmp_path / "ml" / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.0,100\n2,011,2.5,90\n")
    text(tmp_path / "ml" / "movies.csv", 'movieId,title,genres\n10,"Heat, The (1995)",Crime|Drama\n011,Léon,Action\n')
    text(tmp_path / "ml" / "tags.csv", "userId,movieId,tag,timestamp\n1,10,nice,100\n")
    assert detect_format(tmp_path / "ml") == "movielens"
    log = BehaviorLog.read(tmp_path / "ml")
    assert log.column("rating").to_pylist() == [4.0, 2.5] and log.timestamps.tolist() == [100, 90]
    assert log.items.to_pylist() == [
        {"item_id": "10", "title": "Heat, The (1995)", "genres": "Crime|Drama"},
        {"item_id": "011", "title": "Léon", "genres": "Action"},
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_movielens_dat(tmp_path, encoding):
    directory = tmp_path / "ml"
    text(directory / "ratings.dat", "1::10::4::100\n2::11::2.5::90\n3::11::5::80\n", encoding)
    text(directory / "movies.dat", "10::Star Wars: A New Hope::Sci-Fi\n11::Léon: fin (1994)::Action\n", encoding)
    text(directory / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n", encoding)
    log = BehaviorLog.read(directory)
    assert log.items.column("title").to_pylist() == ["Star Wars: A New Hope", "Léon: fin (1994)"]
    assert log.column("rating").to_pylist() == [4.0, 2.5, 5.0] and log.timestamps.tolist() == [100, 90, 80]
    assert log.column("gender").to_pylist() == ["F", "M", None]
    assert log.column("age").to_pylist() == ["under 18", "56+", None]
    assert log.column("occupation").to_pylist() == ["K-12 student", "self-employed", None]
    text(directory / "movies.dat", "10::Star Wars\n")
    assert "line 1 of" in refused(directory) and "has 2 fields separated by '::', expected 3" in refused(directory)


def test_movielens_100k(tmp_path):
    flags = ["0"] * 19
    flags[1] = flags[4] = "1"
    text(tmp_path / "ml" / "u.data", "1\t10\t4\t100\n1\t10\t3\t90\n")
    text(tmp_path / "ml" / "u.item", "|".join(["10", "Léon (1994)", "01-Jan-1994", "", "http://x", *flags]), "latin-1")
    text(tmp_path / "ml" / "u.user", "1|24|M|technician|85711\n")
    log = BehaviorLog.read(tmp_path / "ml")
    assert log.column("rating").to_pylist() == [3.0, 4.0] and log.column("occupation").to_pylist() == ["technician"] * 2
    assert log.items.to_pylist() == [{"item_id": "10", "title": "Léon (1994)", "genres": "Action|Children's"}]


def test_movielens_with_a_column_missing(tmp_path):
    text(tmp_path / "ml" / "ratings.csv", "userId,movieId,rating\n1,10,4.0\n")
    text(tmp_path / "ml" / "movies.csv", "movieId,title,genres\n10,Heat,Crime\n")
    assert "ratings.csv is not a readable csv file" in refused(tmp_path / "ml") and "timestamp" in refused(
        tmp_path / "ml"
    )


def review(user, item, time, rating, **more):
    record = {"rating": rating, "title": "Great", "text": "Liked it\nmuch", "images": [], "asin": item + "v"}
    return {**record, "parent_asin": item, "user_id": user, "timestamp": time, "verified_purchase": True, **more}


REVIEWS = [
    review("A", "B01", 1602133857705, 5.0),
    review("A", "B02", 1602133857000, 1),
    review("B", "B03", 1602133850000, 3.0),
]
META = [
    {"parent_asin": "B01", "title": "Lamp", "price": 12.99, "store": "Lux", "categories": ["Home", "Light"]},
    {"parent_asin": "B02", "title": "", "price": "from 1,014.50", "features": ["Blue", "Warm"], "average_rating": 4.9},
    {"parent_asin": "B02", "title": "again", "price": "—"},
    {"parent_asin": "B04", "title": "Never reviewed", "price": None},
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_amazon(tmp_path, suffix, caplog):
    directory = tmp_path / "amazon"
    directory.mkdir()
    for name, records in (("Lamps", REVIEWS), ("meta_Lamps", META)):
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        (directory / f"{name}.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert detect_format(directory) == "amazon_reviews_2023"
    with caplog.at_level(logging.WARNING):
        log = BehaviorLog.read(directory)
    assert log.column("rating").to_pylist() == [1.0, 5.0, 3.0]
    assert log.timestamps.tolist() == [1602133857.0, 1602133857.705, 1602133850.0]
    items = {item["item_id"]: item for item in log.items.to_pylist()}
    assert list(items) == ["B01", "B02", "B04", "B03"] and items["B04"]["title"] == "Never reviewed"
    assert items["B01"]["title"] == "Lamp" and items["B01"]["categories"] == "Home; Light"
    assert items["B01"]["price"] == 12.99 and items["B02"]["price"] == 1014.5 and items["B03"]["price"] is None
    assert (
        items["B02"]["title"] == "B02" and items["B02"]["features"] == "Blue; Warm" and items["B03"]["title"] == "B03"
    )
    assert "1 repeated rows" in caplog.text and "1 of 3 items have no metadata" in caplog.text
    assert "1 items have no title" in caplog.text
    # What was known only after the rating stays out.
    assert not {"text", "title", "helpful_vote"} & set(log.interactions.column_names)
    assert "average_rating" not in log.items.column_names
    assert BehaviorLog.read(directory / f"Lamps.{suffix}").interactions.equals(log.interactions)


def test_amazon_without_metadata_and_with_two_files(tmp_path):
    lines(tmp_path / "amazon" / "Lamps.jsonl", REVIEWS)
    assert BehaviorLog.read(tmp_path / "amazon").items.column("title").to_pylist() == ["B01", "B02", "B03"]
    lines(tmp_path / "amazon" / "Beds.jsonl", REVIEWS)
    assert "holds 2 files of Amazon reviews (Beds.jsonl, Lamps.jsonl); name the one" in refused(tmp_path / "amazon")


def test_amazon_bad_lines(tmp_path):
    file = lines(tmp_path / "Lamps.jsonl", REVIEWS)
    file.write_text(file.read_text() + '{"rating": 5.0, "user_id": \n')
    assert "Lamps.jsonl is not readable JSON lines" in refused(file)
    lines(file, [*REVIEWS, review("A", "B01", None, 5.0)])
    assert "timestamp is null in 1 interactions of log 'Lamps.jsonl' (row 3)" in refused(file)


NEWS = "".join(f'N{n}\tsports\tgolf\tTitle "{n}\tAbstract {n}\thttp://x\t[]\t[]\n' for n in range(1, 7))
BEHAVIORS = (
    "1\tU13\t11/15/2019 8:55:22 AM\tN1 N2\tN3-1 N4-0\n"
    "2\tU13\t11/14/2019 8:55:22 PM\tN2 N1\tN4-0 N5-0 N3-1\n"
    "3\tU2\t11/15/2019 12:00:00 AM\t\tN5-1\n"
)


def mind(directory, behaviors=BEHAVIORS):
    text(directory / "news.tsv", NEWS)
    text(directory / "behaviors.tsv", behaviors)
    return directory


@pytest.mark.parametrize("at_once", [1, 4_096])
def test_mind(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(mind_module, "EXPLODE_ROWS", at_once)
    log = BehaviorLog.read(mind(tmp_path / "mind"))
    evening = 1573764922  # 2019-11-14 20:55:22 UTC
    morning = evening + 12 * 3_600
    rows = log.interactions.drop_columns(["user_id"]).to_pylist()
    first = [
        tuple(row[name] for name in ("item_id", "timestamp", "label", "behaviour", "context_only")) for row in rows
    ]
    assert first == [
        ("N2", evening - 2, 1, "click", True),
        ("N1", evening - 1, 1, "click", True),
        ("N4", evening, 0, "show", False),
        ("N5", evening, 0, "show", False),
        ("N3", evening, 1, "click", False),
        ("N3", morning, 1, "click", False),
        ("N4", morning, 0, "show", False),
        ("N5", 1573776000, 1, "click", False),
    ]
    assert [row["impression_id"] for row in rows] == [None, None, "2", "2", "2", "1", "1", "3"]
    assert log.user_ids.to_pylist() == ["U13", "U2"]
    assert log.items.column_names == ["item_id", "category", "subcategory", "title", "abstract"]
    assert log.items.column("title")[0].as_py() == 'Title "1'


def test_mind_test_set_and_damage(tmp_path):
    directory = mind(tmp_path / "mind", BEHAVIORS.replace("N5-1", "N5"))
    assert "impression '3' of" in refused(directory) and "entry 'N5' without -0 or -1" in refused(directory)
    mind(directory, BEHAVIORS.replace("11/15/2019 12", "2019-11-15 12"))
    assert "line 3 of" in refused(directory) and "has time '2019-11-15 12:00:00 AM'" in refused(directory)
    mind(directory, BEHAVIORS.replace("\tN5-1", ""))
    assert "behaviors.tsv is not a readable tsv file" in refused(directory)
    mind(directory, BEHAVIORS.replace("N5-1", "N99-1"))
    assert "name items that the item table lacks in 1 rows" in refused(directory)
    mind(directory, "")
    assert "behaviors.tsv" in refused(directory)


def recbole(directory):
    text(
        directory / "ml.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n01\t1\t4\t5.5\n2\t1\t3\t4\n01\t3\t1\t2\n",
    )
    text(
        directory / "ml.item",
        'item_id:token\tmovie_title:token_seq\tyear:token\tclass:token_seq\n1\tToy "Story\t1995\tA B\n3\t\t\t\n',
    )
    text(directory / "ml.user", "user_id:token\tage:token\trating:float\n01\t24\t0.5\n")
    return directory


def test_recbole(tmp_path, caplog):
    log = BehaviorLog.read(recbole(tmp_path / "ml"))
    assert log.user_ids.to_pylist() == ["01", "2"] and log.timestamps.tolist() == [2.0, 5.5, 4.0]
    assert log.column("rating").to_pylist() == [1.0, 4.0, 3.0]
    assert log.column("age").to_pylist() == ["24", "24", None]
    assert log.column("user_rating").to_pylist() == [0.5, 0.5, None]
    assert log.items.column("title").to_pylist() == ['Toy "Story', "3"] and "1 items have no title" in caplog.text
    assert BehaviorLog.read(tmp_path / "ml" / "ml.inter").interactions.equals(log.interactions)


def test_recbole_positives_without_items(tmp_path):
    text(tmp_path / "ml.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t1\t5\n")
    log = BehaviorLog.read(tmp_path)
    assert log.column("behaviour").to_pylist() == ["interaction"] and log.items.column("title").to_pylist() == ["1"]


def test_recbole_bad_headers(tmp_path):
    directory = recbole(tmp_path / "ml")
    text(directory / "ml.item", "name:token\tclass:token_seq\n1\tA\n")
    assert "ml.item lacks item_id:token; it has name, class" in refused(directory)
    text(directory / "ml.inter", "user_id\titem_id:token\n1\t1\n")
    assert "has the header field 'user_id'; RecBole needs name:type with token" in refused(directory)
    text(directory / "ml.inter", "uid:token\titem_id:token\n1\t1\n")
    assert "lacks user_id:token; it has uid, item_id" in refused(directory)
    text(directory / "two.inter", "uid:token\titem_id:token\n1\t1\n")
    assert "holds 2 .inter files (ml.inter, two.inter)" in refused(directory)


def python_calls(action) -> int:
    """How many functions, of Python and of C, Python code calls while the action runs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("form", ["mind", "movielens"])
def test_nothing_loops_over_rows(tmp_path, form):
    """Ten times the rows take the same calls, so that no row is visited by Python."""
    for count in (200, 2_000):
        place = tmp_path / str(count)
        numbers = range(count)
        if form == "mind":
            lines_ = [f"{n}\tU{n % 9}\t11/15/2019 8:{n % 60:02d}:22 AM\tN1 N2\tN3-1 N4-0\n" for n in numbers]
            mind(place, "".join(lines_))
        else:
            rows = "".join(f"{n % 9},10,4.0,{count - n}\n" for n in numbers)
            text(place / "ratings.csv", "userId,movieId,rating,timestamp\n" + rows)
            text(place / "movies.csv", "movieId,title,genres\n10,Heat,Crime\n")
    BehaviorLog.read(tmp_path / "200")  # loads what is loaded once
    few, many = (python_calls(lambda n=n: BehaviorLog.read(tmp_path / n)) for n in ("200", "2000"))
    assert abs(many - few) < 100
