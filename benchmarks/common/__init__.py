"""What all benchmarks share: the client with its clock, servers, texts of exact length, statistics, the machine."""
