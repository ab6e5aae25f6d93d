"""Commands of the probes: probe, gate3, patch, gates. Nothing heavy is imported before a handler runs."""
