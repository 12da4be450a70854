"""Short runs of good and bad rewards, most of which turn: what the forecast of ``cagsr diagnose`` was made from."""
