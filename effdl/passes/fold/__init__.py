"""Passes that move arithmetic into the weights beside it."""
