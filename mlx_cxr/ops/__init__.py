"""MLX operations and their gradients for backends that lack a fast one; `use_fast_ops` turns all of them off."""
