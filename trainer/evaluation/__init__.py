"""How good a token is: divergence, clauses, habits, failure signatures, the verdict. It trains nothing."""
