"""Advantage: from rewards to what the policy is trained on."""
