"""Measuring: how fast, how large, how accurate, how far from the original."""
