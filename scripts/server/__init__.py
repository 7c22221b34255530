"""The HTTP server of `moetel serve`: OpenAI's routes for every tenant of a store.

FastAPI is imported by the modules that need it, and by none that other commands load.
"""
