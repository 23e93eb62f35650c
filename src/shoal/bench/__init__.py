"""What `shoal bench` measures, each figure beside its peer's from the same run."""
