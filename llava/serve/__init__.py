"""Interactive use."""
