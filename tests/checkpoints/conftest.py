"""Fixtures shared with the tests of models."""

from tests.models.conftest import answer, domain, make, prompt, shake, tiny_roberta

__all__ = ["answer", "domain", "make", "prompt", "shake", "tiny_roberta"]
