"""A simulated shop: products, users with tastes, and sessions in which products are shown and clicked or skipped.

Nothing in it was measured. It allows a first run without a download, and tests that know the true probability of each
click, hence the AUC of an ideal observer.

The logit of a click of user u on product i is

    bias_u + appeal[category_i] + taste_u[category_i] + brand_u[brand_i] + quality_i - 4 (price rank_i - budget_u)^2
    + intercept

with normal biases, appeals, tastes and qualities, the price rank of i inside its category and the budget of u both in
[0, 1]. So the clicks of all users show which products are liked, and the earlier clicks of a user predict the next,
both through words of the title, the category and the price.

    python -m llmrec_peft.data.simulate DIRECTORY
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError
from llmrec_peft.files import write_parquet, write_text

NAME = "simulated_shop"
START = 1_767_225_600  # 2026-01-01 00:00 UTC
DAYS = 120

# category: (median price, brands, adjectives, nouns)
CATALOGUE: dict[str, tuple[float, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "Running shoes": (
        95.0,
        ("Fellstride", "Quickbeam", "Tarn Run", "Marlowe Athletic"),
        ("Lightweight", "Cushioned", "Waterproof", "Wide-fit", "Carbon-plated"),
        ("Road Shoe", "Trail Shoe", "Racing Flat", "Track Spike"),
    ),
    "Coffee": (
        14.0,
        ("Copperkettle", "Finca Alta", "Northgate Roasters", "Little Harbour"),
        ("Dark Roast", "Single-origin", "Decaf", "Organic", "Espresso Blend"),
        ("Whole Beans 1 kg", "Ground Coffee 250 g", "Capsules 40-pack", "Instant Coffee"),
    ),
    "Cookware": (
        48.0,
        ("Ironmere", "Casa Bruna", "Halden", "Potter & Pike"),
        ("Cast Iron", "Non-stick", "Stainless Steel", "Enamelled", "Copper-base"),
        ("Frying Pan", "Casserole", "Saucepan Set", "Wok", "Griddle"),
    ),
    "Board games": (
        32.0,
        ("Oak & Meeple", "Ninth Knight", "Lanternlight Games", "Tabletop Union"),
        ("Cooperative", "Two-player", "Family", "Strategy", "Party"),
        ("Card Game", "Board Game", "Dice Game", "Puzzle Adventure"),
    ),
    "Houseplants": (
        22.0,
        ("Greenwell", "Fernhill Nursery", "Leaf Lane", "Sunnypot"),
        ("Potted", "Hanging", "Low-light", "Flowering", "Pet-safe"),
        ("Monstera", "Peace Lily", "Boston Fern", "Aloe Vera", "Orchid"),
    ),
    "Headphones": (
        79.0,
        ("Auralis", "Bassline", "Quietude", "Northtone"),
        ("Wireless", "Noise-cancelling", "Over-ear", "Sports", "Studio"),
        ("Headphones", "Earbuds", "Headset", "In-ear Monitors"),
    ),
    "Skin care": (
        18.0,
        ("Maris", "Petal & Stone", "Dermaline", "Oatfield"),
        ("Hydrating", "Fragrance-free", "Vitamin C", "Anti-ageing", "Sensitive"),
        ("Face Cream", "Cleanser", "Serum", "Sunscreen SPF 50", "Hand Balm"),
    ),
    "Garden tools": (
        36.0,
        ("Spadewell", "Hedgerow", "Ironmere", "Thornton Tools"),
        ("Telescopic", "Cordless", "Heavy-duty", "Ergonomic", "Folding"),
        ("Pruning Shears", "Hedge Trimmer", "Garden Fork", "Hose Reel", "Rake"),
    ),
    "Pet supplies": (
        20.0,
        ("Wagtail", "Purrfield", "Barkley & Co", "Hutch House"),
        ("Grain-free", "Washable", "Interactive", "Orthopaedic", "Reflective"),
        ("Dog Bed", "Cat Tree", "Dog Lead", "Puppy Food 5 kg", "Cat Toy"),
    ),
    "Crime novels": (
        11.0,
        ("Blackfriars Press", "Harbour Street Books", "Penhallow", "Nightjar Editions"),
        ("Nordic", "Cosy", "Victorian", "Courtroom", "Hard-boiled"),
        ("Murder Mystery", "Detective Novel", "Thriller", "Crime Anthology"),
    ),
    "Camping": (
        85.0,
        ("Fellstride", "Highmoor", "Tarn Outdoor", "Basecamp Nine"),
        ("Ultralight", "Four-season", "Inflatable", "Family", "Windproof"),
        ("Tent", "Sleeping Bag", "Camping Stove", "Sleeping Mat", "Head Torch"),
    ),
    "Desk and office": (
        60.0,
        ("Plainwork", "Halden", "Ledger Lane", "Workwell"),
        ("Adjustable", "Walnut", "Compact", "Ergonomic", "Magnetic"),
        ("Desk Lamp", "Office Chair", "Monitor Stand", "Desk Organiser", "Whiteboard"),
    ),
}

README = """# A simulated shop

