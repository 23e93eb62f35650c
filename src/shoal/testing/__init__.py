"""Fakes and slow exact stand-ins for tests, those of Shoal's users too."""

from shoal.testing.engines import FakeEngine
from shoal.testing.models import greedy_texts, tiny_model, tiny_tokenizer

__all__ = ["FakeEngine", "greedy_texts", "tiny_model", "tiny_tokenizer"]
