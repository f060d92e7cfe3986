"""The command line: one module per command, and `app` dispatches to them."""
