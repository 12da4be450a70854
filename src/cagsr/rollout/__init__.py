"""Rollout: sample answers."""
