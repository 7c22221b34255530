"""From checkpoints to a store, and changes of a store."""
