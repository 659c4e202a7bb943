"""The parts of the page: what is shown and asked; what is computed is the package's."""
