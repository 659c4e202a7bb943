"""Sections of the `benchmark` stage: each compares outputs first, then times all contenders in turn.

The only room that imports PyTorch (the extra `bench`), and only inside functions.
"""

SECTIONS = ("inference", "training", "grad_cam", "data", "teacher")
