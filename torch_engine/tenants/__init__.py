"""Tenants' non-expert weights, and making them the ones in use (reconfiguration)."""
