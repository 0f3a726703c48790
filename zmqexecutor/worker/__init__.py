"""A worker's process: it registers with a master, and runs jobs."""
