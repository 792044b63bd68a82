"""For ports: what they can compare themselves with, and what a difference means."""
