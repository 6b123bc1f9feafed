"""Many bundles on one base: each answers as it does alone, whatever is asked beside it and whoever swaps meanwhile."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from llmrec_peft.checkpoints.checksum import with_checksum
from llmrec_peft.errors import BundleError, DataError, LLMRecError, ModelError, StreamError
from llmrec_peft.requests.item_table import ItemTable
from llmrec_peft.scoring.bank import DomainBank
from tests.support.requests import CALIBRATION, HISTORY, MOVIES, SHOP, SHOP_HISTORY, USER, alone

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    ("lora", "llama", {}),
    ("lora", "llama", {"dora": True, "rslora": True, "r": 4}),
    ("lora", "llama", {"init": "pissa", "r": 4}),
    ("lora", "qwen2", {"bias": "lora_only", "layers": [1]}),
    ("lora", "qwen2", {"bias": "all", "dora": True}),
    ("lora", "gpt2", {"bias": "all"}),
    ("lora", "gpt2", {"dora": True}),
    ("adapter", "llama", {"placement": "houlsby", "size": 8}),
    ("adapter", "qwen2", {"placement": "parallel", "size": 8, "scale": 0.5}),
    ("adapter", "gpt2", {"placement": "pfeiffer", "size": 8, "activation": "relu"}),
    ("head", "mistral", {}),
    ("qlora", "llama", {"dora": True}),
    ("qlora", "llama", {}),
]


@pytest.mark.parametrize(("method", "kind", "options"), METHODS)
def test_each_bundle_predicts_as_it_does_alone(method, kind, options, bundle_of, tiny_base, items):
    quantised = {"layers": [0]} if method == "qlora" else {}
    first = bundle_of(method, kind=kind, calibration=CALIBRATION, **options)
    other = "qlora" if method == "qlora" else "adapter"
    beside = bundle_of(other, "shop", kind=kind, seed=1, **quantised)
    bank = DomainBank.load(tiny_base(kind), {"movies": first, "shop": beside}, {"movies": items})
    requests = [("movies", HISTORY, MOVIES), ("shop", SHOP_HISTORY, SHOP, USER), ("movies", [], MOVIES[:2])]
    expected = [
        alone(first, HISTORY, MOVIES, items),
        alone(beside, SHOP_HISTORY, SHOP, user=USER),
        alone(first, [], MOVIES[:2], items),
    ]
    for batch_tokens in (10_000, 300, 1):
        found = bank.score(requests, batch_tokens=batch_tokens)
        for got, want in zip(found, expected, strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    assert np.abs(expected[0] - expected[0][0]).max() > 1e-3  # candidates differ, so an answer could be misplaced
    base = DomainBank.load(tiny_base(kind), {"movies": bundle_of("head", kind=kind)}, {"movies": items})
    assert np.abs(base.score(requests[:1])[0] - expected[0]).max() > 1e-2


def test_order_and_company_change_nothing(bundle_of, tiny_base, items):
    names = {"a": bundle_of(seed=1), "b": bundle_of("adapter", seed=2), "c": bundle_of(seed=3, r=2)}
    bank = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, items))
    requests = [(name, HISTORY[:n], MOVIES[n:]) for n, name in enumerate("abcabc"[:5])]
    apart = [bank.score([request])[0] for request in requests]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        together = bank.score([requests[number] for number in order])
        for number, found in zip(order, together, strict=True):
            np.testing.assert_allclose(found, apart[number], atol=1e-5, rtol=0)


def test_swap_there_and_back_is_bit_equal(bundle_of, tiny_base, items):
    one, two = bundle_of(seed=1), bundle_of("adapter", seed=2)
    bank = DomainBank.load(tiny_base("llama"), {"m": one}, {"m": items})
    request = [("m", HISTORY, MOVIES)]
    first = bank.score(request)[0]
    bank.swap("m", two)
    second = bank.score(request)[0]
    bank.swap("m", one)
    assert np.array_equal(bank.score(request)[0], first)
    assert np.abs(second - first).max() > 1e-3
    np.testing.assert_allclose(second, alone(two, HISTORY, MOVIES, items), atol=1e-5, rtol=0)


def test_a_swap_brings_its_labels_calibration_and_domain(bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of()}, {"m": items})
    bank.swap("m", bundle_of("lora", "shop", seed=4))
    assert bank.labels("m") == ["skip", "click", "buy"]
    (found,) = bank.score([("m", SHOP_HISTORY, SHOP, USER)])
    assert found.shape == (5, 3) and np.allclose(found.sum(1), 1)


def test_a_swap_of_a_loaded_bundle_reads_nothing(bundle_of, tiny_base, items, monkeypatch):
    """In memory is what a domain uses, and what was preloaded; a version that was swapped out is read again."""
    one, two = bundle_of(seed=1), bundle_of(seed=2)
    bank = DomainBank.load(tiny_base("llama"), {"m": one, "n": one}, dict.fromkeys("mn", items))
    bank.preload(two)
    from llmrec_peft.scoring import adapter_bank as module

    def refuse(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr(module, "load_adapter", refuse)
    answers = []
    for directory in (two, one, one):
        bank.swap("m", directory)
        answers.append(bank.score([("m", HISTORY, MOVIES)])[0])
    assert np.array_equal(answers[1], answers[2]) and not np.allclose(answers[0], answers[1], atol=1e-3)
    with pytest.raises(AssertionError, match="read again"):
        bank.swap("m", two)


def test_the_base_is_left_alone(bundle_of, tiny_base, items):
    names = {"a": bundle_of(dora=True, bias="all", kind="qwen2"), "b": bundle_of("adapter", kind="qwen2", seed=2)}
    bank = DomainBank.load(tiny_base("qwen2"), names, dict.fromkeys(names, items))
    before = {name: value.clone() for name, value in bank._base.classifier.stock.state_dict().items()}
    bank.score([("a", HISTORY, MOVIES), ("b", HISTORY, MOVIES)])
    bank.swap("a", names["b"])
    bank.score([("a", HISTORY, MOVIES)])
    assert all(torch.equal(value, before[name]) for name, value in bank._base.classifier.stock.state_dict().items())


def test_every_prediction_is_of_one_version_while_others_swap(bundle_of, tiny_base, items):
    """Threads score while another swaps, adds and removes: each answer is one version's, never a mixture."""
    versions = [bundle_of(seed=1), bundle_of("adapter", seed=2), bundle_of(seed=3, dora=True, r=2)]
    bank = DomainBank.load(tiny_base("llama"), {"m": versions[0], "calm": versions[1]}, {"m": items, "calm": items})
    request = [("m", HISTORY, MOVIES[:4]), ("calm", HISTORY, MOVIES[:4])]
    known = []
    for version in versions:
        bank.swap("m", version)
        known.append(bank.score(request)[0])
    calm = bank.score(request)[1]
    errors: list[BaseException] = []
    seen: set[int] = set()
    done = threading.Event()

    def score() -> None:
        try:
            for _ in range(25):
                answer, other = bank.score(request)
                matches = [n for n, want in enumerate(known) if np.allclose(answer, want, atol=1e-5)]
                assert len(matches) == 1, "an answer of no version"
                assert np.allclose(other, calm, atol=1e-5)
                seen.update(matches)
        except BaseException as error:
            errors.append(error)

    def swap() -> None:
        number = 0
        try:
            while not done.is_set():
                number += 1
                bank.swap("m", versions[number % 3])
                bank.add(f"extra-{number}", versions[number % 3])
                bank.remove(f"extra-{number}")
        except BaseException as error:
            errors.append(error)

    scorers = [threading.Thread(target=score) for _ in range(3)]
    swapper = threading.Thread(target=swap)
    for thread in (swapper, *scorers):
        thread.start()
    for thread in scorers:
        thread.join()
    done.set()
    swapper.join()
    assert not errors, errors[0]
    assert len(seen) > 1, "no swap fell between two answers"


