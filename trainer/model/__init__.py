"""The frozen model and what goes into it: embed, body, head; the vectors, prefixes and rows. No losses, no data."""
