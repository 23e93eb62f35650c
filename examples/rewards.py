"""The reward of `config.yaml`."""


def starts_right(completions, answer, **kwargs):
    """Give 1 to a completion that begins with the right number."""
    return [1.0 if text.strip().startswith(right) else 0.0 for text, right in zip(completions, answer, strict=True)]
