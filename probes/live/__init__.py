"""A live model: loaded, its places by name, hooks that leave no trace, and text as the ids it is prompted with."""
