"""Passes that say the same in another opset or number type."""
