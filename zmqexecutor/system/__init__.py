"""What has to do with the machine, its limits and its interpreter."""
