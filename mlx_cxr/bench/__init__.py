"""What the `benchmark` stage measures: each section compares outputs first, then times all contenders in turn.

The only room that imports PyTorch (the extra `bench`), and only inside functions.
"""
