"""The recommend recipe: each user once, as the library answers, after a kill too; and nobody is left out silently."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmrec_peft import BehaviorLog, Domain, Scorer, load_classifier
from llmrec_peft.checkpoints.bundle import save_bundle
from llmrec_peft.files import write_parquet
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.shards import JobShards
from tests.conftest import ROOT

HERE = ROOT / "tests" / "recipes"
STRANGERS = ["nobody", "nobody else"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(trained):
    return trained("lora") / "bundle"


@pytest.fixture(scope="module")
def log(data) -> BehaviorLog:
    return BehaviorLog.read(data)


@pytest.fixture(scope="module")
def domain(bundle) -> Domain:
    return Domain.from_dict(json.loads((bundle / "behavior.json").read_text("utf-8"))["domain"])


@pytest.fixture(scope="module")
def retrieval(log, domain, tmp_path_factory):
    """A directory with a retrieval index of the log."""
    directory = tmp_path_factory.mktemp("index") / "retrieval"
    RetrievalIndex.fit(log, np.arange(len(log)), feedback(log, domain)).save(directory)
    return directory


@pytest.fixture(scope="module")
def asked(log) -> list[str]:
    """Ten users, two of whom the log does not know, in no order of the log."""
    ids = log.user_ids.to_pylist()
    return [ids[7], STRANGERS[0], ids[3], ids[20], ids[0], STRANGERS[1], ids[11], ids[5], ids[23], ids[2]]


@pytest.fixture
def users(asked, tmp_path):
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": asked, "city": ["x"] * len(asked)}), path)
    return path


@pytest.fixture
def flags(bundle, data, users, retrieval):
    """Four parts of three users, the last of one, with five candidates for three places."""
    given = {"bundle": bundle, "data.path": data, "users": users, "retrieval": retrieval, "k": 3, "pool": 5, "chunk": 3}
    return [f"--{key}={value}" for key, value in given.items()]


class Stopped(Exception):
    """What a test breaks a job off by."""


def stop(*_):
    raise Stopped


def run(recipe, flags, out, *extra) -> pa.Table:
    recipe("recommend")([*flags, f"--output_dir={out}", *extra])
    return pq.read_table(out / "recommendations.parquet")


def refused(recipe, capsys, flags, out, *extra) -> str:
    """The one line that a refusal is, beside progress bars."""
    with pytest.raises(SystemExit) as stopped:
        recipe("recommend")([*flags, f"--output_dir={out}", *extra])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def answered(table: pa.Table) -> list[str]:
    """Users in order, each once for each run of its rows."""
    ids = table["user_id"].to_pylist()
    return [user for n, user in enumerate(ids) if not n or ids[n - 1] != user]


def history_of(log, domain, user, until=np.inf):
    if user not in log.user_ids.to_pylist():
        return []
    code = log.user_ids.to_pylist().index(user)
    classes, items = domain.classes(log), log.items.column("item_id").to_pylist()
    rows = range(log.user_offsets[code], log.user_offsets[code + 1])
    return [
        (items[log.item_codes[row]], domain.labels[classes[row]])
        for row in rows
        if log.timestamps[row] < until and classes[row] >= 0
    ]


def check(table: pa.Table, user: str, expected) -> None:
    rows = [row for row in table.to_pylist() if row["user_id"] == user]
    assert [row["rank"] for row in rows] == list(range(1, len(expected) + 1))
    assert [(row["item_id"], row["source"]) for row in rows] == [(e.item_id, e.source) for e in expected]
    for row, entry in zip(rows, expected, strict=True):
        found = (row["score"], row["p_skip"], row["p_click"])
        np.testing.assert_allclose(found, (entry.score, *entry.probabilities), atol=1e-5)


# -- the answers -------------------------------------------------------------------------------


def test_each_user_once_as_the_library_recommends(recipe, flags, bundle, data, log, domain, retrieval, asked, tmp_path,
                                               capsys):  # fmt: skip
    table = run(recipe, flags, tmp_path / "out")
    assert table.column_names == ["user_id", "rank", "item_id", "score", "p_skip", "p_click", "source"]
    assert answered(table) == asked and len(table) == 3 * len(asked)
    scorer = Scorer.load(bundle, data, retrieval=retrieval)
    for user in asked:
        check(table, user, scorer.recommend(history_of(log, domain, user), k=3, pool=5))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recommendations.parquet"]
    printed = capsys.readouterr().out
    assert "10 users in 4 shards; the log knows 8" in printed
    assert re.search(r"10 users in [\d.]+ s: [\d.]+ users/s", printed)
    assert f"written to {tmp_path / 'out' / 'recommendations.parquet'}: 30 rows of 10 users" in printed


def test_all_users_of_the_log_until_a_moment_over_all_items(recipe, bundle, data, log, domain, tmp_path, capsys):
    until = int(log.timestamps[log.user_offsets[6] - 2])  # of a row, which is not before it
    flags = [f"--bundle={bundle}", f"--data.path={data}", f"--until={until}", "--k=40", "--chunk=7"]
    table = run(recipe, flags, tmp_path)
    assert answered(table) == log.user_ids.to_pylist()
    assert "the model ranks all 30 items for each user" in capsys.readouterr().out
    scorer = Scorer.load(bundle, data)
    lengths = set()
    for user in log.user_ids.to_pylist()[::5]:
        history = history_of(log, domain, user, until)
        lengths.add(len(history))
        check(table, user, scorer.recommend(history, k=40))
    assert len(lengths) > 1 and min(lengths) < len(history_of(log, domain, user))


def test_given_candidates_and_quotas(recipe, flags, log, tmp_path):
    ids = log.items.column("item_id").to_pylist()
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps({"item_id": item}) + "\n" for item in [*ids[::2], ids[0]]), "utf-8")
    table = run(recipe, flags, tmp_path / "given", f"--candidates={path}")
    assert set(table["item_id"].to_pylist()) <= set(ids[::2]) and set(table["source"].to_pylist()) == {"given"}
    table = run(recipe, flags, tmp_path / "popular", "--quotas={popularity: 1}")
    assert set(table["source"].to_pylist()) == {"popularity"}


# -- broken off --------------------------------------------------------------------------------


# Moves: settings.json, four parts, recommendations.parquet, the parts' directory.
@pytest.mark.parametrize("move", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5, 6, 7))])
def test_killed_and_run_again_it_leaves_the_same_file(move, recipe, flags, tmp_path, capsys):
    run(recipe, flags, tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, str(HERE / "run_and_die_moving.py"), "recommend", str(move), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    died = subprocess.run(
        [*command, f"--output_dir={out}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert (out / "recommendations.parquet").exists() == (move == 7)
    made = len(list(out.glob("parts/0*.parquet")))
    assert made == min(max(move - 2, 0), 4)
    assert move > 6 or list(out.rglob(".*.partial"))
    capsys.readouterr()
    run(recipe, flags, out)
    printed = capsys.readouterr().out
    answered_before = min(3 * made, 10)
    assert (f"{answered_before} of them done by an earlier run" in printed) == (made > 0)
    assert f"{10 - answered_before} users in" in printed
    whole = (tmp_path / "whole" / "recommendations.parquet").read_bytes()
    assert (out / "recommendations.parquet").read_bytes() == whole
    assert [path.name for path in out.iterdir()] == ["recommendations.parquet"]


@pytest.fixture
def broken_off(recipe, flags, tmp_path, monkeypatch):
    """An output directory with two of the four parts."""
    out, write = tmp_path / "out", JobShards.write
    with monkeypatch.context() as patch:
        patch.setattr(
            JobShards, "write", lambda self, number, *rest: (stop if number > 1 else write)(self, number, *rest)
        )
        with pytest.raises(Stopped):
            run(recipe, flags, out)
    assert len(list(out.glob("parts/0*.parquet"))) == 2
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--k=2"], "k '3', and now it is '2'"),
        (["--chunk=4"], "chunk '3', and now it is '4'"),
        (["--until=1600000000"], "until 'None'"),
        (["--quotas={popularity: 1}"], "quotas.popularity None"),
        (["--retrieval=null"], "the retrieval"),
        ("users", "the list of users"),
        ("log", "the log"),
        ("bundle", "the bundle"),
    ],
)
def test_parts_of_another_job_are_refused_by_name(change, named, broken_off, recipe, flags, trained, users, data, asked,
                                                  bundle, tmp_path, capsys):  # fmt: skip
    if change == "users":
        pq.write_table(pa.table({"user_id": asked[::-1]}), users)
        change = []
    elif change == "log":
        table = pq.read_table(data / "interactions.parquet")
        other = tmp_path / "other"
        other.mkdir()
        pq.write_table(table.slice(1), other / "interactions.parquet")
        pq.write_table(pq.read_table(data / "items.parquet"), other / "items.parquet")
        change = [f"--data.path={other}"]
    elif change == "bundle":
        change = [f"--bundle={trained('head') / 'bundle'}"]
    line = refused(recipe, capsys, flags, broken_off, *change)
    assert named in line and f"remove {broken_off / 'parts'}" in line
    assert len(list(broken_off.glob("parts/0*.parquet"))) == 2
    # As it was it goes on, wherever the files lie.
    if named == "chunk '3', and now it is '4'":
        moved = tmp_path / "moved.parquet"
        pq.write_table(pa.table({"user_id": asked}), moved)
        shutil.copytree(bundle, tmp_path / "copied")
        run(recipe, flags, broken_off, f"--users={moved}", f"--bundle={tmp_path / 'copied'}")
        assert "6 of them done by an earlier run" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "empty", "swapped"])
def test_a_damaged_part_is_made_again(damage, broken_off, recipe, flags, tmp_path, capsys):
    first, second = sorted(broken_off.glob("parts/0*.parquet"))
    if damage == "swapped":
        first.write_bytes(second.read_bytes())
    else:
        first.write_bytes(b"" if damage == "empty" else first.read_bytes()[:-20])
    table = run(recipe, flags, broken_off)
    assert "3 of them done by an earlier run" in capsys.readouterr().out
    assert table.equals(run(recipe, flags, tmp_path / "whole"))


def test_a_shard_that_misses_a_user_is_not_concatenated(broken_off, recipe, flags, capsys):
    first = min(broken_off.glob("parts/0*.parquet"))
    table = pq.read_table(first)
    for wrong in (table.slice(3), table.slice(1), pa.concat_tables([table.slice(3, 3), table])):
        write_parquet(wrong, first)
        assert f"shard {first} does not hold each of its users once" in refused(recipe, capsys, flags, broken_off)
        assert not (broken_off / "recommendations.parquet").exists()


def test_parts_that_were_being_removed_are_in_nobodys_way(recipe, flags, tmp_path):
    run(recipe, flags, tmp_path / "whole")
    left = tmp_path / "out" / ".parts.done"
    left.mkdir(parents=True)
    (left / "000000.parquet").write_bytes(b"")
    assert run(recipe, flags, tmp_path / "out").equals(pq.read_table(tmp_path / "whole" / "recommendations.parquet"))
    assert not left.exists()


def test_a_directory_of_others_is_left_alone(recipe, flags, tmp_path, capsys):
    mine = tmp_path / "out" / "parts" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "holds mine.txt and no settings.json" in refused(recipe, capsys, flags, tmp_path / "out")
    assert mine.read_text() == "mine"


# -- two processes -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_leave_the_file_of_one(launch, recipe, flags, tmp_path):
    one = run(recipe, flags, tmp_path / "one")
    done = launch("ddp", ROOT / "recipes" / "recommend.py", *flags, f"--output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("10 users in 4 shards") == done.stdout.count("users/s") == 1
    two = pq.read_table(tmp_path / "two" / "recommendations.parquet")
    numbers = ["score", "p_skip", "p_click"]
    assert one.drop(numbers).equals(two.drop(numbers))
    for name in numbers:
        assert np.abs(one[name].to_numpy() - two[name].to_numpy()).max() < 1e-6
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["recommendations.parquet"]


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_stop_together(launch, flags, log, domain, asked, tmp_path):
    met = [item for item, _ in history_of(log, domain, asked[3])]
    pq.write_table(pa.table({"item_id": met}), tmp_path / "candidates.parquet")
    flags = [*flags, "--chunk=1", f"--candidates={tmp_path / 'candidates.parquet'}", f"--output_dir={tmp_path / 'out'}"]
    done = launch("ddp", ROOT / "recipes" / "recommend.py", *flags)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "row 3 of users.parquet" in done.stderr
    assert not (tmp_path / "out" / "recommendations.parquet").exists()
    done = launch("ddp", ROOT / "recipes" / "recommend.py", *flags, "--on_error=skip")
    assert done.returncode == 0, done.stderr[-3000:]
    out = {entry["user_id"] for entry in lines(tmp_path / "out")}
    assert asked[3] in out
    assert answered(pq.read_table(tmp_path / "out" / "recommendations.parquet")) == [u for u in asked if u not in out]


def test_no_part_begins_once_a_process_has_stopped(recipe, flags, tmp_path, monkeypatch, capsys):
    write = JobShards.write

    def write_and_stop(self, number, *rest):
        write(self, number, *rest)
        if number == 1:
            self.stop()

    monkeypatch.setattr(JobShards, "write", write_and_stop)
    assert "000002.parquet cannot be read" in refused(recipe, capsys, flags, tmp_path)
    assert len(list(tmp_path.glob("parts/0*.parquet"))) == 2


# -- users who cannot be answered --------------------------------------------------------------


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "errors.jsonl").read_text("utf-8").splitlines()]


def test_rows_without_an_id_and_repeats(recipe, flags, users, asked, tmp_path, capsys):
    rows = [asked[0], None, asked[1], "  ", asked[0], asked[2]]
    pq.write_table(pa.table({"user_id": rows}), users)
    line = refused(recipe, capsys, flags, tmp_path)
    assert "user None (row 1 of users.parquet): user_id is null or empty" in line and "(3 such rows)" in line
    assert not (tmp_path / "parts").exists()
    table = run(recipe, flags, tmp_path, "--on_error=skip")
    assert answered(table) == asked[:3]
    found = lines(tmp_path)
    assert [(entry["row"], entry["user_id"]) for entry in found] == [(1, None), (3, "  "), (4, asked[0])]
    assert found[2]["error"] == "user_id stands in row 0 already; keep one row a user"
    assert f"left out: 3 of 6 users, listed in {tmp_path / 'errors.jsonl'}" in capsys.readouterr().out
    # What was said of an earlier file does not stay beside the new one.
    pq.write_table(pa.table({"user_id": asked}), users)
    run(recipe, flags, tmp_path, "--on_error=skip")
    assert not (tmp_path / "errors.jsonl").exists()


def test_a_user_who_has_met_all_candidates(recipe, flags, users, log, domain, asked, tmp_path, capsys):
    """Known only when the part is answered: the others of the part are answered all the same."""
    wanted = asked[3]
    ids = sorted({item for item, _ in history_of(log, domain, wanted)})
    path = tmp_path / "candidates.parquet"
    pq.write_table(pa.table({"item_id": ids}), path)
    out = tmp_path / "out"
    line = refused(recipe, capsys, flags, out, f"--candidates={path}")
    assert f"user '{wanted}' (row 3 of users.parquet): no item is left" in line
    assert not (out / "recommendations.parquet").exists() and len(list(out.glob("parts/0*.parquet"))) == 1
    assert (out / "parts" / "stop").exists()  # for other processes
    table = run(recipe, flags, out, f"--candidates={path}", "--on_error=skip")
    assert "3 of them done by an earlier run" in capsys.readouterr().out
    left_out = [entry["user_id"] for entry in lines(out)]
    assert wanted in left_out and answered(table) == [user for user in asked if user not in left_out]
    # Nobody at all is no result, whatever was asked for.
    pq.write_table(pa.table({"user_id": [wanted]}), users)
    line = refused(recipe, capsys, flags, tmp_path / "none", f"--candidates={path}", "--on_error=skip")
    assert "none of the 1 users got a recommendation; the first: row 0" in line


def test_parts_that_left_users_out_do_not_pass_where_none_may_be(recipe, flags, log, domain, asked, tmp_path,
                                                                 monkeypatch, capsys):  # fmt: skip
    pq.write_table(
        pa.table({"item_id": [item for item, _ in history_of(log, domain, asked[0])]}), tmp_path / "c.parquet"
    )
    flags = [*flags, f"--candidates={tmp_path / 'c.parquet'}"]
    out = tmp_path / "skipped"
    with monkeypatch.context() as patch:
        patch.setattr(JobShards, "concatenate", stop)
        with pytest.raises(Stopped):
            run(recipe, flags, out, "--on_error=skip")
    assert len(list(out.glob("parts/0*.parquet"))) == 4
    assert f"user '{asked[0]}' (row 0 of users.parquet): no item is left" in refused(recipe, capsys, flags, out)
    run(recipe, flags, out, "--on_error=skip")
    assert "10 of them done by an earlier run" in capsys.readouterr().out
    assert lines(out)[0]["user_id"] == asked[0]


# -- columns of the header and of the moment ---------------------------------------------------


COUPONS = {
    "name": "coupons",
    "header": "Driver of {age}:\n",
    "event": "{title} at {hour:02d}",
    "outcomes": {"skip": " no\n", "click": " yes\n"},
    "stream": {"context": 2, "targets": 3, "max_length": 300},
    "recommend": {"exclude": ["click"]},
}


@pytest.fixture
def coupons(tiny_base, tmp_path):
    """Bundle and log of a domain whose header and event name columns of the interactions."""
    domain = Domain.from_dict(COUPONS)
    classifier = load_classifier(str(tiny_base("llama")), domain, "head")
    with torch.no_grad():
        classifier.head.weight.add_(torch.randn(classifier.head.weight.shape, generator=torch.manual_seed(0)))
    save_bundle(tmp_path / "coupons", classifier, classifier.tokenizer, domain.to_dict())
    data = tmp_path / "log"
    data.mkdir()
    rows = np.arange(30)
    interactions = {
        "user_id": [f"d{n // 3}" for n in rows], "item_id": [f"c{n % 5}" for n in rows], "timestamp": rows,
        "label": rows % 2, "age": 20 + rows, "hour": rows % 24,
    }  # fmt: skip
    pq.write_table(pa.table(interactions), data / "interactions.parquet")
    items = {"item_id": [f"c{n}" for n in range(5)], "title": [f"Coupon {n}" for n in range(5)]}
    pq.write_table(pa.table(items), data / "items.parquet")
    return tmp_path / "coupons", data


def driver(number) -> list:
    """The history of one driver of the coupons' log."""
    rows = range(3 * number, 3 * number + 3)
    return [({"item_id": f"c{n % 5}", "hour": n % 24}, ("skip", "click")[n % 2]) for n in rows]


