"""The pages that people read: tables, plots, pictures, Markdown and HTML from results; no MLX.

As every room it imports from the rooms above it: the law stands in `tests/test_architecture.py`.
"""
