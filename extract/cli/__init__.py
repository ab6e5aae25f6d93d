"""Commands of the extractors: build, plan, verify. Nothing heavy is imported before a handler runs."""
