"""Ranking in `evaluate`: against brute force, fixed lists, ties, the whole catalogue, pools, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from llmrec_peft import Domain, Scorer
from llmrec_peft.config.schema import EvaluateConfig, RankingConfig, read_config
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.evaluation.metrics import compute_metrics
from llmrec_peft.retrieval.histories import feedback
from llmrec_peft.retrieval.index_files import DIRECTORY
from llmrec_peft.retrieval.recommender import Recommender
from llmrec_peft.retrieval.retrieval_index import RetrievalIndex
from llmrec_peft.runs.candidate_sets import CandidateSets
from llmrec_peft.runs.split_streams import split_by_domain
from tests.recipes.test_merge import refused
from tests.support.logs import DOMAIN, TWINS, noisy_bundle, tables, write_log

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = {"by": "time", "valid": 0.15, "test": 0.2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_log(tmp_path_factory.mktemp("rank") / "log", *tables())


@pytest.fixture(scope="module")
def plain(tiny_base, tmp_path_factory) -> Path:
    """A bundle alone."""
    return noisy_bundle(tmp_path_factory.mktemp("rank") / "bundle", tiny_base("llama"))


@pytest.fixture(scope="module")
def fused(tiny_base, data, recipe, tmp_path_factory) -> Path:
    """The same bundle with retrieval and a fusion."""
    place = noisy_bundle(tmp_path_factory.mktemp("rank") / "fused", tiny_base("llama"))
    recipe("index")(["--bundle", str(place), "--data.path", str(data), "--test_targets", "5", "--bootstrap", "0"])
    return place


@pytest.fixture
def rank(recipe, data, tmp_path):
    """`rank(bundle, candidates="all")`: run the recipe; returns (what is under "ranking", the table)."""

    def run(bundle: Path, data: Path = data, out: str = "out", split: str = "test", **options):
        flags = {"targets": "null", "bootstrap": 0, **options}
        recipe("evaluate")(
            ["--bundle", str(bundle), "--data.path", str(data), "--limit", "4", "--split", split]
            + ["--output_dir", str(tmp_path / out), *(f"--ranking.{key}={value}" for key, value in flags.items())]
        )
        found = json.loads((tmp_path / out / "metrics.json").read_text())
        assert split in found
        return found["ranking"], pq.read_table(tmp_path / out / "ranking.parquet").to_pandas()

    return run


def past_of(rows, target) -> list:
    """What a scorer is told of a target, row by row."""
    earlier = rows[(rows["user_id"] == target["user_id"]) & (rows["timestamp"] < target["timestamp"])]
    return [
        ({"item_id": item, "hour": hour}, "like" if rating > 3 else "dislike")
        for item, hour, rating in zip(earlier["item_id"], earlier["hour"], earlier["rating"], strict=True)
    ]


def asked(rows, target, ids) -> tuple:
    hour = int(target["timestamp"] // 3600 % 24)
    return (
        past_of(rows, target),
        [{"item_id": item, "hour": hour} for item in ids],
        {"age": 20 + int(target["user_id"][1:])},
    )


def bounds(scores, own: int, slack: float) -> tuple[int, int]:
    """At least and at most how many scores are above that at `own`; a score may be off by `slack`."""
    others = np.delete(scores, own)
    return int((others > scores[own] + slack).sum()), int((others > scores[own] - slack).sum())


def test_fixed_candidate_sets_against_brute_force(rank, plain, data):
    found, table = rank(plain, candidates=12)
    log = BehaviorLog.read(data)
    rows, scorer = log.interactions.to_pandas(), Scorer.load(plain, log)
    train = rows.iloc[log.split(**SPLIT).train.rows]
    half_life = CandidateSets(
        log.split(**SPLIT), "test", Domain.from_dict(DOMAIN), RankingConfig(candidates=12)
    ).popularity.half_life
    age = (train["timestamp"].max() - train["timestamp"]) / 86400
    weight = np.exp2(-age / half_life) if half_life else age * 0 + 1
    popular = weight[train["rating"] > 3].groupby(train["item_id"]).sum()
    assert len(table) == found["targets"] > 30 and set(table["items"]) == {12}
    assert found["list_items"] == {"least": 12, "mean": 12, "most": 12}
    positives = rows.iloc[log.split(**SPLIT).test.rows].query("rating > 3")
    assert found["targets"] + sum(found["left_out"].values()) == len(positives) and found["left_out"]["met before"] > 0
    for _, target in table.iterrows():
        ids, mine = target["candidates"].tolist(), rows[rows["user_id"] == target["user_id"]]
        assert ids[0] == target["item_id"] and len(set(ids)) == 12
        liked = mine[mine["rating"] > 3]
        assert not set(ids) & set(liked[liked["timestamp"] < target["timestamp"]]["item_id"])
        assert not set(ids[1:]) & set(liked[liked["timestamp"] == target["timestamp"]]["item_id"])
        history, candidates, user = asked(rows, target, ids)
        scores = scorer.score(history, candidates, user)[:, 1]
        low, high = bounds(scores, 0, 1e-5)
        assert low <= target["llm_above"] and target["llm_above"] + target["llm_tied"] - 1 <= high
        known = np.array([popular.get(item, 0.0) for item in ids])
        assert target["popularity_above"] == (known > known[0] * (1 + 1e-9)).sum()
    # The figures are those of the lists themselves.
    for system in ("llm", "popularity"):
        scores, right = [], []
        for above, tied in zip(table[f"{system}_above"], table[f"{system}_tied"], strict=True):
            scores += [0.9] * above + [0.5] * tied + [0.1] * (12 - above - tied)
            right += [0] * above + [1] + [0] * (11 - above)
        names = ["ndcg@10", "hr@10", "mrr@10"]
        p, number = np.array(scores), np.repeat(np.arange(len(table)), 12)
        wanted = compute_metrics(right, np.column_stack([1 - p, p]), candidate_sets=number, names=names)
        assert {name: found["systems"][system][name]["value"] for name in names} == pytest.approx(wanted)
    gap = found["systems"]["llm"]["mrr@10"]["value"] - found["systems"]["popularity"]["mrr@10"]["value"]
    assert found["llm_minus"]["popularity"]["mrr@10"]["value"] == pytest.approx(gap)
    assert found["users"] == table["user_id"].nunique() and found["sampling"] == "uniform"


def test_the_same_seed_gives_the_same_candidate_sets(rank, plain):
    first, table = rank(plain, candidates=6, bootstrap=40)
    again, same = rank(plain, candidates=6, bootstrap=40, out="again")
    assert table.equals(same) and first == again
    low, value, high = (first["systems"]["llm"]["ndcg@10"][key] for key in ("low", "value", "high"))
    assert low < value < high
    # A target has its list whatever others are drawn.
    few, part = rank(plain, candidates=6, targets=9, out="few")
    keys = ["user_id", "item_id", "timestamp"]
    both = part.merge(table, on=keys, suffixes=("", "_all"))
    assert len(part) == len(both) == few["targets"] == 9
    assert all((a == b).all() for a, b in zip(both["candidates"], both["candidates_all"], strict=True))
    _, other = rank(plain, candidates=6, seed=1, out="other")
    assert [set(a) for a in other["candidates"]] != [set(a) for a in table["candidates"]]


def test_the_whole_catalogue_equals_candidate_sets_of_all_items(rank, plain):
    whole, table = rank(plain, candidates="all", targets=25)
    fixed, lists = rank(plain, candidates=60, targets=25, sampling="popularity", out="fixed")
    assert "candidates" not in table.columns and (table["items"] == lists["candidates"].str.len()).all()
    shared = ["user_id", "item_id", "timestamp", "items", *(c for c in table if c.endswith(("_above", "_tied")))]
    assert table[shared].equals(lists[shared])
    assert whole["systems"] == fixed["systems"] and whole["list_items"]["least"] < whole["list_items"]["most"] < 60


def test_items_of_one_text_share_their_places(rank, plain, data):
    _, table = rank(plain, candidates="all")
    twins = table[table["item_id"].isin(TWINS)]
    assert len(twins) and (twins["llm_tied"] >= 2).any() and twins["llm_tied"].max() <= len(TWINS)
    # A few texts may also meet by chance: they differ by a digit, and a score is rounded to float32.
    others = table[~table["item_id"].isin(TWINS)]["llm_tied"]
    assert (others == 1).mean() > 0.8 and others.max() <= len(TWINS)


def test_a_pool_is_ranked_as_it_is_served(rank, fused, data):
    found, table = rank(fused, candidates="all", pool=15)
    assert list(found["systems"]) == ["llm", "fused", "retrieval", "popularity"] and found["pool"] == 15
    assert set(found["fused_minus"]) == {"llm", "retrieval", "popularity"}
    log = BehaviorLog.read(data)
    rows, scorer = log.interactions.to_pandas(), Scorer.load(fused, log)
    alone = Recommender(scorer, scorer.retrieval_index)
    inside = 0
    for _, target in table.iterrows():
        history, candidates, user = asked(rows, target, [target["item_id"]])
        context = {"hour": candidates[0]["hour"]}
        at_once = rows[(rows["user_id"] == target["user_id"]) & (rows["timestamp"] == target["timestamp"])]
        beside = set(at_once[at_once["rating"] > 3]["item_id"]) - {target["item_id"]}
        for system, recommender in (("fused", scorer.recommender()), ("llm", alone)):
            served = recommender.recommend(history, 15, user=user, context=context, exclude=sorted(beside), pool=15)
            score = {item.item_id: item.score for item in served}
            above, tied = target[f"{system}_above"], target[f"{system}_tied"]
            if target["item_id"] not in score:
                assert (above, tied) == (target["retrieval_above"], 1) and above >= 15
                continue
            inside += 1
            low, high = bounds(np.array([score.pop(target["item_id"]), *score.values()]), 0, 1e-5)
            assert low <= above and above + tied - 1 <= high and target["retrieval_above"] < 15
    assert 10 < inside < 2 * len(table)
    # Retrieval alone has another order, and puts all items of the list into one.
    assert (table["retrieval_above"] != table["fused_above"]).any() and (
        table["retrieval_above"] < table["items"]
    ).all()


def test_without_a_pool_the_fusion_ranks_all(rank, fused):
    found, _ = rank(fused, candidates=8, targets=10)
    assert list(found["systems"]) == ["llm", "fused", "popularity"]


def test_nothing_after_a_moment_changes_its_list_or_its_places(rank, plain, fused, data, tmp_path):
    """What comes later in the test period is turned round: other labels, for other targets."""
    interactions, items = tables()
    moment = int(np.quantile(interactions.column("timestamp").to_numpy(), 0.9))
    late = pc.greater(interactions.column("timestamp"), moment)
    ratings = pc.if_else(late, pc.subtract(5.5, interactions.column("rating")), interactions.column("rating"))
    place = interactions.column_names.index("rating")
    other = write_log(tmp_path / "other", interactions.set_column(place, "rating", ratings), items)
    for bundle, options in ((plain, {"candidates": 8}), (fused, {"candidates": "all", "pool": 10})):
        _, table = rank(bundle, **options)
        _, changed = rank(bundle, data=other, **options)
        early = [part[part["timestamp"] <= moment].reset_index(drop=True) for part in (table, changed)]
        assert len(early[0]) > 10 and len(table) != len(changed)
        numbers = [c for c in table if c != "candidates"]
        assert early[0][numbers].equals(early[1][numbers])
        if "candidates" in table:
            assert all((a == b).all() for a, b in zip(early[0]["candidates"], early[1]["candidates"], strict=True))


# -- who is ranked, and among what -----------------------------------------------------------------


def lists_of(rows: list[tuple], items: int = 6, exclude=None, name: str = "test", **options) -> CandidateSets:
    """Lists of a log of (user, item, time, rating)."""
    columns = dict(zip(("user_id", "item_id", "timestamp", "rating"), zip(*rows, strict=True), strict=True))
    table = pa.table({"item_id": [f"i{n}" for n in range(items)], "title": [f"Item {n}" for n in range(items)]})
    log = BehaviorLog(pa.table(columns | {"item_id": [f"i{n}" for n in columns["item_id"]]}), table)
    domain = Domain.from_dict(
        {**DOMAIN, "header": "", "event": "{title}", "recommend": {"exclude": exclude}}
    )  # fmt: skip
    return CandidateSets(
        split_by_domain(log, domain), name, domain, RankingConfig(**{"candidates": "all", "targets": None, **options})
    )


TRAINING = [("t", item, time, 5.0) for time, item in enumerate([0, 0, 0, 0, 0, 1, 2, 1, 0, 3, 1, 0, 0, 0])]
VALID = [("v", 4, 20 + n, 5.0) for n in range(3)]


def shown(lists: CandidateSets) -> dict[tuple, list[int]]:
    """From (user, item, time) to the codes of the list."""
    log = lists.log
    return {
        (
            log.user_ids[int(log.user_codes[row])].as_py(),
            int(log.item_codes[row]),
            int(log.timestamps[row]),
        ): lists.candidates(int(row)).tolist()
        for row in lists.rows
    }


def test_candidate_sets_leave_out_met_and_simultaneous_items():
    rows = [*TRAINING, *VALID, ("a", 1, 30, 5.0), ("a", 2, 31, 1.0), ("a", 3, 32, 5.0), ("a", 4, 32, 5.0),
            ("a", 5, 32, 1.0)]  # fmt: skip
    found = shown(lists_of(rows))
    # All labels exclude. At moment 32: 1 and 2 were met, 4 (3) is as right, and 5 was shown at that moment and refused.
    assert found[("a", 3, 32)] == [3, 0, 5] and found[("a", 4, 32)] == [4, 0, 5]
    assert shown(lists_of(rows, exclude=["like"]))[("a", 3, 32)] == [3, 0, 2, 5]
    assert shown(lists_of(rows, exclude=[]))[("a", 3, 32)] == [3, 0, 1, 2, 5]


def test_repeats_are_targets_where_nothing_excludes_them():
    rows = [*TRAINING, *VALID, ("a", 1, 30, 5.0), ("a", 1, 31, 5.0), ("a", 2, 32, 5.0), ("a", 2, 32, 5.0)]
    lists = lists_of(rows)
    assert set(shown(lists)) == {("a", 1, 30), ("a", 2, 32)}
    assert lists.left_out == {"met before": 1, "named twice at a moment": 1, "no other item left": 0}
    repeats = lists_of(rows, exclude=[])
    assert set(shown(repeats)) == {("a", 1, 30), ("a", 1, 31), ("a", 2, 32)}
    assert shown(repeats)[("a", 1, 31)] == [1, 0, 2, 3, 4, 5]
    # A refusal before, where only a like excludes, leaves the item a target.
    refusal = [*TRAINING, *VALID, ("a", 1, 30, 1.0), ("a", 1, 31, 5.0), ("a", 2, 32, 5.0)]
    assert ("a", 1, 31) in shown(lists_of(refusal, exclude=["like"])) and ("a", 1, 31) not in shown(lists_of(refusal))


def test_a_user_who_took_everything():
    rows = [*TRAINING, *VALID, *(("a", item, 30 + item, 5.0) for item in range(6))]
    lists = lists_of(rows)
    assert lists.left_out["no other item left"] == 1 and ("a", 5, 35) not in shown(lists)
    assert shown(lists)[("a", 4, 34)] == [4, 5]
    only = [*TRAINING, *VALID, *(("a", item, 19 + item / 8, 5.0) for item in range(5)), ("a", 5, 40, 5.0)]
    with pytest.raises(DataError, match="none of the 2 positives in test .* can be ranked: .* 1 no other item left"):
        lists_of([*only, *(("b", item, 40, 1.0) for item in range(3))])


def test_a_split_without_positives():
    rows = [*TRAINING, *VALID, *(("a", item, 30 + item, 1.0) for item in range(4))]
    with pytest.raises(DataError, match="test of log 'log' has no positive, so there is nothing to rank"):
        lists_of(rows)
    assert len(lists_of(rows, name="valid", exclude=[])) == 3


def test_candidate_sets_are_drawn_uniformly_or_by_training_counts():
    rows = [*TRAINING, *VALID, ("a", 5, 30, 5.0), ("a", 4, 31, 1.0), ("a", 3, 32, 1.0)]
    drawn = {"uniform": [], "popularity": []}
    for sampling, found in drawn.items():
        for seed in range(400):
            found.append(shown(lists_of(rows, candidates=2, sampling=sampling, seed=seed))[("a", 5, 30)][1])
    share = {name: np.bincount(found, minlength=6) / 400 for name, found in drawn.items()}
    assert share["uniform"][:5] == pytest.approx(0.2, abs=0.07)
    # 9, 3, 1 and 1 of the 14 training positives; rows of valid and test do not count, and 4 was never taken.
    assert share["popularity"][:5] == pytest.approx(np.array([9, 3, 1, 1, 0]) / 14, abs=0.07)
    assert share["popularity"][4] == 0
    full = shown(lists_of(rows, candidates=6, sampling="popularity"))[("a", 5, 30)]
    assert sorted(full) == list(range(6))


# -- what is refused -------------------------------------------------------------------------------


def test_an_index_that_has_seen_the_split_is_refused(recipe, plain, data, tmp_path, capfd):
    log, domain = BehaviorLog.read(data), Domain.from_dict(DOMAIN)
    splits = log.split(**SPLIT)
    flags = ["--bundle", str(plain), "--data.path", str(data), "--limit", "4", "--ranking.candidates", "5"]
    flags += ["--ranking.targets", "2", "--ranking.retrieval", str(tmp_path / "kept")]
    RetrievalIndex.fit(log, np.arange(len(log)), feedback(log, domain)).save(tmp_path / "kept")
    assert "but test begins at" in refused(recipe("evaluate"), flags, capfd)
    RetrievalIndex.fit(log, np.concatenate([splits.train.rows, splits.valid.rows]), feedback(log, domain)).save(
        tmp_path / "kept"
    )
    assert "but valid begins at" in refused(recipe("evaluate"), [*flags, "--split", "valid"], capfd)
    recipe("evaluate")(flags)


def test_a_split_by_user_needs_an_index_of_its_training_users(recipe, tiny_base, data, tmp_path, capfd):
    domain = Domain.from_dict({**DOMAIN, "split": {"by": "user", "valid": 0.3, "test": 0.3}})
    bundle = noisy_bundle(tmp_path / "bundle", tiny_base("llama"), domain=domain.to_dict())
    log = BehaviorLog.read(data)
    splits, labels = split_by_domain(log, domain), feedback(log, domain)
    flags = ["--bundle", str(bundle), "--data.path", str(data), "--limit", "4", "--ranking.candidates", "all"]
    flags += ["--ranking.targets", "3", "--ranking.pool", "5", "--output_dir", str(tmp_path / "out")]
    RetrievalIndex.fit(log, np.arange(len(log)), labels, timed=False).save(bundle / DIRECTORY)
    assert "which are not the" in refused(recipe("evaluate"), flags, capfd)
    RetrievalIndex.fit(log, splits.train.rows, labels, timed=False).save(bundle / DIRECTORY)
    recipe("evaluate")(flags)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["ranking"]["targets"] == 3


def test_retrieval_that_is_not_there(recipe, plain, data, tmp_path, capfd):
    flags = ["--bundle", str(plain), "--data.path", str(data), "--ranking.candidates", "all"]
    line = refused(recipe("evaluate"), [*flags, "--ranking.pool", "5"], capfd)
    assert "ranking.pool needs a retrieval index" in line and "recipes/index.py" in line
    assert "ranking.retrieval needs" in refused(recipe("evaluate"), [*flags, "--ranking.retrieval", "nowhere"], capfd)


def test_an_encoder_ranks_nothing(recipe, tiny_base, data, tmp_path, capfd):
    bundle = noisy_bundle(tmp_path / "bundle", tiny_base("bert"), "head")
    flags = ["--bundle", str(bundle), "--data.path", str(data), "--limit", "4", "--ranking.candidates", "5"]
    assert "is a bidirectional encoder" in refused(recipe("evaluate"), flags, capfd)


def test_without_ranking_nothing_is_ranked(recipe, plain, data, tmp_path):
    recipe("evaluate")(
        ["--bundle", str(plain), "--data.path", str(data), "--limit", "4", "--output_dir", str(tmp_path / "out")]
    )
    assert set(json.loads((tmp_path / "out" / "metrics.json").read_text())) == {"test"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "predictions.parquet"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["candidates=1"], "ranking.candidates must be at least 2, all, or null, not 1"),
        (["candidates=some"], "ranking.candidates must be a whole number or all or null, not 'some'"),
        (["candidates=9", "pool=5"], "ranking.candidates must be all with ranking.pool, not 9"),
        (["targets=0"], "ranking.targets must be at least 1, or null, not 0"),
        (["pool=0", "candidates=all"], "ranking.pool must be at least 1"),
        (["seed=-1"], "ranking.seed must be at least 0"),
        (["sampling=random"], "ranking.sampling must be one of uniform, popularity"),
    ],
)
def test_settings_out_of_range(flags, message):
    with pytest.raises(ConfigError, match=message):
        read_config(EvaluateConfig, ["--bundle", "B", "--data.path", "D", *(f"--ranking.{flag}" for flag in flags)])


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_place_as_one(rank, fused, data, launch, tmp_path):
    found, table = rank(fused, candidates="all", pool=10, targets=50)
    flags = ["--bundle", str(fused), "--data.path", str(data), "--limit", "4", "--ranking.bootstrap", "0"]
    flags += ["--ranking.candidates", "all", "--ranking.pool", "10", "--ranking.targets", "50"]
    done = launch("ddp", "recipes/evaluate.py", *flags, "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-2000:]
    two = pq.read_table(tmp_path / "two" / "ranking.parquet").to_pandas()
    assert table.equals(two) and done.stdout.count("positives of") == 2
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["ranking"] == found
