"""One training loop, with its losses, batches, augmentation and checkpoints. Distillation is another loss for it."""
