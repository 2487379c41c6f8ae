"""The PPO learner: everything that needs torch."""