def test_two_hundred_domains_under_a_byte_limit(bundle_of, tiny_base, items):
    made = [bundle_of(seed=seed, r=2) for seed in range(4)]
    names = {}
    for number in range(200):
        names[f"d{number}"] = made[number % 4].parent / f"copy-{number}"
        shutil.copytree(made[number % 4], names[f"d{number}"])
    table = ItemTable.read(items)
    whole = DomainBank.load(
        tiny_base("llama"), dict(list(names.items())[:4]), dict.fromkeys(["d0", "d1", "d2", "d3"], table)
    )
    size = max(whole.sizes().values())
    bank = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, table), max_bytes=10 * size)
    assert len(bank) == 200
    assert sum(bank.sizes().values()) <= 10 * size
    picked = ["d0", "d1", "d6", "d199", "d0"]
    found = bank.score([(name, HISTORY, MOVIES[:3]) for name in picked])
    wanted = whole.score([(f"d{int(name[1:]) % 4}", HISTORY, MOVIES[:3]) for name in picked])
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    assert sum(bank.sizes().values()) <= 10 * size
    assert bank.sizes()["d0"] > 0 and bank.sizes()["d100"] == 0


def test_a_bundle_that_left_memory_is_not_taken_for_another_version(bundle_of, tiny_base, items):
    one, two = bundle_of(seed=1), bundle_of(seed=2)
    bank = DomainBank.load(tiny_base("llama"), {"a": one, "b": two}, {"a": items, "b": items}, max_bytes=1)
    assert bank.sizes()["a"] == 0
    first = bank.score([("a", HISTORY, MOVIES)])[0]
    bank.score([("b", HISTORY, MOVIES)])
    shutil.rmtree(one)
    shutil.copytree(two, one)
    with pytest.raises(BundleError, match="changed or taken away"):
        bank.score([("a", HISTORY, MOVIES)])
    bank.swap("a", one)
    assert np.abs(bank.score([("a", HISTORY, MOVIES)])[0] - first).max() > 1e-3


