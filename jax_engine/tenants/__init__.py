"""Tenants on the device: their non-expert weights, and what a store gives."""
