"""Where people train: one small file for each library, imported by those who use it, and by nothing else."""
