"""Room of the JAX/Flax engine for Switch Transformer: empty in this version, whose stores hold Mixtral tenants only."""
