"""How a plan is made: losses, copies, residuals, where bytes go."""
