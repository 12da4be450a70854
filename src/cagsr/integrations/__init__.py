"""The attention reward in other people's loops: TRL's trainers (the policy's own), verl and OpenRLHF (a frozen model's)."""
