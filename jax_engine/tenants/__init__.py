"""Tenants on the device: their non-expert weights, and all that a store gives."""
