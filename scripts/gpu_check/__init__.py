"""Checks and times vendor/cuda on its own. See scripts/gpu_check.py."""
