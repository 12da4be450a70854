"""The loops that are compared, one a file: each builds itself from the same work and steps when it is told to."""
