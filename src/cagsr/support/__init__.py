"""What every room leans on and what knows nothing of the method: files, clocks, ports, processes, progress, extras."""
