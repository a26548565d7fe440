"""Passes that replace what an exporter wrote out by one node."""
