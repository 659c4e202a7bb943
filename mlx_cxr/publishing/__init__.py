"""The model card, and the export to other formats."""
