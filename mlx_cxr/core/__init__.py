"""Labels, configuration, run folders, errors and the device: what every other room may use."""
