"""Measurements about the method itself, beside a run: rivals, capacity, the one-step probe, speed."""
