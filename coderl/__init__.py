"""Reinforcement learning for code models."""

__version__ = "0.1.0"
