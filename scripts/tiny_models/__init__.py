"""The parts of scripts/make_tiny_models.py, one noun per file."""
