"""The `be-serve` command: a file a verb, heavy imports inside the verb."""
