"""MovieLens as GroupLens publishes it: csv (latest, 20M, 25M, 32M), `::` dat (1M, 10M) and tab data (100K).

Also Kaggle's form of 20M: rating.csv and movie.csv, with dates as times.

Source of the layouts: the README file of each data set at grouplens.org.
"""

import codecs
from pathlib import Path

import pyarrow as pa

from llmrec_peft.data.readers.csv_files import read_csv
from llmrec_peft.data.readers.registry import RawLog, log_name, register
from llmrec_peft.data.readers.tabular import attach_users
from llmrec_peft.errors import DataError

FORMS = (
    ("ratings.csv", "movies.csv"),
    ("rating.csv", "movie.csv"),
    ("ratings.dat", "movies.dat"),
    ("u.data", "u.item"),
)
RATING_TYPES = {"user_id": pa.string(), "item_id": pa.string(), "rating": pa.float64(), "timestamp": pa.int64()}
GENRES_100K = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
AGES_1M = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
OCCUPATIONS_1M = (
    "other",
    "educator",
    "artist",
    "clerical",
    "student",
    "customer service",
    "health care",
    "executive",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales",
    "scientist",
    "self-employed",
    "engineer",
    "craftsman",
    "unemployed",
    "writer",
)


def _form(path: str) -> tuple[str, str] | None:
    place = Path(path)
    return next((form for form in FORMS if all((place / name).is_file() for name in form)), None)


@register(
    "movielens", "ratings.csv with movies.csv, .dat likewise, or u.data with u.item", lambda p: _form(p) is not None
)
def read_movielens(path: str) -> RawLog:
    """Read a MovieLens directory; users' gender, age and occupation join the interactions where they are published.

    Raises:
        DataError: the files are missing or damaged.
    """
    form = _form(path)
    if form is None:
        raise DataError(f"{path} holds no pair of ratings and movies files; unpack a MovieLens archive there")
    directory = Path(path)
    if form[0].endswith(".csv"):
        interactions, items = _read_csv_form(directory / form[0], directory / form[1])
    else:
        interactions, items = (_read_dat_form if form[0] == "ratings.dat" else _read_100k_form)(directory)
    return RawLog(interactions, items, log_name(path))


def _read_csv_form(ratings_file: Path, movies_file: Path) -> tuple[pa.Table, pa.Table]:
    ids = {"userId": pa.string(), "movieId": pa.string(), "rating": pa.float64(), "timestamp": pa.int64()}
    texts = {"movieId": pa.string(), "title": pa.string(), "genres": pa.string()}
    ratings = read_csv(ratings_file, types=ids, columns=list(ids), loose=["timestamp"])
    movies = read_csv(movies_file, types=texts, columns=list(texts))
    return ratings.rename_columns(list(RATING_TYPES)), movies.rename_columns(["item_id", "title", "genres"])


def _read_dat_form(directory: Path) -> tuple[pa.Table, pa.Table]:
    # The separator "::" read as ":" leaves an empty column between any two; the four fields hold no colon themselves.
    names = ["user_id", "gap1", "item_id", "gap2", "rating", "gap3", "timestamp"]
    interactions = read_csv(
        directory / "ratings.dat",
        delimiter=":",
        quoted=False,
        names=names,
        types=RATING_TYPES,
        columns=list(RATING_TYPES),
    )
    items = pa.table(_split_lines(directory / "movies.dat", "::", ["item_id", "title", "genres"]))
    if (directory / "users.dat").is_file():
        users = _split_lines(directory / "users.dat", "::", ["user_id", "gender", "age", "occupation", "zip"])
        users["age"] = [AGES_1M.get(age, age) for age in users["age"]]
        users["occupation"] = [
            OCCUPATIONS_1M[int(code)] if code.isdigit() and int(code) < len(OCCUPATIONS_1M) else code
            for code in users["occupation"]
        ]
        interactions = attach_users(interactions, pa.table(users).drop_columns(["zip"]), directory / "users.dat")
    return interactions, items


def _read_100k_form(directory: Path) -> tuple[pa.Table, pa.Table]:
    order = ["user_id", "item_id", "rating", "timestamp"]
    interactions = read_csv(
        directory / "u.data", delimiter="\t", quoted=False, names=order, types=RATING_TYPES, columns=order
    )
    columns = ["item_id", "title", "release", "video", "url", *GENRES_100K]
    movies = _split_lines(directory / "u.item", "|", columns)
    flags = zip(*(movies[genre] for genre in GENRES_100K), strict=True)
    genres = ["|".join(name for name, flag in zip(GENRES_100K, row, strict=True) if flag == "1") for row in flags]
    items = pa.table({"item_id": movies["item_id"], "title": movies["title"], "genres": genres})
    if (directory / "u.user").is_file():
        users = _split_lines(directory / "u.user", "|", ["user_id", "age", "gender", "occupation", "zip"])
        interactions = attach_users(interactions, pa.table(users).drop_columns(["zip"]), directory / "u.user")
    return interactions, items


def _split_lines(path: Path, separator: str, names: list[str]) -> dict[str, list[str]]:
    """Columns of a small file of movies or users; UTF-8 as in 10M, else Latin-1 as in 100K and 1M."""
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split(separator)
        if len(fields) != len(names):
            raise DataError(
                f"line {number} of {path} has {len(fields)} fields separated by {separator!r}, expected {len(names)}; "
                "download it again"
            )
        rows.append(fields)
    if not rows:
        raise DataError(f"{path} is empty; download it again")
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
