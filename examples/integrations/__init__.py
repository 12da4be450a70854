"""The attention reward inside TRL, verl and OpenRLHF, each as a script that runs offline with a tiny model."""
