"""Preference pairs: read, checked, split and made by machine; reward models and DPO trained on them (TRL)."""
