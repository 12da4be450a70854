"""E2E NLG: restaurant facts in, one human sentence out; the whole job with a checker that knows the truth."""
