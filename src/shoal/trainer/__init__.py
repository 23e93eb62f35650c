"""`GRPOTrainer`, and the wiring of everything it needs."""
