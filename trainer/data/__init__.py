"""What a run learns from: queries, the responses to them, the corpus. It knows the model and no objective."""
