"""The server on Ray Serve: its routes in an ingress, and an engine in each replica."""
