"""The Triton backend: loaded when it is asked for first."""
