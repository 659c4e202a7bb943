"""From predictions to every number, table and plot: NumPy and scikit-learn, no MLX."""
