"""The version of Moetel, written into stores and shown by `moetel --version`."""

__version__ = "0.1.0"
