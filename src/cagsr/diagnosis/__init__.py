"""Diagnosis: is a reward worth a training run for a model and its prompts, and which settings of it?"""
