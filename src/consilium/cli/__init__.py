"""The command line: one file per command, `app` chooses it."""
