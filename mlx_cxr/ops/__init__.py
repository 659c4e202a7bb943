"""MLX operations and their gradients for backends that lack a fast one; `switch` turns all of them off."""
