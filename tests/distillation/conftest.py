"""What these tests share with those of inference: tiny bundles, and the domains that they answer."""

from tests.inference.conftest import bundle_of, domains

__all__ = ["bundle_of", "domains"]