This log is **simulated**. No person clicked anything and no product exists; do not report results on it as results on
real behaviour. It was drawn by `llmrec_peft.data.simulate` with seed {seed}: {users} users, {items} products, {rows}
products shown, {share:.0%} of them clicked.

- `interactions.parquet`: user_id, item_id, timestamp (seconds since 1970), label (1 clicked, 0 skipped), behaviour
  (click or skip), session_id. One row for each product shown.
- `items.parquet`: item_id, title, category, brand, price.

An ideal observer, who knows the probability of every click, reaches AUC {auc:.3f}. No classifier can do better.
"""


@dataclass(frozen=True)
class Shop:
    """A drawn shop: its log, the true click probability of each row, and the AUC of the observer who knows it."""

    log: BehaviorLog
    probabilities: np.ndarray
    ideal_auc: float


def simulate_shop(users: int = 300, seed: int = 0, *, items: int = 400, sessions: float = 9.5) -> BehaviorLog:
    """Draw a simulated log; the same arguments give the same log.

    Args:
        users: number of users.
        seed: random seed.
        items: number of products.
        sessions: mean sessions of a user; each shows about seven products, so the default gives about 20,000 rows.

    Raises:
        DataError: an argument out of range.
    """
    return draw_shop(users, seed, items=items, sessions=sessions).log


def write_simulated_shop(
    directory: str | Path, users: int = 300, seed: int = 0, *, items: int = 400, sessions: float = 9.5
) -> Path:
    """Write a simulated log as `interactions.parquet`, `items.parquet` and a README that says what it is."""
    shop = draw_shop(users, seed, items=items, sessions=sessions)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_parquet(shop.log.interactions, directory / "interactions.parquet")
    write_parquet(shop.log.items, directory / "items.parquet")
    share = float(np.mean(shop.log.column("label").to_numpy()))
    text = README.format(
        seed=seed, users=shop.log.num_users, items=items, rows=len(shop.log), share=share, auc=shop.ideal_auc
    )
    write_text(text, directory / "README.md")
    return directory


def draw_shop(users: int = 300, seed: int = 0, *, items: int = 400, sessions: float = 9.5) -> Shop:
    """Draw a shop with its true probabilities; the arguments are those of `simulate_shop`."""
    for argument, value, least in (("users", users, 1), ("items", items, len(CATALOGUE)), ("sessions", sessions, 0.1)):
        if not value >= least:
            raise DataError(f"simulate_shop: {argument} must be at least {least}, got {value}; raise it")
    rng = np.random.default_rng(seed)
    table, category, brand, price_rank = _draw_items(rng, items)
    user, session, item, seconds = _draw_exposures(rng, users, category, sessions)

    # The tastes have their own generator, so that they do not depend on how many products were shown.
    taste_rng = np.random.default_rng([seed, 1])
    taste = taste_rng.normal(0.0, 1.2, (users, len(CATALOGUE))) + taste_rng.normal(0.0, 1.2, len(CATALOGUE))
    loyalty = taste_rng.normal(0.0, 0.7, (users, brand.max() + 1))
    bias = taste_rng.normal(0.0, 0.7, users)
    budget = taste_rng.uniform(0.0, 1.0, users)
    quality = taste_rng.normal(0.0, 0.4, items)
    logits = bias[user] + taste[user, category[item]] + loyalty[user, brand[item]] + quality[item]
    logits += -4.0 * (price_rank[item] - budget[user]) ** 2 + 0.1
    probability = 1.0 / (1.0 + np.exp(-logits))
    label = (rng.random(len(user)) < probability).astype(np.int8)

    order = np.lexsort((seconds, user))
    user, session, item = user[order], session[order], item[order]
    seconds, label, probability = seconds[order], label[order], probability[order]
    interactions = pa.table(
        {
            "user_id": _names("u", user, users),
            "item_id": table.column("item_id").take(pa.array(item)),
            "timestamp": seconds,
            "label": label,
            "behaviour": pa.array(["skip", "click"]).take(pa.array(label)),
            "session_id": _names("s", session, int(session.max()) + 1),
        }
    )
    # Rows are sorted by user and time already; a log does not reorder them, so probabilities stay aligned.
    log = BehaviorLog(interactions, table, name=NAME)
    return Shop(log, probability, _auc(label, probability))


def _names(prefix: str, codes: np.ndarray, count: int) -> pa.Array:
    width = max(4, len(str(count)))
    return pa.array([f"{prefix}{number:0{width}d}" for number in range(count)]).take(pa.array(codes))


def _draw_items(rng: np.random.Generator, items: int) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray]:
    """The catalogue: the item table, then category, brand and price rank in the category of each item."""
    category = np.sort(np.arange(items) % len(CATALOGUE))
    brand_names = sorted({name for _, brands, _, _ in CATALOGUE.values() for name in brands})
    rows: dict[str, list[Any]] = {"title": [], "category": [], "brand": [], "price": []}
    for number, (name, (median, brands, adjectives, nouns)) in enumerate(CATALOGUE.items()):
        count = int(np.sum(category == number))
        combinations = len(brands) * len(adjectives) * len(nouns)
        picks = rng.permutation(combinations)[np.arange(count) % combinations]
        for place, pick in enumerate(picks):
            first, rest = divmod(int(pick), len(adjectives) * len(nouns))
            second, third = divmod(rest, len(nouns))
            edition = f", edition {place // combinations + 1}" if place >= combinations else ""
            rows["title"].append(f"{brands[first]} {adjectives[second]} {nouns[third]}{edition}")
            rows["category"].append(name)
            rows["brand"].append(brands[first])
        rows["price"].extend(np.round(median * np.exp(rng.normal(0.0, 0.5, count)), 2).tolist())
    price = np.array(rows["price"])
    rank = np.empty(items)
    for number in range(len(CATALOGUE)):
        inside = np.flatnonzero(category == number)
        rank[inside] = (np.argsort(np.argsort(price[inside])) + 0.5) / len(inside)
    table = pa.table({"item_id": _names("p", np.arange(items), items), **rows})
    return table, category, np.searchsorted(brand_names, rows["brand"]), rank


def _draw_exposures(
    rng: np.random.Generator, users: int, category: np.ndarray, sessions: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The shown products: user, session, item and second of each row; a session shows a product once."""
    per_user = 1 + rng.poisson(max(sessions - 1.0, 0.0), users)
    session_user = np.repeat(np.arange(users), per_user)
    count = len(session_user)
    per_session = 4 + rng.binomial(8, 0.4, count)
    session = np.repeat(np.arange(count), per_session)
    rows = len(session)

    # A session is about one category, and the page mixes in products of others.
    intent = rng.integers(0, len(CATALOGUE), count)
    shown = np.where(rng.random(rows) < 0.4, intent[session], rng.integers(0, len(CATALOGUE), rows))
    sizes = np.bincount(category, minlength=len(CATALOGUE))
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    item = first[shown] + np.floor(rng.random(rows) * sizes[shown]).astype(np.int64)

    start = START + rng.integers(0, DAYS, count) * 86_400
    start += np.clip(rng.normal(19 * 3_600, 2.5 * 3_600, count), 0, 86_399).astype(np.int64)
    gaps = rng.integers(5, 60, rows)
    elapsed = np.cumsum(gaps)
    elapsed -= elapsed[np.searchsorted(session, session)]
    seconds = start[session] + elapsed
    _, first_shown = np.unique(session * len(category) + item, return_index=True)
    first_shown.sort()
    return session_user[session[first_shown]], session[first_shown], item[first_shown], seconds[first_shown]


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Fraction of (clicked, skipped) pairs that the scores order correctly; scores are continuous, without ties."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def main(arguments: list[str] | None = None) -> int:
    """Command line: write a simulated shop; on failure print one line and exit with code 2."""
    parser = argparse.ArgumentParser(prog="python -m llmrec_peft.data.simulate", description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="where to write interactions.parquet, items.parquet and README.md")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--sessions", type=float, default=9.5, help="mean sessions of a user")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        directory = write_simulated_shop(
            options.directory, options.users, options.seed, items=options.items, sessions=options.sessions
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote a simulated shop to {directory}: {BehaviorLog.read(directory)!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
