"""The attention reward inside other people's loops: TRL's trainers, verl and OpenRLHF.

``trl`` reads the attention of the policy itself; ``verl`` and ``openrlhf`` call their reward functions in another process than
the policy's, so these read the attention of a frozen model loaded from a path.
"""
