"""Medusa itself: heads, trees, acceptance, the engine. What would remain if Ray did not exist."""
