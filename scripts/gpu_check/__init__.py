"""Checks and times vendor/cuda by itself: see scripts/gpu_check.py."""
