"""A trained run opened and asked: `Predictor` for images, `report_reader` for reports."""
