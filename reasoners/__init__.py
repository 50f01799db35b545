"""Distilled reasoners: fast students of Llama teachers, and many chains of thought per second."""

__version__ = "0.1.0"