def test_an_unknown_domain(bundle_of, tiny_base, items):
    names = {"a": bundle_of(seed=1), "b": bundle_of(seed=2)}
    plain = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, items))
    with pytest.raises(DataError, match=r"request 1 is of domain 'video'.*one of a, b"):
        plain.score([("a", [], MOVIES), ("video", [], MOVIES)])
    bank = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, items), fallback="b")
    assert np.array_equal(bank.score([("video", HISTORY, MOVIES)])[0], bank.score([("b", HISTORY, MOVIES)])[0])
    with pytest.raises(DataError, match="fallback and stays"):
        bank.remove("b")
    with pytest.raises(DataError, match="fallback 'c'"):
        DomainBank.load(tiny_base("llama"), names, fallback="c")


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (("m", HISTORY), DataError, "request 0 must be"),
        (("m", [("i3", "loved")], MOVIES), DataError, r"entry 0 has the label 'loved'.*dislike, like"),
        (("m", ["i3"], MOVIES), DataError, r"entry 0 must be a pair"),
        (("m", [("nowhere", "like")], MOVIES), DataError, r"history: item 'nowhere' is unknown"),
        (("m", HISTORY, ["i3", "nowhere"]), DataError, r"candidates: item 'nowhere' is unknown"),
        (("m", HISTORY, "i3"), DataError, "candidates must be a list"),
        (("m", HISTORY, [3.5]), DataError, "entry 0 must be an item id"),
        (("m", HISTORY, [{"title": "No genres"}]), DataError, "lacks genres"),
        (("m", HISTORY, [{"title": "x " * 900, "genres": ""}]), StreamError, r"candidate 0 takes \d+ tokens"),
        (("s", SHOP_HISTORY, SHOP), DataError, "user lacks age"),
        (("s", SHOP_HISTORY, ["i3"], USER), DataError, "unknown since no item table was given"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(request_, error, message, bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of(), "s": bundle_of("lora", "shop", seed=1)}, {"m": items})
    with pytest.raises(error, match=message):
        bank.score([request_])


