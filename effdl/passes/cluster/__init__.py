"""Passes that make weights share values."""
