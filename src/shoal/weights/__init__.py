"""From the trainer's weights to every worker of every engine, and the proof that they arrived."""
