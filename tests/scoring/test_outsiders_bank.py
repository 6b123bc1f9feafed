"""What users of other banks of adapters reported: names taken for one another, and versions that stay in memory.

Names: PEFT took an adapter's name for another that begins alike (huggingface/peft#3780).
"""

from __future__ import annotations

import gc
import shutil
import threading
import weakref

import numpy as np
import pytest

from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.scoring import adapter_bank as bank_module
from llmrec_peft.scoring.bank import DomainBank
from tests.support.requests import CALIBRATION, HISTORY, MOVIES, alone

pytestmark = pytest.mark.usefixtures("one_thread")

ALIKE = ("foo", "foobar", "foo.bar", "foo/bar", "fo", "FOO", "default", "__base__", "adapter", "base_model.model",
         "na\u00efve", "nai\u0308ve", "映画", "foo bar", "0", "None", "x" * 200)  # fmt: skip
"""Names that begin alike, differ by case or by Unicode's form, are paths, or are names that PEFT uses itself."""


# -- names: other inputs that fail the same way are any name that is another's beginning, end, path or module ----------


def test_names_that_look_alike_give_the_right_adapter(bundle_of, tiny_base, items):
    made = [bundle_of(seed=1), bundle_of("adapter", seed=2), bundle_of(seed=3, r=2, calibration=CALIBRATION)]
    names = {name: made[number % 3] for number, name in enumerate(ALIKE)}
    wanted = {directory: alone(directory, HISTORY, MOVIES[:3], items) for directory in made}
    bank = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, items))
    found = bank.score([(name, HISTORY, MOVIES[:3]) for name in names])
    for (name, directory), got in zip(names.items(), found, strict=True):
        np.testing.assert_allclose(got, wanted[directory], atol=1e-5, rtol=0, err_msg=name)
    # Nor does swapping or removing one name touch another.
    bank.swap("foo", made[1])
    bank.remove("fo")
    found = bank.score([(name, HISTORY, MOVIES[:3]) for name in ("foo", "foobar", "foo.bar", "FOO")])
    for name, got in zip(("foo", "foobar", "foo.bar", "FOO"), found, strict=True):
        directory = made[1] if name == "foo" else names[name]
        np.testing.assert_allclose(got, wanted[directory], atol=1e-5, rtol=0, err_msg=name)
    for near in ("fo", "foob", "foo.", "foo/", "Foo", "", "foo "):
        with pytest.raises(DataError, match="not in the bank"):
            bank.score([(near, HISTORY, MOVIES[:1])])


@pytest.mark.parametrize(
    "name", ["", " ", "foo ", "foo\n", "a\x00b", "\ud83d", "x" * 201, 3, None, True, ("a",), "\u200bfoo"]
)
def test_what_cannot_be_a_name_is_refused(name, bundle_of, tiny_base):
    bundle = bundle_of("head")
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle})
    with pytest.raises(DataError, match="a domain's name must be a text of 1 to 200 printable") as caught:
        bank.add(name, bundle)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(DataError, match="a domain's name must be"):
        DomainBank.load("nowhere", {name: bundle})
    assert bank.domains == ["m"]


@pytest.mark.parametrize("domain", [["m"], {"m": 1}, None, 3, b"m", np.str_])
def test_a_domain_that_is_no_text_is_no_fallback_either(domain, bundle_of, tiny_base, items):
    bank = DomainBank.load(tiny_base("llama"), {"m": bundle_of("head")}, {"m": items}, fallback="m")
    with pytest.raises(DataError, match="request 0 has the domain .* which is not text"):
        bank.score([(domain, [], MOVIES[:1])])
    for requests in ("m", None, {"m": 1}, 3):
        with pytest.raises(DataError, match="requests must be a list"):
            bank.score(requests)


# -- versions: what fails the same way is any version that stays after a swap, a removal, or an unused preload --


@pytest.fixture
def born(monkeypatch) -> list[weakref.ref]:
    """Weak references to all versions that banks have read since."""
    found: list[weakref.ref] = []
    load = bank_module.load_adapter

    def spy(*args, **kwargs):
        adapter = load(*args, **kwargs)
        found.append(weakref.ref(adapter))
        return adapter

    monkeypatch.setattr(bank_module, "load_adapter", spy)
    return found


def alive(born: list[weakref.ref]) -> int:
    if any(reference() is not None for reference in born[:-1]):
        gc.collect()  # slow
    return sum(reference() is not None for reference in born)


