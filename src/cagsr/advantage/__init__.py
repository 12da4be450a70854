"""Advantage: from rewards to what the policy is trained on.

``estimate`` puts it together; ``gae`` and ``group`` are the estimators, ``whiten`` and ``kl`` what they need.
"""
