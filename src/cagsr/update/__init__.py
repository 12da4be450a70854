"""Update: the teacher-forced pass, the losses and the PPO loop."""
