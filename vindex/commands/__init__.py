"""Handlers of the `vindex` command, one module per theme. Nothing heavy is imported before a handler runs."""
