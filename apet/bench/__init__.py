"""Speed: ``python -m apet.bench COMMAND``. One module per sub-command; see `apet.bench.__main__` for what it must have."""
