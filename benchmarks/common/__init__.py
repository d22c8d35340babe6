"""Shared by all benchmarks: timing client, servers, texts of exact length, statistics, machine description."""
