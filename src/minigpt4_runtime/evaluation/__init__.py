"""HOW RIGHT: what judges answers, through the public API only."""
