"""How vectors are trained: losses, objectives, the loop, where they start, [AE]. It knows nothing of verdicts."""