def test_columns_of_the_header_and_of_the_moment(recipe, coupons, users, tmp_path):
    bundle, data = coupons
    scorer = Scorer.load(bundle, data)
    flags = [f"--bundle={bundle}", f"--data.path={data}", "--chunk=4"]
    # Of the log: the header's from the user's first row, as in training; the moment's is given.
    table = run(recipe, flags, tmp_path / "log's", "--context.hour=9")
    assert answered(table) == [f"d{n}" for n in range(10)]
    for n in (0, 3, 9):
        check(table, f"d{n}", scorer.recommend(driver(n), user={"age": 20 + 3 * n}, context={"hour": 9}))
    # Of the file, which goes over both.
    pq.write_table(pa.table({"user_id": ["d3", "new"], "age": [70, 71], "hour": [1, 23]}), users)
    table = run(recipe, [*flags, f"--users={users}"], tmp_path / "file's", "--context={hour: 9}")
    check(table, "d3", scorer.recommend(driver(3), user={"age": 70}, context={"hour": 1}))
    check(table, "new", scorer.recommend([], user={"age": 71}, context={"hour": 23}))


def test_columns_that_nothing_gives_are_named(recipe, coupons, users, tmp_path, capsys):
    (bundle, data), out = coupons, tmp_path / "out"
    flags = [f"--bundle={bundle}", f"--data.path={data}"]
    line = refused(recipe, capsys, flags, out)
    assert "names hour, which the items of log 'log' lack; give --context '{hour: ...}'" in line
    line = refused(recipe, capsys, flags, out, "--context={hour: 9, day: Mon}")
    assert "context has 'day', but the event of domain 'coupons' takes from it only hour" in line
    line = refused(recipe, capsys, flags, out, "--context={hour: nine}")
    assert "user 'd0' (row 0 of log log)" in line and "hour" in line
    pq.write_table(pa.table({"user_id": ["d3", "new"]}), users)
    # No part was made, so other settings may begin there.
    flags += [f"--users={users}", "--context={hour: 9}"]
    line = refused(recipe, capsys, flags, out)
    assert "user 'new' (row 1 of users.parquet): the header names 'age', which the log does not have" in line
    assert answered(run(recipe, flags, out, "--on_error=skip")) == ["d3"]
    assert lines(out)[0]["row"] == 1
    for column, message in (("age", "the header of domain 'coupons' names 'age', which neither users"),
                            ("hour", "names 'hour', which neither the items nor the interactions")):  # fmt: skip
        place = data / "interactions.parquet"
        whole = pq.read_table(place)
        pq.write_table(whole.drop([column]), place)
        assert message in refused(recipe, capsys, flags, out)
        pq.write_table(whole, place)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": ["a"]}, "lacks the column user_id; it has user"),
        ({"user_id": pa.array([], pa.string())}, "has no rows; give at least one user_id"),
        ({"user_id": [[1]]}, "user_id in users .* must be strings or whole numbers"),
        ({"user_id": ["a"], "history": [["p1"]]}, "has a column 'history', but histories come from the log"),
        ({"user_id": pa.nulls(2)}, "user None .row 0 of users.parquet.: user_id is null or empty"),
        (b"PAR1", "is not a readable parquet file"),
        (None, "users must be an existing file"),
    ],
)
def test_a_bad_file_of_users_is_named(columns, message, recipe, flags, users, tmp_path, capsys):
    users.unlink()
    if isinstance(columns, bytes):
        users.write_bytes(columns)
    elif columns is not None:
        pq.write_table(pa.table(columns), users)
    assert re.search(message, refused(recipe, capsys, flags, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--k=0"], "k must be at least 1, not 0"),
        (["--until=.nan"], "until must be a finite number of seconds, or null, not nan"),
        (["--on_error=go"], "on_error must be one of stop, skip"),
        (["--context={hour: 9}"], "context has 'hour', but the event of domain 'shop' takes from it only none"),
        (["--quotas={charts: 1}"], "there is no source 'charts'"),
        (["--quotas={popularity: 1}", "--retrieval=null"], "quotas and embeddings are for retrieval"),
        (["--retrieval=nowhere"], "nowhere has no file index.json"),
        (["--candidates=nowhere.parquet"], "candidates must be an existing file"),
        (["--bundle=nowhere"], "bundle nowhere has no behavior.json"),
        (["--data.path=nowhere"], "nowhere"),
        (["--output_dir=/dev/null/out"], "output_dir /dev/null/out cannot be written (/dev/null is not a directory)"),
    ],
)
def test_bad_settings_are_named(extra, message, recipe, flags, tmp_path, capsys):
    assert message in refused(recipe, capsys, flags, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["zz"], "row 0 has item 'zz', which is unknown among the 30 items"),
        ([], "has no rows; give at least one item_id"),
    ],
)
def test_bad_candidates_are_named(rows, message, recipe, flags, tmp_path, capsys):
    path = tmp_path / "candidates.parquet"
    pq.write_table(pa.table({"item_id": pa.array(rows, pa.string())}), path)
    assert message in refused(recipe, capsys, flags, tmp_path / "out", f"--candidates={path}")


def test_a_broken_bundle_recommends_nothing(recipe, flags, tiny_base, domain, tmp_path, capsys):
    classifier = load_classifier(str(tiny_base("llama")), domain, "head")
    with torch.no_grad():
        classifier.head.weight.fill_(1e38)
    save_bundle(tmp_path / "broken", classifier, classifier.tokenizer, domain.to_dict())
    flags = [*flags, f"--bundle={tmp_path / 'broken'}"]
    assert "logits that are not finite" in refused(recipe, capsys, flags, tmp_path / "out")
    line = refused(recipe, capsys, flags, tmp_path / "out", "--on_error=skip")
    assert "none of the 10 users got a recommendation" in line
    assert len(lines(tmp_path / "out")) == 10 and not len(pq.read_table(tmp_path / "out" / "recommendations.parquet"))
