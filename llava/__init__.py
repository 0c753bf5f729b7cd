"""Drop-in module paths for LLaVA scripts, on top of `apet`."""
