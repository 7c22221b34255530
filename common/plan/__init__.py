"""The plan as data: copies, who uses which, residuals, distances, profiles."""
