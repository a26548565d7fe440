"""Feeds: calibration and evaluation samples, and random inputs of the right shape."""
