"""Evaluation: measures of answers that share nothing with the reward, and the statistics behind them."""
