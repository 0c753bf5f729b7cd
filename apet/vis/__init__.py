"""Pictures of what a method keeps: ``python -m apet.vis IMAGE --model-path M --methods apet,random --tokens 64``.

For every method and stage: the picture with the kept patches (the others dimmed), the groups that patches were merged
into, and the error map; with the answers. The same data goes into an NPZ file. The modules:

    trace  records what the stages of a patched model decide
    ask    asks one question under that record
    draw   the picture
"""
