"""The synthetic MIMIC-CXR: rendered chest films, their reports and labels."""
