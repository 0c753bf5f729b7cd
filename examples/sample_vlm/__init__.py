"""A small LLaVA that really sees, made from scratch: scenes, questions, tokenizer, training, export, benchmark files.

The commands, all run from the repository root:

    python -m examples.sample_vlm.benchmarks            # writes data/sample/eval (GQA, POPE, TextVQA and MME layouts)
    python -m examples.sample_vlm.export                # writes data/sample/model with random weights
    python -m examples.sample_vlm.train --size small    # trains (CPU) and exports over data/sample/model
    python -m examples.sample_vlm.train --size full     # the larger model, for one GPU
    python -m examples.sample_vlm.evaluate              # held-out accuracy per question type of a training checkpoint
"""
