"""Checkpoints with masks, made from a Hugging Face model."""

from tests.masks.conftest import sparse  # noqa: F401  # a fixture
