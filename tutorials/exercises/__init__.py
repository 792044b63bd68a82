"""Exercises: write chunk-wise training yourself, and be told in words what is wrong. See README.md."""
