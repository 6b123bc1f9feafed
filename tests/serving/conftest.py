"""What these tests share with those of inference: the items of a small log."""

from tests.inference.conftest import items

__all__ = ["items"]
