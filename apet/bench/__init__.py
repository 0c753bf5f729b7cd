"""Speed: ``apet bench COMMAND``; `apet.bench.__main__` says what a sub-command must have."""
