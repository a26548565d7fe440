"""The command line: one file a verb, nothing heavy imported at the top."""
