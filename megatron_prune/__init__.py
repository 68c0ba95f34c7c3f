"""Prune Megatron checkpoints, train them on, and compare with training from scratch."""

__version__ = "0.1.0"
