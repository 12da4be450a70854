"""Where untrusted code runs: a process of its own that can do nothing but compute."""
