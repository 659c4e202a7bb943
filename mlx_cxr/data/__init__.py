"""Raw images, tables and reports become a manifest and a pixel store: pandas, NumPy, Pillow; no MLX."""
