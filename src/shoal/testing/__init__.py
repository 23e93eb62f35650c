"""Fakes and slow exact stand-ins for tests, those of Shoal's users too."""

from shoal.testing.engines import FakeEngine
from shoal.testing.models import tiny_model, tiny_tokenizer

__all__ = ["FakeEngine", "tiny_model", "tiny_tokenizer"]
