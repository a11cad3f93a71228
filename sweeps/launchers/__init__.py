"""Where the runs of a sweep are executed: this machine or SLURM."""
