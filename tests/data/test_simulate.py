"""The simulated shop: deterministic, plainly labelled, and predictable from a user's history."""

import numpy as np
import pyarrow.compute as pc
import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.simulate import CATALOGUE, draw_shop, main, simulate_shop, write_simulated_shop
from llmrec_peft.errors import DataError


@pytest.fixture(scope="module")
def shop():
    return draw_shop()


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of ordered pairs, by counting pairs."""
    gap = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return float(np.mean(gap > 0) + np.mean(gap == 0) / 2)


def test_same_seed_same_shop_and_other_seed_another():
    first, again, other = simulate_shop(20), simulate_shop(20), simulate_shop(20, seed=1)
    assert first.interactions.equals(again.interactions) and first.items.equals(again.items)
    assert not first.interactions.equals(other.interactions) and not first.items.equals(other.items)


def test_default_size_and_shape(shop):
    log = shop.log
    assert log.name == "simulated_shop"
    assert 15_000 < len(log) < 25_000 and log.num_users == 300 and log.num_items == 400
    assert 0.3 < log.column("label").to_numpy().mean() < 0.6
    assert log.column("label").to_pylist() == [int(b == "click") for b in log.column("behaviour").to_pylist()]
    assert set(log.items.column("category").to_pylist()) == set(CATALOGUE)
    assert pc.min(log.items.column("price")).as_py() > 0


def test_titles_are_distinct_products(shop):
    titles = shop.log.items.column("title").to_pylist()
    assert len(set(titles)) == len(titles)
    brands = shop.log.items.column("brand").to_pylist()
    assert all(title.startswith(brand) for title, brand in zip(titles, brands, strict=True))
    many = simulate_shop(5, items=2_000).items.column("title").to_pylist()  # more products than combinations of words
    assert len(set(many)) == 2_000


def test_a_session_shows_a_product_once_and_lasts_minutes(shop):
    log = shop.log
    session = log.column("session_id").dictionary_encode().combine_chunks().indices.to_numpy()
    pairs = session.astype(np.int64) * log.num_items + log.item_codes
    assert len(np.unique(pairs)) == len(pairs)
    first = np.full(session.max() + 1, np.inf)
    last = np.zeros(session.max() + 1)
    np.minimum.at(first, session, log.timestamps)
    np.maximum.at(last, session, log.timestamps)
    assert np.all(last - first < 3_600)
    assert len(np.unique(np.stack([session, log.timestamps]), axis=1).T) == len(log)  # one product at one moment


def test_ideal_observer(shop):
    labels = shop.log.column("label").to_numpy()
    rng = np.random.default_rng(0)
    some = rng.permutation(len(labels))[:6_000]
    assert 0.8 < shop.ideal_auc < 0.9
    assert auc(labels[some], shop.probabilities[some]) == pytest.approx(shop.ideal_auc, abs=0.01)
    # The probabilities are those of the rows beside them: in each tenth the share of clicks is the mean probability.
    for rows in np.array_split(np.argsort(shop.probabilities), 10):
        assert labels[rows].mean() == pytest.approx(shop.probabilities[rows].mean(), abs=0.05)


def test_history_predicts(shop):
    """The rate of a user's earlier clicks in a category beats the user's rate, which beats nothing."""
    log = shop.log
    labels = log.column("label").to_numpy().astype(float)
    names = log.items.column("category").dictionary_encode().combine_chunks().indices.to_numpy()
    category = names[log.item_codes]

    def past_rate(keys: np.ndarray) -> np.ndarray:
        order = np.argsort(keys, kind="stable")  # rows of a user are in time order already
        sorted_keys, sorted_labels = keys[order], labels[order]
        start = np.searchsorted(sorted_keys, sorted_keys)
        clicks = np.cumsum(sorted_labels) - sorted_labels
        seen = np.arange(len(keys)) - start
        rate = np.empty(len(keys))
        rate[order] = (clicks - clicks[start] + 0.4) / (seen + 1.0)
        return rate

    late = log.timestamps > np.quantile(log.timestamps, 0.7)
    by_user = auc(labels[late], past_rate(log.user_codes)[late])
    by_category = auc(labels[late], past_rate(log.user_codes * len(CATALOGUE) + category)[late])
    assert by_user > 0.58
    assert by_category > by_user + 0.05


def test_written_shop_reads_back_and_is_marked_as_simulated(tmp_path):
    directory = write_simulated_shop(tmp_path / "shop", users=15, seed=3)
    assert sorted(entry.name for entry in directory.iterdir()) == ["README.md", "interactions.parquet", "items.parquet"]
    log, drawn = BehaviorLog.read(directory), simulate_shop(15, seed=3)
    assert log.interactions.equals(drawn.interactions) and log.items.equals(drawn.items)
    text = (directory / "README.md").read_text()
    assert "**simulated**" in text and "seed 3: 15 users" in text and f"{len(log)} products" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"users": 0}, "users must be at least 1, got 0"), ({"items": 3}, "items must be at least 12, got 3")],
)
def test_bad_sizes(arguments, expected):
    with pytest.raises(DataError, match=expected):
        simulate_shop(**arguments)


def test_command_line(tmp_path, capsys):
    assert main([str(tmp_path / "shop"), "--users", "5", "--seed", "2"]) == 0
    assert f"simulated shop to {tmp_path / 'shop'}: BehaviorLog('shop'" in capsys.readouterr().out
    assert main([str(tmp_path / "none"), "--users", "0"]) == 2
    assert "error: simulate_shop: users must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
