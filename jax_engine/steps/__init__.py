"""Steps: what is compiled, and the sequences that are advanced."""