@pytest.mark.parametrize("max_bytes", [None, 10**9])
def test_a_version_goes_when_nobody_uses_it(max_bytes, born, bundle_of, tiny_base, items):
    versions = [bundle_of("head", seed=1), bundle_of("head", seed=2)]
    load = {"max_bytes": max_bytes, "cache_bytes": 10**7}
    bank = DomainBank.load(tiny_base("llama"), {"m": versions[0], "n": versions[0]}, dict.fromkeys("mn", items), **load)
    bank.score([("n", HISTORY, MOVIES[:2])])
    assert alive(born) == 1 and len(bank._engine.prefix_cache) == 1
    for number in range(1, 6):
        bank.swap("m", versions[number % 2])
        bank.score([("m", HISTORY, MOVIES[:2])])
        assert alive(born) == 1 + number % 2  # the other domain keeps its own
        assert len(bank._engine.prefix_cache) == 1 + number % 2, "prefixes of a dropped version stay"
    bank.swap("m", versions[1])
    bank.remove("n")
    assert alive(born) == 1
    bank.remove("m")
    assert alive(born) == 0 and len(bank._engine.prefix_cache) == 0


def test_a_preload_waits_for_its_first_use_or_its_release(born, bundle_of, tiny_base):
    one, two = bundle_of(seed=1), bundle_of(seed=2)
    bank = DomainBank.load(tiny_base("llama"), {"m": one})
    bank.preload(two)
    bank.preload(two)
    assert alive(born) == 2 and len(born) == 2
    bank.release(two)
    bank.release(two)
    assert alive(born) == 1
    bank.preload(two)
    bank.swap("m", two)
    assert alive(born) == 1 and len(born) == 3
    bank.release(two)  # it is in use
    assert bank.sizes()["m"] > 0 and alive(born) == 1
    bank.preload(one)
    shutil.rmtree(one)
    shutil.copytree(two, one)
    bank.preload(one)  # another version of the same place
    assert alive(born) == 2
    with pytest.raises(BundleError, match="cannot be read"):
        bank.preload(two / "nowhere")
    with pytest.raises(BundleError, match="cannot be read"):
        bank.preload("a\x00b")


@pytest.mark.parametrize("by", ["bank", "scorer"])
def test_requests_under_way_keep_their_version_and_no_other_stays(by, born, bundle_of, tiny_base, items):
    """Threads score while another swaps; each answer is one version's, and memory ends where it began."""
    versions = [bundle_of(seed=1), bundle_of("adapter", seed=2), bundle_of(seed=3, r=2)]
    bank = DomainBank.load(tiny_base("llama"), {"m": versions[0]}, {"m": items}, cache_bytes=10**7)
    scorer, known = bank.scorer("m"), []
    for version in versions:
        bank.swap("m", version)
        known.append(bank.score([("m", HISTORY, MOVIES[:3])])[0])
    errors: list[BaseException] = []
    most = 0

    def score() -> None:
        try:
            for _ in range(12):
                request = ("m", HISTORY, MOVIES[:3])
                got = scorer.score(*request[1:]) if by == "scorer" else bank.score([request])[0]
                assert sum(np.allclose(got, want, atol=1e-5) for want in known) == 1, "an answer of no version"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    number = 0
    while any(thread.is_alive() for thread in threads):
        number += 1
        bank.swap("m", versions[number % 3])
        most = max(most, sum(reference() is not None for reference in born))
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert number > 3 and most <= 1 + 1 + 3 + 1  # in use, coming, one a thread, and a collector that is late
    assert alive(born) == 1
    assert sum(bank.sizes().values()) > 0


def test_a_request_under_way_does_not_bring_a_version_back(born, bundle_of, tiny_base, items, monkeypatch):
    """It began with a version that left memory for `max_bytes`, and that is swapped out while it is read again."""
    one, two, three = bundle_of(seed=1), bundle_of(seed=2), bundle_of(seed=3)
    names = {"a": one, "b": two}
    bank = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, items), max_bytes=1)
    want = alone(one, HISTORY, MOVIES[:2], items)
    load = bank_module.load_adapter

    def swapped(*args, **kwargs):
        monkeypatch.setattr(bank_module, "load_adapter", load)
        bank.swap("a", three)
        return load(*args, **kwargs)

    assert bank.sizes()["a"] == 0
    monkeypatch.setattr(bank_module, "load_adapter", swapped)
    got = bank.score([("a", HISTORY, MOVIES[:2])])[0]
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
    assert alive(born) == 1 and bank.sizes()["a"] > 0


def test_the_same_weights_at_another_scale_do_not_share_histories(bundle_of, tiny_base, items):
    """What fails the same way: any two bundles whose weights' files are equal and whose settings are not."""
    names = {"a": bundle_of(seed=1, alpha=4.0), "b": bundle_of(seed=1, alpha=64.0), "c": bundle_of(seed=1, rslora=True)}
    bank = DomainBank.load(tiny_base("llama"), names, dict.fromkeys(names, items), cache_bytes=10**7)
    for name, directory in names.items():
        got = bank.score([(name, HISTORY, MOVIES[:3])])[0]
        np.testing.assert_allclose(got, alone(directory, HISTORY, MOVIES[:3], items), atol=1e-5, rtol=0, err_msg=name)
