"""Networks in MLX, and the one place where weights change layout to and from other frameworks."""
