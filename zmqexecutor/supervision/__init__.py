"""The supervisor, which keeps a group of processes alive with Circus, and the handle on it."""
