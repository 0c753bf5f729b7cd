"""The algorithm's pieces as pure functions on tensors: basis selection, approximation error, merging."""
