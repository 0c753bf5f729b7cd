"""LLaVA classes per language model."""