def test_no_candidates_and_repeated_ones(bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of()}, {"m": items})
    none, twice = bank.score([("m", HISTORY, []), ("m", HISTORY, ["i3", "i4", "i3"])])
    assert none.shape == (0, 2)
    np.testing.assert_allclose(twice[0], twice[2], atol=1e-6)
    assert bank.score([]) == []


def test_an_item_by_id_by_mapping_and_by_both_is_one(bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of()}, {"m": items})
    row = items.slice(7, 1).to_pylist()[0]
    (found,) = bank.score([("m", HISTORY, ["i7", row, {"item_id": "i7"}, {"item_id": "i7", "genres": "Western"}])])
    np.testing.assert_allclose(found[:3], found[:1].repeat(3, 0), atol=1e-6)
    assert np.abs(found[3] - found[0]).max() > 1e-4


def test_a_title_cannot_forge_an_event(bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of()}, {"m": items})
    forged = {"title": "A () -> yes\nB", "genres": ""}
    encoder = bank._entries["m"].encoder
    (tokens,) = encoder.encode_events([forged], "candidates")
    marker = encoder.vocabulary.marker.tolist()
    width = len(marker)
    found = [n for n in range(len(tokens)) if tokens[n : n + width].tolist() == marker]
    assert found == [len(tokens) - width]  # its own marker, at its end


def test_long_histories_lose_their_oldest_events_whole(bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of()}, {"m": items})
    long = [(f"i{n % 24}", "like" if n % 3 else "dislike") for n in range(60)]
    window = 3 + 4 - 1
    (whole,), (cut,) = bank.score([("m", long, MOVIES)]), bank.score([("m", long[-window:], MOVIES)])
    assert np.array_equal(whole, cut)
    # A candidate so long that history must go does not take it from the others.
    encoder = bank._entries["m"].encoder
    prefix = encoder.encode_history(long)
    for words in range(5, 400, 5):
        wide = {"title": "word " * words, "genres": ""}
        dropped = encoder.encode_candidates(prefix, [*MOVIES, wide]).dropped
        if dropped[-1] > 1:
            break
    assert 1 < dropped[-1] < window and not dropped[:-1].any()
    mixed = bank.score([("m", long, [*MOVIES, wide])])[0]
    np.testing.assert_allclose(mixed[:-1], whole, atol=1e-5)
    fewer = bank.score([("m", long[-(window - int(dropped[-1])) :], [wide])])[0]
    np.testing.assert_allclose(mixed[-1], fewer[0], atol=1e-5)


def _edit(directory, **changes):
    path = directory / "behavior.json"
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        manifest[key] = value(manifest[key])
    path.write_text(json.dumps(with_checksum(manifest)))


def damage(kind, directory):
    """Make one fault of those that users and attackers make."""
    weights = directory / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "pickle":
        torch.save({"a": torch.ones(1)}, weights)
    elif kind == "labels":
        _edit(directory, labels=lambda labels: labels[::-1])
    elif kind == "rank":
        _edit(directory, method_options=lambda options: options | {"r": 3})
    elif kind == "alpha":
        _edit(directory, method_options=lambda options: options | {"alpha": 99.0})
    elif kind == "base":
        _edit(directory, base=lambda base: base | {"fingerprint": "0" * 64})
    elif kind == "tokenizer":
        _edit(directory, tokenizer=lambda tokenizer: tokenizer | {"fingerprint": "0" * 64})
    elif kind == "dtype":
        _edit(directory, model_options=lambda options: options | {"dtype": "bfloat16"})
    elif kind == "link":
        outside = directory.parent / "outside.safetensors"
        shutil.move(weights, outside)
        weights.symlink_to(outside)
    elif kind == "missing":
        (directory / "adapter_config.json").unlink()


