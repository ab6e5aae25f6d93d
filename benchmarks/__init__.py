"""The project beside its peers. Every figure printed by one script was measured in that one run."""
