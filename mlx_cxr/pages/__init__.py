"""The pages that people read: tables, plots, pictures, Markdown and HTML from results; no MLX."""
