"""Raw films, tables and reports become a manifest and a pixel store: pandas, NumPy, Pillow; no MLX."""
