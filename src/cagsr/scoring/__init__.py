"""Scoring: what the policy and the reference make of finished answers, read in one teacher-forced pass each."""
