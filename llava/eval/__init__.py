"""Evaluation entry points: answer a question file, score an answers file."""
