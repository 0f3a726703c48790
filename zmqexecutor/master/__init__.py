"""The thread that workers register with: which of them runs what, and what becomes of it."""