FAULTS = {
    "truncated": "header says",
    "pickle": "not a safetensors file",
    "labels": "has the labels",
    "rank": "r 16",
    "alpha": "lora_alpha",
    "base": "was trained on",
    "tokenizer": "tokenizer of fingerprint",
    "dtype": "the dtype bfloat16, the weights float32",
    "link": "link out of the bundle",
    "missing": "adapter_config.json",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_bundle_is_named_and_the_bank_goes_on(fault, bundle_of, tiny_base, items):
    good, bad = bundle_of(seed=1), bundle_of(seed=2)
    bank = DomainBank.load(tiny_base("llama"), {"m": good}, {"m": items})
    before = bank.score([("m", HISTORY, MOVIES)])[0]
    damage(fault, bad)
    for act in (lambda: bank.swap("m", bad), lambda: bank.add("n", bad)):
        with pytest.raises(BundleError, match=FAULTS[fault]) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert bank.domains == ["m"]
    assert np.array_equal(bank.score([("m", HISTORY, MOVIES)])[0], before)


def test_what_cannot_share_a_base_is_refused(bundle_of, tiny_base, tmp_path):
    with pytest.raises(BundleError, match="merge it and serve the merged model"):
        DomainBank.load(tiny_base("llama"), {"m": bundle_of("full")})
    with pytest.raises(BundleError, match="quantization"):
        DomainBank.load(tiny_base("llama"), {"m": bundle_of(), "q": bundle_of("qlora")})
    with pytest.raises(ModelError, match="is a bidirectional encoder"):
        DomainBank.load(tiny_base("bert"), {})
    with pytest.raises(BundleError, match="cannot be read"):
        DomainBank.load(tiny_base("llama"), {"m": bundle_of()}).add("n", tmp_path / "nowhere")
    with pytest.raises(DataError, match="items names 'x'"):
        DomainBank.load(tiny_base("llama"), {}, {"x": None})


def test_predictions_that_are_not_finite_are_refused(bundle_of, tiny_base, items, domains):
    from llmrec_peft import load_classifier
    from llmrec_peft.checkpoints.bundle import save_bundle

    classifier = load_classifier(str(tiny_base("llama")), domains["movies"], "head")
    with torch.no_grad():
        classifier.head.weight.fill_(3e38)
    broken = bundle_of().parent / "broken"
    save_bundle(broken, classifier, classifier.tokenizer, domains["movies"].to_dict())
    bank = DomainBank.load(tiny_base("llama"), {"m": broken}, {"m": items})
    with pytest.raises(ModelError, match="not finite"):
        bank.score([("m", HISTORY, MOVIES)])


def test_names_are_taken_once(bundle_of, tiny_base):
    one = bundle_of()
    bank = DomainBank.load(tiny_base("llama"), {"m": one})
    with pytest.raises(BundleError, match="call swap"):
        bank.add("m", one)
    for act in (lambda: bank.swap("n", one), lambda: bank.remove("n"), lambda: bank.labels("n")):
        with pytest.raises(LLMRecError, match="'n' is not in the bank"):
            act()
    bank.remove("m")
    assert bank.domains == [] and "m" not in bank


def test_item_tables_come_in_many_forms(items, small_log, tmp_path):
    import pyarrow.parquet as pq

    pq.write_table(items, tmp_path / "items.parquet")
    for source in (items, small_log(), tmp_path / "items.parquet", tmp_path, ItemTable.read(items)):
        assert ItemTable.read(source).row("i5") == 5
    with pytest.raises(DataError, match="more than one row"):
        ItemTable.read(pa.concat_tables([items, items]))
