"""Forward hooks on a live model: measure, gate, edit."""
