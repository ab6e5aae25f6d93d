"""The probe suite: C1–C5 of a live model, each with its definition, interval and null."""
