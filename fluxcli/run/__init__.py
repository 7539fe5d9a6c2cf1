"""Who runs a job, and where: in this process or in the warm worker."""
