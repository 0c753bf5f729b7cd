"""Compare scored runs: ``apet report DIR...`` prints one table of scores, tokens and speed."""
