"""Short runs of good and bad rewards, most of which turn: what a forecast (``cagsr.diagnosis.forecast``) is fitted on."""
